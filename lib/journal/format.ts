/**
 * The journal's format. A journal file is text, one JSON value a line:
 *
 *     {"journal":"<uuid>","base":0,"version":1}            header: which journal this is, and the
 *                                                          position of this file's first byte in it
 *     {"frame":{"bytes":N,"crc32":"0123abcd","at":<ms>}}   frame: N bytes of event lines follow,
 *     {"userId":…}                                         with their CRC-32 (zlib's, 8 hex digits)
 *     …                                                    and the time at which they were written, by
 *                                                          the server's clock, which may be wrong
 *
 * A frame is what one commit wrote; the next one is written only after it has been synced. Hence:
 * - Only the last frame can be torn: short, or with a wrong checksum. It was never acknowledged. A
 *   reader treats it as the end of the journal, and a writer truncates it.
 * - Anything unreadable with more data after it is damage to acknowledged events.
 *
 * The uuid ends in a checksum of itself: with one wrong bit it would name another journal, none of
 * whose events have been posted yet. An event line cannot be mistaken for a header: events have a
 * `userId`, headers have exactly the form above.
 */

/** The longest payload of a frame: the largest body (16 MiB) and the mark of its source fit. */
export const MAX_FRAME_BYTES = 24 * 1024 * 1024;
/** A header line is no longer. */
export const MAX_HEADER_BYTES = 128;

const { crc32 } = Bun.hash;

const LF = 10;
const JOURNAL =
  /^\{"journal":"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})","base":(\d{1,15}),"version":1\}$/;
const FRAME = /^\{"frame":\{"bytes":(\d{1,9}),"crc32":"([0-9a-f]{8})","at":(\d{1,15})\}\}$/;
/** The latest time that a frame can state: 15 digits. */
const MAX_AT_MS = 10 ** 15 - 1;
const FRAME_BEGIN = '{"frame":{"bytes":';

export interface JournalHeader {
  id: string;
  base: number;
  /** Length of the header line itself, including its newline. */
  bytes: number;
}

/**
 * A whole frame in a buffer: `header` is its first line without the newline, `payload` its event
 * lines. A frame with positions of the journal is the reader's `Frame`.
 */
export interface ParsedFrame {
  fromIndex: number;
  toIndex: number;
  header: string;
  payload: Buffer;
  /** When it was written, in milliseconds since 1970. */
  atMs: number;
}

/** Acknowledged bytes cannot be read. The message says where, and what a person can do. */
export class JournalDamage extends Error {
  constructor(path: string, offset: number, what: string, advice = REPAIR) {
    super(`${path} is damaged at byte ${offset}: ${what}; ${advice}`);
  }
}
const REPAIR = "restore it from a copy, or see bun run processor.ts --check and its --repair";

/** The journal cannot be read or opened now. The same may succeed later. */
export class JournalUnavailable extends Error {}

/**
 * The ledger has posted more than the journal holds: an older copy of the journal was restored. Events
 * accepted now would never be posted, because the checkpoint is ahead of them.
 */
export class JournalBehind extends Error {
  constructor(path: string, what: string, remedy: string) {
    super(
      `${path} is behind the ledger: ${what}. An older copy of the journal was restored: restore the newest one, or ${remedy}`,
    );
  }
}

export function encodeJournalHeader(id: string, base: number): Buffer {
  return Buffer.from(`{"journal":"${id}","base":${base},"version":1}\n`);
}

/** The id of a new journal: a UUID (version 8) whose last 8 digits are the CRC-32 of the others. */
export function newJournalId(): string {
  const random = crypto.randomUUID();
  const digits = `${random.slice(0, 14)}8${random.slice(15, 28)}`;
  return digits + hex(crc32(digits));
}

/** Whether the id is intact, as far as that can be known: ids of version 4 carry no checksum. */
function isJournalId(id: string): boolean {
  return id[14] === "4" || (id[14] === "8" && id.endsWith(hex(crc32(id.slice(0, 28)))));
}

/** Parses the header line at the start of `bytes`; `null` when there is none. */
export function parseJournalHeader(bytes: Buffer): JournalHeader | null {
  const match = JOURNAL.exec(firstLine(bytes, 0) ?? "");
  if (!match || !isJournalId(match[1] as string)) return null;
  return { id: match[1] as string, base: Number(match[2]), bytes: match[0].length + 1 };
}

/**
 * The time that a frame states, from what a clock says. A header holds 1 to 15 digits: written as it is, the
 * time of a clock before 1970 would make a frame that no reader accepts.
 */
export function toFrameTime(clockMs: number): number {
  return Math.min(Math.max(0, Math.trunc(clockMs) || 0), MAX_AT_MS);
}

/**
 * One frame of event lines, to be written by one call. `atMs` comes from `toFrameTime`. The frame is in `buffer`,
 * where it fits: a new one for each frame of 1 MiB cost a tenth of the server's time.
 */
export function encodeFrame(
  payloads: Uint8Array[],
  payloadBytes: number,
  atMs: number,
  buffer?: Buffer,
): Buffer {
  let sum = 0;
  for (const payload of payloads) sum = crc32(payload, sum);
  const header = `{"frame":{"bytes":${payloadBytes},"crc32":"${hex(sum)}","at":${atMs}}}\n`;
  const bytes = header.length + payloadBytes;
  const frame =
    buffer && buffer.length >= bytes ? buffer.subarray(0, bytes) : Buffer.allocUnsafe(bytes);
  let at = frame.write(header);
  for (const payload of payloads) {
    frame.set(payload, at);
    at += payload.length;
  }
  return frame;
}

