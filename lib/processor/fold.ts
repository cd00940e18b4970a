/**
 * Folding: many event lines become one change for each user, bounded by what one transaction should
 * hold, however large the source is.
 */
import { formatAmount, formatParts, UNITS } from "../event/amount.ts";
import {
  type Change,
  decodeEvent,
  InvalidEvent,
  MAX_EVENT_BYTES,
  MAX_JOURNALED_BYTES,
  openScanner,
  scannedChange,
} from "../event/event.ts";
import { eachEvent, SHOWN_BYTES } from "../event/lines.ts";
import { keyedDigest } from "../event/keyed-digest.ts";
import { Points } from "../event/points.ts";
import { Sums } from "../event/sums.ts";
import { hashOf, type Scanner } from "../event/scanner.ts";
import { parseSourceMark, type SourceMark } from "../journal/source-mark.ts";
import { sentKey } from "../ledger/checkpoints.ts";
import { Claims } from "../ledger/claims.ts";
import {
  type Batch,
  type Conflict,
  type Move,
  type Quarantined,
  SAME_ID,
  type Uncounted,
} from "../ledger/ledger.ts";

/** A claim is as much work as about two users. */
const USERS_PER_CLAIM = 2;
/** A source that moves is as much work as ten, and so is a range that does not count, or a point. */
const USERS_PER_ROW = 10;
const MAX_QUARANTINED = 1_000;
/** The bytes that are folded into one transaction, and so what a restart may have to repeat. */
export const MAX_BATCH_BYTES = 128 * 1024 * 1024;

const MAX_USERS = 200_000;
export const MIN_USERS = 1_000;
/** The SHA-256 of an identity, and the identity of a scanned event, which is below 600 bytes. */
const digest = new Uint8Array(32);
const scratch = Buffer.allocUnsafe(1024);
const MIN_TIMEOUT_MS = 10_000;
const MAX_TIMEOUT_MS = 120_000;

/**
 * An adaptive limit: a batch that failed is retried smaller, and with more time. A slow database, or one
 * that loses connections, still makes progress. (50,000 users, with the backend terminated every 100 ms,
 * never did.)
 */
export class BatchLimit {
  /** What a full disk leaves room for. */
  roomForUsers = Infinity;
  /** What the database manages. */
  private users = MAX_USERS;
  /** Postgres cancels the statement after this time, which releases its locks. */
  timeoutMs = MIN_TIMEOUT_MS;

  /** One transaction changes about this many balances; 200,000 take some 0.8 s. */
  get maxUsers(): number {
    return Math.max(MIN_USERS, Math.min(this.users, this.roomForUsers));
  }

  /** Quarters the batch size; if the attempt timed out, also doubles the timeout. */
  failed(ms: number): void {
    this.users = Math.max(MIN_USERS, Math.floor(this.maxUsers / 4));
    if (ms >= this.timeoutMs) this.timeoutMs = Math.min(MAX_TIMEOUT_MS, this.timeoutMs * 2);
  }

  succeeded(): void {
    this.users = Math.min(MAX_USERS, this.users * 2);
    this.timeoutMs = MIN_TIMEOUT_MS;
  }
}

/** Where an event with an id has its user and its id, and what it says; as a Scanner. */
type Parts = Pick<
  Scanner,
  "userFrom" | "userTo" | "hash" | "idFrom" | "idTo" | "name" | "sign" | "whole" | "billionths"
>;

/** The events after a source mark, as far as they have been seen. */
interface MarkedEvents {
  mark: SourceMark;
  /** What ends here in the source, or before, was posted already. */
  postedTo: number;
  /** Where the next event begins in the source, unless the mark says where each ends. */
  next: number;
  seen: number;
}

