/**
 * Revenue over time, as far as one batch adds to it: the number of events of each name and their amount, by
 * the minute in which the server stored them. What an id keeps from counting is subtracted by the ledger.
 */
import { formatAmount, UNITS } from "./amount.ts";

const MINUTE_MS = 60_000;
/** As in Sums: below this, a sum is still exact after one more value. */
const MAX_WHOLE = 8e15;

/** The events of one name in one minute. */
interface Point {
  /** Its place in the arrays, from 1. */
  index: number;
  /** The minute in seconds since 1970; `null`: that of the posting. */
  at: number | null;
  name: string;
  events: number;
  whole: number;
  billionths: number;
  /** What became too large for `whole`, in units of 10^-9. */
  large: bigint;
}

export class Points {
  private readonly points: Point[] = [];
  private readonly minutes = new Map<number | null, Map<string, Point>>();
  private minute: number | null = null;
  /** The points of the last two names that differ: most events have one of two names. */
  private last: Point | null = null;
  private other: Point | null = null;

  get size(): number {
    return this.points.length;
  }

  /** The events that follow were stored at `atMs`. */
  setTime(atMs: number): void {
    const minute = Math.floor(atMs / MINUTE_MS);
    if (minute !== this.minute) this.last = this.other = null;
    this.minute = minute;
  }

  /** Adds an event, and returns the index of its point. Positional, because this is called for every event. */
  add(name: string, whole: number, billionths: number): number {
    const point = this.last?.name === name ? this.last : this.exchange(name);
    point.events++;
    point.billionths += billionths;
    point.whole += whole;
    if (point.whole > MAX_WHOLE || point.whole < -MAX_WHOLE) {
      point.large += BigInt(point.whole) * UNITS;
      point.whole = 0;
    }
    return point.index;
  }

  /** Adds an event of this amount, in units of 10^-9. */
  addAmount(name: string, amount: bigint): number {
    return this.add(name, Number(amount / UNITS), Number(amount % UNITS));
  }

  /** The points in the order of their indexes. */
  rows() {
    return this.points.map(({ at, name, events, whole, billionths, large }) => ({
      ...{ at, name, events },
      amount: formatAmount(large + BigInt(whole) * UNITS + BigInt(billionths)),
    }));
  }

  /** Makes the point of `name` the last one. */
  private exchange(name: string): Point {
    const { last, other } = this;
    this.other = last;
    return (this.last = other?.name === name ? other : this.find(name));
  }

  private find(name: string): Point {
    const { minute, minutes, points } = this;
    const names = minutes.get(minute) ?? new Map<string, Point>();
    minutes.set(minute, names);
    const found = names.get(name);
    if (found) return found;
    const at = minute === null ? null : (minute * MINUTE_MS) / 1000;
    const point = {
      index: points.length + 1,
      at,
      name,
      events: 0,
      whole: 0,
      billionths: 0,
      large: 0n,
    };
    names.set(name, point);
    points.push(point);
    return point;
  }
}
