/**
 * One exact sum for each user, keyed by the bytes of the user id: an open-addressing hash table whose
 * rows are numbers in typed arrays. A Map of strings and bigints took four times as long as scanning the
 * events.
 *
 * Senders choose the ids, and the hash is one for which anybody can compute ids that collide: 100,000 of
 * them took 52 s. So a search ends after some probes, and such a user is found by a keyed digest instead.
 *
 * A sum is stored as two integers, whole units and billionths, and each must stay exact in a double
 * (2^53). Values are below 10^15, so the whole units can overflow: they are moved to a bigint in time.
 * The billionths would need nine million events of one user in one batch.
 */
import { formatAmount, UNITS } from "./amount.ts";
import { keyedDigest } from "./keyed-digest.ts";
import { hashOf } from "./scanner.ts";

const BILLION = 1_000_000_000;
/** Below this, a sum is still exact after one more value: 8 * 10^15 + 10^15 < 2^53. */
const MAX_WHOLE = 8e15;
const INITIAL_ROWS = 2048;
/** In a table that is half full, of a million users some four need more. */
const MAX_PROBES = 64;
/** Another user with the same hash counts as this many probes, because its bytes are compared. */
const COLLISION_PROBES = 8;
const QUOTE = 0x22;
const BACKSLASH = 0x5c;

export class Sums {
  /** The number of users. */
  size = 0;
  private mask = 4095;
  /** Two numbers a slot: the row plus one (0: the slot is empty), and the user's hash. */
  private slots = new Int32Array(2 * (this.mask + 1));
  /** Two numbers a row: whole units and billionths. */
  private sums = new Float64Array(2 * INITIAL_ROWS);
  /** The rows that have no slot, by the keyed digest of their user. */
  private overflow = new Map<string, number>();
  /** By row, what became too large for `sums`, in units of 10^-9. */
  private readonly large = new Map<number, bigint>();
  /** All ids, concatenated; the id of row i is from `bounds[i]` to `bounds[i + 1]`. */
  private ids = Buffer.allocUnsafe(16 * INITIAL_ROWS);
  private bounds = new Int32Array(INITIAL_ROWS);

  /**
   * Adds `whole` plus `billionths` * 10^-9 to the user whose id is in `bytes`, from index `from` to `to`.
   * `hash` is the Scanner's. Positional, because this is called for every event.
   */
  add(
    bytes: Uint8Array,
    from: number,
    to: number,
    hash: number,
    whole: number,
    billionths: number,
  ): void {
    const row = this.find(bytes, from, to, hash);
    const { sums } = this;
    const sum = (sums[2 * row] as number) + whole;
    sums[2 * row] = sum;
    sums[2 * row + 1] = (sums[2 * row + 1] as number) + billionths;
    if (sum < MAX_WHOLE && sum > -MAX_WHOLE) return;
    this.large.set(row, (this.large.get(row) ?? 0n) + BigInt(sum) * UNITS);
    sums[2 * row] = 0;
  }

  /** Adds `amount`, in units of 10^-9, to the user's sum. */
  addTo(userId: string, amount: bigint): void {
    const bytes = Buffer.from(userId);
    const hash = hashOf(bytes, 0, bytes.length);
    this.add(bytes, 0, bytes.length, hash, Number(amount / UNITS), Number(amount % UNITS));
  }

  /** Adds all sums of `other`. */
  addAll(other: Sums): void {
    for (let row = 0; row < other.size; row++) {
      const from = other.bounds[row] as number;
      const to = other.bounds[row + 1] as number;
      const hash = hashOf(other.ids, from, to);
      const whole = other.sums[2 * row] as number;
      this.add(other.ids, from, to, hash, whole, other.sums[2 * row + 1] as number);
      const large = other.large.get(row);
      if (large === undefined) continue;
      const own = this.find(other.ids, from, to, hash);
      this.large.set(own, (this.large.get(own) ?? 0n) + large);
    }
  }

  /** The users as the literal of a Postgres text array. */
  userArray(): string {
    const array = Buffer.allocUnsafe(2 * (this.bounds[this.size] as number) + 3 * this.size + 2);
    let length = 0;
    array[length++] = 0x7b;
    for (let row = 0, at = 0; row < this.size; row++) {
      if (row > 0) array[length++] = 0x2c;
      array[length++] = QUOTE;
      for (const end = this.bounds[row + 1] as number; at < end; at++) {
        const byte = this.ids[at] as number;
        if (byte === QUOTE || byte === BACKSLASH) array[length++] = BACKSLASH;
        array[length++] = byte;
      }
      array[length++] = QUOTE;
    }
    array[length++] = 0x7d;
    return array.toString("utf8", 0, length);
  }