export class Fold {
  /** By how much each user's balance changes, if all claims count. */
  readonly totals = new Sums();
  /** The same by minute and name. */
  readonly points = new Points();
  /** Events with an id; the ledger decides whether they count. */
  readonly claims = new Claims();
  /** Other events under these ids, by the keyed digest of their identity: one of them may be the one that was posted before. */
  readonly conflicts = new Map<string, Conflict>();
  readonly quarantined: Quarantined[] = [];
  /** What does not count, whatever the ledger says; neighbours share a range. */
  readonly uncounted: Uncounted[] = [];
  /** The sources that move, by their checkpoint keys. */
  readonly sources = new Map<string, Move>();
  /** Events that count, as far as the fold can tell. */
  events = 0;
  /** Events that came before, as far as the fold can tell. */
  duplicates = 0;
  /** How many lines are quarantined because Postgres refuses them. */
  refusals = 0;
  /** The `run` in which the last of `uncounted` was added. */
  private uncountedRun = -1;
  private readonly scanner = openScanner();
  /** Why events with ids were refused, by their identity: the same event is refused wherever it stands. */
  private readonly refusedEvents = new Map<string, string>();

  /**
   * About `maxUsers` balances change in one transaction. `posted` says how far sources are posted, by
   * checkpoint key, where that is further than the journal expects: a source that moved from one
   * server to another. `refused` has the lines that Postgres refuses, by position, with its reasons.
   * `counted` is called with each event that counts as far as the fold can tell.
   */
  constructor(
    private readonly maxUsers: number,
    private readonly posted: ReadonlyMap<string, number> = new Map(),
    private readonly refused: ReadonlyMap<number, string> = new Map(),
    private readonly counted?: (position: number, change: Change) => void,
  ) {}

  /** Whether it is time to post. */
  get isFull(): boolean {
    const maxRows = this.maxUsers / USERS_PER_ROW;
    return (
      this.totals.size >= this.maxUsers ||
      this.claims.size >= this.maxUsers / USERS_PER_CLAIM ||
      this.sources.size >= maxRows ||
      this.uncounted.length >= maxRows ||
      this.points.size >= maxRows ||
      this.quarantined.length + this.conflicts.size >= MAX_QUARANTINED
    );
  }

  /** Adds the lines of a frame that was written at `atMs`; its first byte is at `position` of the journal. */
  addFrame(payload: Uint8Array, position: number, atMs: number): void {
    this.points.setTime(atMs);
    let marked: MarkedEvents | null = null;
    const counts = (index: number, bytes: number) =>
      !marked || this.counts(marked, position + index, bytes);
    eachEvent(
      payload,
      this.scanner,
      (index) => {
        if (counts(index, this.scanner.end - index)) this.addScanned(payload, index, position);
      },
      (line, index) => {
        const mark = parseSourceMark(line);
        if (mark) marked = { mark, postedTo: this.moveSource(mark), next: mark.from, seen: 0 };
        else if (counts(index, line.length)) this.add(line, position + index, MAX_JOURNALED_BYTES);
      },
      MAX_JOURNALED_BYTES,
    );
    this.totals.flush(payload);
  }

  /** Adds lines of a file, the first byte of which is at offset `position`. */
  addLines(bytes: Uint8Array, position: number): void {
    eachEvent(
      bytes,
      this.scanner,
      (index) => this.addScanned(bytes, index, position),
      (line, index) => this.add(line, position + index),
    );
    this.totals.flush(bytes);
  }

  /** Adds the line that begins at `position`; quarantines it if it is not a valid event. */
  add(line: Uint8Array, position: number, maxBytes = MAX_EVENT_BYTES): void {
    const decoded = decodeEvent(line, maxBytes);
    if (decoded instanceof InvalidEvent) return this.quarantine(line, position, decoded.reason);
    const { userId, name, sign, amount, id } = decoded;
    if (id !== undefined && sign !== 0) {
      const change = { ...decoded, id };
      const identity = Buffer.from(identityOf(change));
      const { parts, bytes } = partsOf(change);
      return this.claim(parts, bytes, identity, position, line.length, () => line);
    }
    if (this.isRefused(line, position)) return;
    if (sign !== 0) this.totals.addTo(userId, amount);
    this.points.addAmount(name, amount);
    if (sign !== 0) this.counted?.(position, decoded);
    this.events++;
  }

