/**
 * The events of one batch that have an id, as columns of numbers and bytes. As objects with strings, 80,000 of
 * them took 446 MB, and half of the processor's time.
 */
import { formatParts } from "../event/amount.ts";
import { getEventTypes } from "../event/event.ts";
import type { Points } from "../event/points.ts";
import type { Sums } from "../event/sums.ts";
import { hashOf } from "../event/scanner.ts";
import { grown, integerArray, Texts } from "../event/texts.ts";
import { HASH_BYTES, hashArray, keyArray } from "./ids.ts";

const INITIAL_ROWS = 1024;

/** What is kept of a claim, besides its id and the hash of its event. */
const FIELDS = ["user", "whole", "billionths", "from", "to", "run", "point"] as const;

/** The claims in the order of their first events. */
export class Claims {
  private readonly ids = new Texts();
  private hashes = Buffer.allocUnsafe(HASH_BYTES * INITIAL_ROWS);
  private numbers = new Float64Array(FIELDS.length * INITIAL_ROWS);

  get size(): number {
    return this.ids.size;
  }

  /**
   * Claims the id in `bytes`, from index `from` to `to`, for the event with this hash. Returns how that ended:
   * it is claimed, and `describe` must follow; or it was claimed before, by the same event or by another one.
   */
  claim(
    bytes: Uint8Array,
    from: number,
    to: number,
    hash: Uint8Array,
  ): "claimed" | "same" | "other" {
    const { ids, size } = this;
    const row = ids.find(bytes, from, to, hashOf(bytes, from, to));
    const at = HASH_BYTES * row;
    if (row < size) {
      for (let i = 0; i < HASH_BYTES; i++) if (this.hashes[at + i] !== hash[i]) return "other";
      return "same";
    }
    if (at === this.hashes.length) {
      this.hashes = Buffer.concat([this.hashes], 2 * at);
      this.numbers = grown(this.numbers, Float64Array);
    }
    for (let i = 0; i < HASH_BYTES; i++) this.hashes[at + i] = hash[i] as number;
    return "claimed";
  }

  /**
   * What the last claim adds: to a row of the batch's totals, and to a point; the bytes of its line; and how many
   * lines before it in the batch may count: between claims of successive runs there is none.
   */
  describe(
    user: number,
    whole: number,
    billionths: number,
    from: number,
    to: number,
    run: number,
    point: number,
  ): void {
    const { numbers } = this;
    let at = FIELDS.length * (this.size - 1);
    numbers[at++] = user;
    numbers[at++] = whole;
    numbers[at++] = billionths;
    numbers[at++] = from;
    numbers[at++] = to;
    numbers[at++] = run;
    numbers[at] = point;
  }

  /** The ids as the ledger stores them, and the hashes of the events, as Postgres' arrays. */
  keyArray(): string {
    return keyArray(this.ids);
  }

  hashArray(): string {
    return hashArray(this.hashes, this.size);
  }

  /** The ids as they are. */
  idArray(): string {
    return this.ids.textArray();
  }

  /** One of the fields. */
  array(field: (typeof FIELDS)[number]): string {
    const { numbers, size } = this;
    const offset = FIELDS.indexOf(field);
    // Rows of the totals and points are counted from 1 in Postgres.
    const first = field === "user" ? 1 : 0;
    return integerArray(size, (row) => (numbers[FIELDS.length * row + offset] as number) + first);
  }

  /** The users, one for each claim, and the amounts; a query can do without their rows in the totals. */
  users(totals: Sums): string[] {
    return this.map((row) => totals.text(this.number(row, "user")));
  }

  amounts(): string[] {
    return this.map((row) =>
      formatParts(this.number(row, "whole"), this.number(row, "billionths")),
    );
  }

  /** The identities of the events, as `identityOf` in lib/processor/fold.ts. */
  identities(totals: Sums, points: Points): string[] {
    const names = points.rows().map(({ name }) => name);
    return this.map((row) => {
      const name = names[this.number(row, "point") - 1] as string;
      const sign = getEventTypes().get(name) ?? 1;
      return JSON.stringify({
        id: this.ids.text(row),
        userId: totals.text(this.number(row, "user")),
        name,
        value: formatParts(sign * this.number(row, "whole"), sign * this.number(row, "billionths")),
      });
    });
  }

  private map<T>(of: (row: number) => T): T[] {
    return Array.from({ length: this.size }, (_, row) => of(row));
  }

  private number(row: number, field: (typeof FIELDS)[number]): number {
    return this.numbers[FIELDS.length * row + FIELDS.indexOf(field)] as number;
  }
}