  /** Their sums, in the same order, as the literal of a Postgres numeric array. */
  amountArray(): string {
    const amounts: string[] = [];
    for (let row = 0; row < this.size; row++) amounts.push(this.amount(row));
    return `{${amounts.join()}}`;
  }

  private amount(row: number): string {
    const large = this.large.get(row);
    let whole = this.sums[2 * row] as number;
    let rest = this.sums[2 * row + 1] as number;
    if (large !== undefined) return formatAmount(large + BigInt(whole) * UNITS + BigInt(rest));
    const carry = Math.floor(rest / BILLION);
    whole += carry;
    rest -= carry * BILLION;
    if (rest === 0) return `${whole + 0}`; // without the sign of -0
    // -3 and 0.25 are written as -2.75.
    const digits = (whole: number, rest: number) => `${whole}.${`${rest}`.padStart(9, "0")}`;
    return whole < 0 ? `-${digits(-whole - 1, BILLION - rest)}` : digits(whole, rest);
  }

  private find(bytes: Uint8Array, from: number, to: number, hash: number): number {
    const { slots, mask } = this;
    let slot = hash & mask;
    for (let left = MAX_PROBES; left > 0; left--) {
      const row = (slots[2 * slot] as number) - 1;
      if (row < 0) return this.insert(slot, bytes, from, to, hash);
      if (slots[2 * slot + 1] === hash) {
        if (this.isUser(row, bytes, from, to)) return row;
        left -= COLLISION_PROBES - 1;
      }
      slot = (slot + 1) & mask;
    }
    return this.findOverflow(bytes, from, to, hash);
  }

  private isUser(row: number, bytes: Uint8Array, from: number, to: number): boolean {
    const { ids, bounds } = this;
    let at = bounds[row] as number;
    if ((bounds[row + 1] as number) - at !== to - from) return false;
    for (let i = from; i < to; i++) if (bytes[i] !== ids[at++]) return false;
    return true;
  }

  private findOverflow(bytes: Uint8Array, from: number, to: number, hash: number): number {
    const key = keyedDigest(latin1(bytes, from, to));
    return this.overflow.get(key) ?? this.insert(-1, bytes, from, to, hash, key);
  }

  /** Adds a user in `slot`, or without one by its `key`. */
  private insert(
    slot: number,
    bytes: Uint8Array,
    from: number,
    to: number,
    hash: number,
    key = "",
  ): number {
    const row = this.size++;
    if (this.size === this.bounds.length) {
      this.bounds = grown(this.bounds, Int32Array);
      this.sums = grown(this.sums, Float64Array);
    }
    let at = this.bounds[row] as number;
    if (at + to - from > this.ids.length) this.ids = Buffer.concat([this.ids], 2 * this.ids.length);
    for (let i = from; i < to; i++) this.ids[at++] = bytes[i] as number;
    this.bounds[row + 1] = at;
    if (slot < 0) this.overflow.set(key, row);
    else this.fill(slot, row, hash);
    if (this.size * 2 > this.mask) this.rehash();
    return row;
  }

  private fill(slot: number, row: number, hash: number): void {
    this.slots[2 * slot] = row + 1;
    this.slots[2 * slot + 1] = hash;
  }

  /** Gives each row its place in a larger table. While a table has its size, no slot becomes empty: so
   * a search ends where it ended when the row was added. */
  private rehash(): void {
    this.mask = this.mask * 2 + 1;
    this.slots = new Int32Array(2 * (this.mask + 1));
    this.overflow = new Map();
    for (let row = 0; row < this.size; row++) {
      const from = this.bounds[row] as number;
      const to = this.bounds[row + 1] as number;
      const hash = hashOf(this.ids, from, to);
      const slot = this.freeSlot(hash);
      if (slot < 0) this.overflow.set(keyedDigest(latin1(this.ids, from, to)), row);
      else this.fill(slot, row, hash);
    }
  }

  /** The slot of a new user, or -1 if it has none. */
  private freeSlot(hash: number): number {
    const { slots, mask } = this;
    let slot = hash & mask;
    for (let left = MAX_PROBES; left > 0; left--) {
      if (slots[2 * slot] === 0) return slot;
      if (slots[2 * slot + 1] === hash) left -= COLLISION_PROBES - 1;
      slot = (slot + 1) & mask;
    }
    return -1;
  }
}

function latin1(bytes: Uint8Array, from: number, to: number): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset + from, to - from).toString("latin1");
}

function grown<T extends Int32Array | Float64Array>(array: T, Kind: new (length: number) => T): T {
  const larger = new Kind(2 * array.length);
  larger.set(array);
  return larger;
}