  quarantine(line: Uint8Array, position: number, reason: string): void {
    this.quarantined.push({ position, reason, line: shownLine(line) });
  }

  /** Notes that what begins in bytes `from` to `to` does not count. */
  leaveOut(from: number, to: number, why: string): void {
    const last = this.uncounted.at(-1);
    if (last && this.uncountedRun === this.run && to > from) last.to = to;
    else this.uncounted.push({ from, to, why });
    this.uncountedRun = this.run;
  }

  /** What is folded, to be posted together with this move of the checkpoint. */
  batch(move: Move): Batch {
    return { ...this, ...move };
  }

  /** Adds the event that the scanner found at `index` of `bytes`, which begin at `position`. */
  private addScanned(bytes: Uint8Array, index: number, position: number): void {
    const { userFrom, userTo, hash, idTo, name, sign, whole, billionths, end } = this.scanner;
    if (idTo > 0 && sign !== 0) {
      const identity = scannedIdentity(this.scanner, bytes);
      const line = () => bytes.subarray(index, end);
      return this.claim(this.scanner, bytes, identity, position + index, end - index, line);
    }
    if (this.refused.size > 0 && this.isRefused(bytes.subarray(index, end), position + index))
      return;
    if (sign !== 0)
      this.totals.addLater(bytes, userFrom, userTo, hash, sign * whole, sign * billionths);
    this.points.add(name, sign * whole, sign * billionths);
    if (sign !== 0) this.counted?.(position + index, scannedChange(this.scanner, bytes));
    this.events++;
  }

  /** Quarantines the line at `position` if Postgres refuses it. */
  private isRefused(line: Uint8Array, position: number): boolean {
    const reason = this.refused.get(position);
    if (reason === undefined) return false;
    this.quarantineRefused(line, position, reason);
    return true;
  }

  private quarantineRefused(line: Uint8Array, position: number, reason: string): void {
    this.refusals++;
    this.quarantine(line, position, reason);
  }

  /** Whether the next of the marked events counts: not if another server has stored its bytes. */
  private counts(marked: MarkedEvents, position: number, eventBytes: number): boolean {
    const { mark, postedTo, next, seen } = marked;
    if (seen >= mark.events) return true; // it is after those of the mark
    // `ends` counts from the mark's own beginning.
    const end = mark.ends ? mark.from + (mark.ends[seen] ?? 0) : next + eventBytes;
    marked.next = end + 1;
    marked.seen++;
    if (end > postedTo) return true;
    this.duplicates++;
    this.leaveOut(position, position + eventBytes, "stored by another server before");
    return false;
  }

  /** Moves a source, and returns how far it was before: what ends there or earlier has counted. */
  private moveSource({ name, from, to, digest }: SourceMark): number {
    const key = sentKey(name);
    const start = this.posted.get(key) ?? from;
    const move = this.sources.get(key) ?? { key, from: start, to: start, digest: null };
    this.sources.set(key, to >= move.to ? { ...move, to, digest } : move);
    return move.to;
  }

