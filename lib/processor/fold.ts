/**
 * Folding: many event lines become one change for each user. Bounded by what one transaction
 * should hold, whatever the size of the source.
 */
import { formatAmount } from "../event/amount.ts";
import {
  type Change,
  decodeEvent,
  openScanner,
  InvalidEvent,
  scannedChange,
} from "../event/event.ts";
import { sentKey } from "../ledger/checkpoints.ts";
import {
  type Batch,
  type Claim,
  type Quarantined,
  SAME_ID,
  type SourceMove,
  type Uncounted,
} from "../ledger/ledger.ts";
import { eachEvent, SHOWN_BYTES } from "../event/lines.ts";
import { parseSourceMark, type SourceMark } from "../journal/source-mark.ts";
import { Sums } from "../event/sums.ts";

/** A claim is as much work as some users, and as much memory as many: with 80,000 of them 446 MB. */
const CLAIM_USERS = 10;
const MAX_QUARANTINED = 1_000;
/** The bytes of a source that are folded into one transaction: what a restart may do again. */
export const BATCH_BYTES = 128 * 1024 * 1024;

export class Fold {
  /** By how much each user's balance changes. */
  readonly changes = new Sums();
  private readonly scanner = openScanner();
  /** Events with an id: whether they count is for the ledger to say. */
  readonly claims = new Map<string, Claim>();
  /** Other events under these ids: one of them may be the one that came before. */
  readonly rivals: Claim[] = [];
  readonly quarantined: Quarantined[] = [];
  /** What does not count, whatever the ledger says; neighbours are one range. */
  readonly uncounted: Uncounted[] = [];
  /** The sources of the journal that move, by their names in the ledger. */
  readonly sources = new Map<string, SourceMove>();
  events = 0;
  /** Events that came before, as far as the fold can know. */
  private duplicates = 0;
  /** How many of them were there before, in the same batch. */
  private repeated = 0;
  /** The `turn` in which the last of `uncounted` was added. */
  private uncountedAt = -1;

  /**
   * `mostUsers`: about so many balances change in one transaction. `posted` says how far sources of the journal are already posted, where that is known to be
   * further than the journal expects: a source that has moved from one server to another.
   */
  constructor(
    private readonly mostUsers: number,
    private readonly posted: ReadonlyMap<string, number> = new Map(),
  ) {}

  /** Whether it is time to post. */
  get full(): boolean {
    return (
      this.changes.size >= this.mostUsers ||
      this.claims.size >= this.mostUsers / CLAIM_USERS ||
      this.sources.size >= this.mostUsers / CLAIM_USERS ||
      this.uncounted.length >= this.mostUsers / CLAIM_USERS ||
      this.quarantined.length + this.rivals.length >= MAX_QUARANTINED
    );
  }

  /** Adds the lines of a frame, whose first byte is at `position` of the journal. */
  addFrame(payload: Uint8Array, position: number): void {
    let mark: SourceMark | null = null;
    let postedTo = 0;
    let end = 0;
    let index = 0;
    /** Whether an event of `length` bytes counts, and what of its source it ends. */
    const counts = (at: number, length: number) => {
      if (!mark || index >= mark.events) return true;
      // `ends` counts from the mark's own beginning.
      const ends = mark.ends ? mark.from + (mark.ends[index] ?? 0) : end + length;
      end = ends + 1;
      index++;
      if (ends > postedTo) return true;
      this.duplicates++;
      this.leaveOut(position + at, position + at + length, "came by another server");
      return false;
    };
    eachEvent(
      payload,
      this.scanner,
      (at) => {
        if (counts(at, this.scanner.end - at)) this.addScanned(payload, position + at, at);
      },
      (line, at) => {
        const next = parseSourceMark(line);
        if (next) {
          mark = next;
          postedTo = this.moveSource(next);
          end = next.from;
          index = 0;
        } else if (counts(at, line.length)) this.add(line, position + at);
      },
    );
  }

