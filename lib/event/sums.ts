/**
 * One exact sum for each user, in typed arrays: a Map of strings and bigints took four times as long as
 * scanning the events.
 *
 * A sum is stored as two integers, whole units and billionths, and each must stay exact in a double
 * (2^53). Values are below 10^15, so the whole units can overflow: they are moved to a bigint in time.
 * The billionths would need nine million events of one user in one batch.
 */
import { formatAmount, UNITS } from "./amount.ts";
import { hashOf } from "./scanner.ts";
import { grown, integerArray, Texts } from "./texts.ts";

const BILLION = 1_000_000_000;
/** Below this, a sum is still exact after one more value: 8 * 10^15 + 10^15 < 2^53. */
const MAX_WHOLE = 8e15;
const INITIAL_ROWS = 2048;
/** Values that wait to be added together. */
const MAX_WAITING = 64;

/** The users, with a sum for each. */
export class Sums extends Texts {
  /** Three numbers a row: whole units, billionths, and the number of values. */
  private sums = new Float64Array(3 * INITIAL_ROWS);
  /** By row, what became too large for `sums`, in units of 10^-9. */
  private readonly large = new Map<number, bigint>();
  /** Of each value that waits: where its user begins and ends, and the hash; and the value's two parts. */
  private readonly places = new Int32Array(3 * MAX_WAITING);
  private readonly values = new Float64Array(2 * MAX_WAITING);
  private readonly near = new Int32Array(MAX_WAITING);
  private waiting = 0;

  /**
   * Adds `whole` plus `billionths` * 10^-9 to the user whose id is in `bytes`, from index `from` to `to`, and
   * returns the user's row. `hash` is the Scanner's. Positional, because this is called for every event.
   */
  add(
    bytes: Uint8Array,
    from: number,
    to: number,
    hash: number,
    whole: number,
    billionths: number,
  ): number {
    const row = this.find(bytes, from, to, hash);
    if (3 * row >= this.sums.length) this.sums = grown(this.sums, Float64Array);
    const { sums } = this;
    const sum = (sums[3 * row] as number) + whole;
    sums[3 * row] = sum;
    sums[3 * row + 1] = (sums[3 * row + 1] as number) + billionths;
    sums[3 * row + 2] = (sums[3 * row + 2] as number) + 1;
    if (sum < MAX_WHOLE && sum > -MAX_WHOLE) return row;
    this.large.set(row, (this.large.get(row) ?? 0n) + BigInt(sum) * UNITS);
    sums[3 * row] = 0;
    return row;
  }

  /**
   * The same by the next `flush` of these `bytes`. With 100,000 users, an event alone waits four times for the
   * memory of its user: a third of the time that folding takes. 64 of them wait together.
   */
  addLater(
    bytes: Uint8Array,
    from: number,
    to: number,
    hash: number,
    whole: number,
    billionths: number,
  ): void {
    const { places, values, waiting } = this;
    places[3 * waiting] = from;
    places[3 * waiting + 1] = to;
    places[3 * waiting + 2] = hash;
    values[2 * waiting] = whole;
    values[2 * waiting + 1] = billionths;
    if (++this.waiting === MAX_WAITING) this.flush(bytes);
  }

  /** Adds what waits. */
  flush(bytes: Uint8Array): void {
    const { places, values, waiting } = this;
    this.touch();
    this.waiting = 0;
    for (let i = 0; i < waiting; i++)
      this.add(
        bytes,
        places[3 * i] as number,
        places[3 * i + 1] as number,
        places[3 * i + 2] as number,
        values[2 * i] as number,
        values[2 * i + 1] as number,
      );
  }

  /** Reads what `add` is about to need. Each loop's reads do not depend on each other, so they overlap. */
  private touch(): void {
    const { places, waiting, near, slots, mask, bounds, sums, bytes } = this;
    for (let i = 0; i < waiting; i++)
      near[i] = Math.max(0, (slots[2 * ((places[3 * i + 2] as number) & mask)] as number) - 1);
    let touched = 0;
    for (let i = 0; i < waiting; i++) {
      const row = near[i] as number;
      touched += sums[3 * row] as number;
      near[i] = bounds[row] as number;
    }
    for (let i = 0; i < waiting; i++) touched += bytes[near[i] as number] as number;
    near[0] = touched; // else the compiler could leave the reads out
  }

  /** Adds `amount`, in units of 10^-9, to the user's sum. */
  addTo(userId: string, amount: bigint): void {
    const bytes = Buffer.from(userId);
    const hash = hashOf(bytes, 0, bytes.length);
    this.add(bytes, 0, bytes.length, hash, Number(amount / UNITS), Number(amount % UNITS));
  }

  /** The sums, in the order of the users, as the literal of a Postgres numeric array. */
  amountArray(): string {
    const amounts: string[] = [];
    for (let row = 0; row < this.size; row++) amounts.push(this.amount(row));
    return `{${amounts.join()}}`;
  }

  /** How many values each sum has, in the same order. */
  countArray(): string {
    return integerArray(this.size, (row) => this.sums[3 * row + 2] as number);
  }

  private amount(row: number): string {
    const large = this.large.get(row);
    let whole = this.sums[3 * row] as number;
    let rest = this.sums[3 * row + 1] as number;
    if (large !== undefined) return formatAmount(large + BigInt(whole) * UNITS + BigInt(rest));
    const carry = Math.floor(rest / BILLION);
    whole += carry;
    rest -= carry * BILLION;
    if (rest === 0) return `${whole + 0}`; // without the sign of -0
    // -3 and 0.25 are written as -2.75.
    const digits = (whole: number, rest: number) => `${whole}.${`${rest}`.padStart(9, "0")}`;
    return whole < 0 ? `-${digits(-whole - 1, BILLION - rest)}` : digits(whole, rest);
  }
}