  /**
   * Adds an event with an id, which begins at `from` and has `lineBytes`. Its `parts` are in `bytes`. Positional,
   * because this is called for every such event.
   */
  private claim(
    parts: Parts,
    bytes: Uint8Array,
    identity: Buffer,
    from: number,
    lineBytes: number,
    lineOf: () => Uint8Array,
  ): void {
    const { userFrom, userTo, hash, idFrom, idTo, name, sign } = parts;
    const reason = this.refusal(identity, from);
    if (reason !== undefined) return this.quarantineRefused(lineOf(), from, reason);
    Bun.CryptoHasher.hash("sha256", identity, digest);
    const claimed = this.claims.claim(bytes, idFrom, idTo, digest);
    const to = from + lineBytes;
    if (claimed === "claimed") {
      const whole = sign * parts.whole;
      const billionths = sign * parts.billionths;
      const user = this.totals.add(bytes, userFrom, userTo, hash, whole, billionths);
      const point = this.points.add(name, whole, billionths);
      this.claims.describe(user, whole, billionths, from, to, this.run, point);
      this.events++;
      if (this.counted) this.counted(from, decodeEvent(lineOf(), MAX_JOURNALED_BYTES) as Change);
      return;
    }
    const event = identity.toString();
    if (claimed === "other" && !this.conflicts.has(keyedDigest(event))) {
      const { id } = JSON.parse(event) as { id: string };
      this.conflicts.set(keyedDigest(event), { id, event, from, to, run: this.run });
    } else {
      this.duplicates++;
      this.leaveOut(from, to, SAME_ID);
    }
  }

  /** Why Postgres refuses the event that begins at `from`, if it does. */
  private refusal(identity: Buffer, from: number): string | undefined {
    if (this.refused.size === 0) return undefined;
    const event = identity.toString();
    const reason = this.refused.get(from) ?? this.refusedEvents.get(event);
    if (reason !== undefined) this.refusedEvents.set(event, reason);
    return reason;
  }

  /**
   * Changes with each line that may count, now or when it is retried out of quarantine. What is left
   * out during one run can share a range.
   */
  private get run(): number {
    return this.events + this.conflicts.size + this.quarantined.length;
  }
}

/** A line as the quarantine keeps it: Postgres' text holds no NUL; what is not UTF-8 is shown as U+FFFD. */
export function shownLine(line: Uint8Array): string {
  return Buffer.from(line.subarray(0, SHOWN_BYTES)).toString().replaceAll("\0", "\ufffd");
}

/** The identity of an event with an id: two events of one identity are the same event. */
export function identityOf(change: Change & { id: string }): string {
  const { id, userId, name, sign, amount } = change;
  const value = formatAmount(sign < 0 ? -amount : amount);
  return JSON.stringify({ id, userId, name, value });
}

/** The identity of the event that the scanner found in `bytes`. It is overwritten by that of the next one. */
function scannedIdentity(scanner: Scanner, bytes: Uint8Array): Buffer {
  const { userFrom, userTo, idFrom, idTo, name, whole, billionths } = scanner;
  // What the scanner recognizes has nothing that JSON escapes; nor has a name.
  let at = put('{"id":"', 0);
  for (let i = idFrom; i < idTo; i++) scratch[at++] = bytes[i] as number;
  at = put('","userId":"', at);
  for (let i = userFrom; i < userTo; i++) scratch[at++] = bytes[i] as number;
  // Piece by piece, without a new string for each event.
  at = put('","name":"', at);
  at = put(name, at);
  at = put('","value":"', at);
  at = put(formatParts(whole, billionths), at);
  at = put('"}', at);
  return scratch.subarray(0, at);
}

/** Writes ASCII text. */
function put(text: string, at: number): number {
  for (let i = 0; i < text.length; i++) scratch[at++] = text.charCodeAt(i);
  return at;
}

/** Such parts of an event that was decoded in another way, in bytes of their own. */
function partsOf({ id, userId, name, sign, amount }: Change & { id: string }) {
  const user = Buffer.from(userId);
  const bytes = Buffer.concat([user, Buffer.from(id)]);
  const value = sign < 0 ? -amount : amount;
  const parts: Parts = {
    userFrom: 0,
    userTo: user.length,
    hash: hashOf(user, 0, user.length),
    idFrom: user.length,
    idTo: bytes.length,
    name,
    sign,
    whole: Number(value / UNITS),
    billionths: Number(value % UNITS),
  };
  return { parts, bytes };
}

/** The line of an event that has this identity. */
export function lineOf(identity: string): string {
  const { value, ...others } = JSON.parse(identity) as { value: string };
  return `${JSON.stringify(others).slice(0, -1)},"value":${value}}`;
}
