/**
 * Distinct texts, numbered from 0 in the order in which they come: an open-addressing hash table over their
 * UTF-8 bytes. It makes no string and no object of a text that it has already.
 *
 * Senders choose the texts, and the hash is one for which anybody can compute texts that collide: 100,000 of
 * them took 52 s. So a search ends after some probes, and such a text is found by a keyed digest instead.
 */
import { keyedDigest } from "./keyed-digest.ts";
import { hashOf } from "./scanner.ts";

const INITIAL_ROWS = 2048;
/** In a table that is half full, of a million texts some four need more. */
const MAX_PROBES = 64;
/** Another text with the same hash counts as this many probes, because its bytes are compared. */
const COLLISION_PROBES = 8;
const QUOTE = 0x22;
const BACKSLASH = 0x5c;

export class Texts {
  /** The number of texts. */
  size = 0;
  /** All texts, concatenated; that of row i is from `bounds[i]` to `bounds[i + 1]`. */
  bytes = Buffer.allocUnsafe(16 * INITIAL_ROWS);
  bounds = new Int32Array(INITIAL_ROWS);
  protected mask = 4095;
  /** Two numbers a slot: the row plus one (0: the slot is empty), and the hash of its text. */
  protected slots = new Int32Array(2 * (this.mask + 1));
  /** The rows that have no slot, by the keyed digest of their text. */
  private overflow = new Map<string, number>();

  /**
   * The row of the text in `bytes`, from index `from` to `to`, which is added if it is new. `hash` is the
   * Scanner's. Positional, because this is called for every event.
   */
  find(bytes: Uint8Array, from: number, to: number, hash: number): number {
    const { slots, mask } = this;
    let slot = hash & mask;
    for (let left = MAX_PROBES; left > 0; left--) {
      const row = (slots[2 * slot] as number) - 1;
      if (row < 0) return this.insert(slot, bytes, from, to, hash);
      if (slots[2 * slot + 1] === hash) {
        if (this.isText(row, bytes, from, to)) return row;
        left -= COLLISION_PROBES - 1;
      }
      slot = (slot + 1) & mask;
    }
    return this.findOverflow(bytes, from, to, hash);
  }

  text(row: number): string {
    return this.bytes.toString("utf8", this.bounds[row], this.bounds[row + 1]);
  }

  /** All of them as the literal of a Postgres text array. */
  textArray(): string {
    const array = Buffer.allocUnsafe(2 * (this.bounds[this.size] as number) + 3 * this.size + 2);
    let length = 0;
    array[length++] = 0x7b;
    for (let row = 0, at = 0; row < this.size; row++) {
      if (row > 0) array[length++] = 0x2c;
      array[length++] = QUOTE;
      for (const end = this.bounds[row + 1] as number; at < end; at++) {
        const byte = this.bytes[at] as number;
        if (byte === QUOTE || byte === BACKSLASH) array[length++] = BACKSLASH;
        array[length++] = byte;
      }
      array[length++] = QUOTE;
    }
    array[length++] = 0x7d;
    return array.toString("utf8", 0, length);
  }

  private isText(row: number, bytes: Uint8Array, from: number, to: number): boolean {
    const { bytes: own, bounds } = this;
    let at = bounds[row] as number;
    if ((bounds[row + 1] as number) - at !== to - from) return false;
    for (let i = from; i < to; i++) if (bytes[i] !== own[at++]) return false;
    return true;
  }

  private findOverflow(bytes: Uint8Array, from: number, to: number, hash: number): number {
    const key = keyedDigest(latin1(bytes, from, to));
    return this.overflow.get(key) ?? this.insert(-1, bytes, from, to, hash, key);
  }

  /** Adds a text in `slot`, or without one by its `key`. */
  private insert(
    slot: number,
    bytes: Uint8Array,
    from: number,
    to: number,
    hash: number,
    key = "",
  ): number {
    const row = this.size++;
    if (this.size === this.bounds.length) this.bounds = grown(this.bounds, Int32Array);
    let at = this.bounds[row] as number;
    if (at + to - from > this.bytes.length)
      this.bytes = Buffer.concat([this.bytes], 2 * this.bytes.length);
    for (let i = from; i < to; i++) this.bytes[at++] = bytes[i] as number;
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
      const hash = hashOf(this.bytes, from, to);
      const slot = this.freeSlot(hash);
      if (slot < 0) this.overflow.set(keyedDigest(latin1(this.bytes, from, to)), row);
      else this.fill(slot, row, hash);
    }
  }

  /** The slot of a new text, or -1 if it has none. */
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

/** A sign, 16 digits and a comma: below 2^53. */
const MAX_INTEGER_BYTES = 18;

/** Integers as the literal of a Postgres array. Makes no string of each: that took 0.3 s for 400,000 claims. */
export function integerArray(size: number, of: (row: number) => number): string {
  const array = Buffer.allocUnsafe(2 + size * MAX_INTEGER_BYTES);
  let at = 0;
  array[at++] = 0x7b;
  for (let row = 0; row < size; row++) {
    if (row > 0) array[at++] = 0x2c;
    let left = of(row);
    if (left < 0) {
      array[at++] = 0x2d;
      left = -left;
    }
    const begin = at++;
    for (let power = 10; power <= left; power *= 10) at++;
    for (let i = at - 1; i >= begin; i--) {
      const rest = Math.floor(left / 10);
      array[i] = 0x30 + (left - 10 * rest);
      left = rest;
    }
  }
  array[at++] = 0x7d;
  return array.toString("latin1", 0, at);
}

function latin1(bytes: Uint8Array, from: number, to: number): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset + from, to - from).toString("latin1");
}

/** Twice as long. */
export function grown<T extends Int32Array | Float64Array>(
  array: T,
  Kind: new (length: number) => T,
): T {
  const larger = new Kind(2 * array.length);
  larger.set(array);
  return larger;
}