/** What follows the whole frames at the start of a buffer. */
type Rest =
  | "nothing"
  /** A frame that is not all there (yet). */
  | "short"
  /** Something unreadable. `hasMore`: it is followed by bytes that a torn last frame cannot explain. */
  | { fault: string; hasMore: boolean };

/** Parses the whole frames at the start of `bytes`. The last of them ends at `endIndex`. */
export function parseFrames(bytes: Buffer) {
  const frames: ParsedFrame[] = [];
  let endIndex = 0;
  for (;;) {
    const frame = parseFrame(bytes, endIndex);
    if (typeof frame === "string" || "fault" in frame) return { frames, endIndex, rest: frame };
    frames.push(frame);
    endIndex = frame.toIndex;
  }
}

function parseFrame(bytes: Buffer, fromIndex: number): ParsedFrame | Rest {
  if (fromIndex === bytes.length) return "nothing";
  const line = firstLine(bytes, fromIndex);
  if (line === null && bytes.length - fromIndex < MAX_HEADER_BYTES) return "short";
  const [header, digits, sum = "", at] = FRAME.exec(line ?? "") ?? [];
  const payloadBytes = Number(digits);
  if (header === undefined || payloadBytes > MAX_FRAME_BYTES)
    return { fault: "no frame begins here", hasMore: hasFrameAfter(bytes, fromIndex) };
  const payloadIndex = fromIndex + header.length + 1;
  const toIndex = payloadIndex + payloadBytes;
  if (toIndex > bytes.length)
    return hasFrameAfter(bytes, payloadIndex)
      ? { fault: "a frame is cut short", hasMore: true }
      : "short";
  const payload = bytes.subarray(payloadIndex, toIndex);
  const found = crc32(payload);
  if (found === parseInt(sum, 16)) return { fromIndex, toIndex, header, payload, atMs: Number(at) };
  return {
    fault: `the checksum of a frame is ${hex(found)}, not ${sum}`,
    // With a wrong digit in its length it may extend to the end, across all frames after it.
    hasMore: toIndex < bytes.length || hasFrameAfter(bytes, payloadIndex),
  };
}

/** Index of the first frame header in `bytes`, at the start or after a newline; -1 if there is none. */
export function findFrame(bytes: Buffer): number {
  for (let at = bytes.indexOf(FRAME_BEGIN); at >= 0; at = bytes.indexOf(FRAME_BEGIN, at + 1)) {
    if ((at === 0 || bytes[at - 1] === LF) && FRAME.test(firstLine(bytes, at) ?? "")) return at;
  }
  return -1;
}

function hasFrameAfter(bytes: Buffer, index: number): boolean {
  return findFrame(bytes.subarray(index + 1)) >= 0;
}

/**
 * Index of the next frame after the unreadable one at `index`; -1 if there is none. A frame begins after a
 * newline, or where the header of the one before it says: its last newline may be the byte that has rotted.
 */
export function findNextFrame(bytes: Buffer, index: number): number {
  const found = findFrame(bytes.subarray(index + 1));
  const next = found < 0 ? -1 : index + 1 + found;
  const [line, payloadBytes] = FRAME.exec(firstLine(bytes, index) ?? "") ?? [];
  if (line === undefined) return next;
  const stated = index + line.length + 1 + Number(payloadBytes);
  return FRAME.test(firstLine(bytes, stated) ?? "") && (next < 0 || stated < next) ? stated : next;
}

/** Whether `bytes` contain the header of a frame, at the start of a line or not. */
export function holdsFrame(bytes: Buffer): boolean {
  return new RegExp(FRAME.source.slice(1, -1)).test(bytes.toString("latin1"));
}

/**
 * Whether a file that begins with `head` is a file of events, whatever its lines look like: only the header
 * of a journal in the first line makes it a journal, also one with damage, or with damage in its place.
 */
export function isEventFile(head: Buffer): boolean {
  if (head.length === 0 || parseJournalHeader(head)) return false;
  const [first = "", second = ""] = head.toString("latin1").split("\n");
  const parts = [/"journal":"/, /[0-9a-f]{8}(-[0-9a-f]{4}){3}-/, /"base":\d/, /,"version":1\}/];
  const isHeader = parts.filter((part) => part.test(first)).length > 1;
  if (isHeader && !first.includes('"userId"')) return false;
  const isBeforeFrame = holdsFrame(Buffer.from(first, "latin1")) || FRAME.test(second);
  return !isBeforeFrame || /^(\xef\xbb\xbf)?\s*(\{.*)?$/.test(first);
}

/** Whether a file that begins with `bytes` is a piece of a journal that begins with one of its frames. */
export function isJournalPiece(bytes: Buffer): boolean {
  if (!FRAME.test(firstLine(bytes, 0) ?? "")) return false;
  return parseFrames(bytes).frames.length > 0 || hasFrameAfter(bytes, 0);
}

/** The line that replaces lost bytes. `file` names the file that they were moved to, if there were any. */
export function encodeLost(bytes: number, file: string | null): Buffer {
  return Buffer.from(`${JSON.stringify({ lost: { bytes, file } })}\n`);
}

export function isLost(line: Uint8Array): boolean {
  return /^\{"lost":\{"bytes":\d+,"file":(null|"[^"]*")\}\} *$/.test(Buffer.from(line).toString());
}

function firstLine(bytes: Buffer, from: number): string | null {
  // Creating a view for `indexOf` takes longer than this loop over a few bytes.
  const limit = Math.min(from + MAX_HEADER_BYTES, bytes.length);
  for (let at = from; at < limit; at++)
    if (bytes[at] === LF) return bytes.toString("latin1", from, at);
  return null;
}

function hex(sum: number): string {
  return sum.toString(16).padStart(8, "0");
}