  /** Adds lines of a file, whose first byte is at `position`. */
  addLines(bytes: Uint8Array, position: number): void {
    eachEvent(
      bytes,
      this.scanner,
      (at) => this.addScanned(bytes, position + at, at),
      (line, at) => this.add(line, position + at),
    );
  }

  /** Adds what the scanner has found at `at` in `bytes`. */
  private addScanned(bytes: Uint8Array, position: number, at: number): void {
    const { userFrom, userTo, hash, idTo, sign, whole, billionths, end } = this.scanner;
    if (sign === 0) {
      this.events++;
      return;
    }
    if (idTo > 0) {
      const change = scannedChange(this.scanner, bytes);
      return this.claim(position, position + end - at, { ...change, id: change.id as string });
    }
    this.changes.add(bytes, userFrom, userTo, hash, sign * whole, sign * billionths);
    this.events++;
  }

  /** Moves a source, and returns how far it was before: what ends there or earlier has counted. */
  private moveSource({ name, from, to, digest }: SourceMark): number {
    const source = sentKey(name);
    const begin = this.posted.get(source) ?? from;
    const move = this.sources.get(source) ?? { source, from: begin, to: begin, digest: null };
    this.sources.set(source, to >= move.to ? { ...move, to, digest } : move);
    return move.to;
  }

  /** Adds the line that begins at `position` of its source; quarantines what is not an event. */
  add(line: Uint8Array, position: number): void {
    const decoded = decodeEvent(line);
    if (decoded instanceof InvalidEvent) return this.quarantine(line, position, decoded.reason);
    const { userId, sign, amount, id } = decoded;
    if (id !== undefined && sign !== 0)
      return this.claim(position, position + line.length, { ...decoded, id });
    if (sign !== 0) this.changes.addTo(userId, amount);
    this.events++;
  }

  private claim(from: number, to: number, change: Change & { id: string }): void {
    const { id, userId, amount } = change;
    const event = identityOf(change);
    const claim = { id, userId, amount, event, position: from, to, turn: this.turn };
    const first = this.claims.get(id);
    this.events++;
    if (!first) this.claims.set(id, claim);
    else if (first.event !== event) this.rivals.push(claim);
    else {
      this.repeated++;
      this.duplicates++;
      this.leaveOut(from, to, SAME_ID);
    }
  }

  /**
   * Changes with each line that may count, now or when it is tried again out of quarantine: what is
   * left out in the same turn can be one range.
   */
  private get turn(): number {
    return this.events - this.repeated + this.quarantined.length;
  }

  /** Notes that what begins in bytes `from` to `to` of the source does not count. */
  leaveOut(from: number, to: number, why: string): void {
    const last = this.uncounted.at(-1);
    if (last && this.uncountedAt === this.turn && to > from) last.to = to;
    else this.uncounted.push({ from, to, why });
    this.uncountedAt = this.turn;
  }

  /** What to post for bytes `from` to `to` of `source`. */
  batch(source: string, from: number, to: number, digest: string | null): Batch {
    const { changes, claims, rivals, quarantined, uncounted, sources, events, duplicates } = this;
    const content = { changes, claims, rivals, quarantined, uncounted, sources, events };
    return { source, from, to, digest, ...content, duplicates };
  }

  quarantine(line: Uint8Array, position: number, reason: string): void {
    // Postgres' text holds no NUL, and what is not UTF-8 is shown as U+FFFD.
    const shown = Buffer.from(line.subarray(0, SHOWN_BYTES)).toString().replaceAll("\0", "\ufffd");
    this.quarantined.push({ position, reason, line: shown });
  }
}

/** All that makes an event with an id this one and no other. */
export function identityOf(change: Change & { id: string }): string {
  const { id, userId, name, sign, amount } = change;
  const value = formatAmount(sign < 0 ? -amount : amount);
  return JSON.stringify({ id, userId, name, value });
}

/** The line of an event that is told by its identity. */
export function lineOf(identity: string): string {
  const { value, ...others } = JSON.parse(identity) as { value: string };
  return `${JSON.stringify(others).slice(0, -1)},"value":${value}}`;
}
