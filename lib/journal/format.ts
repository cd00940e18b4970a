/**
 * The journal's format. A journal file is text, one JSON value a line:
 *
 *     {"journal":"<uuid>","base":0,"version":1}            header: which journal, and the position
 *                                                          of this file's first byte in it
 *     {"frame":{"bytes":N,"crc32":"0123abcd","at":<ms>}}   frame: N bytes of event lines follow,
 *     {"userId":…}                                         with their CRC-32 (zlib's, 8 hex digits)
 *     …                                                    and when they were written
 *
 * A frame is what one commit wrote; the next is written only when it is synced. Hence:
 * - at most one frame, the last, can be torn: short, or with a checksum that does not fit. It was
 *   never acknowledged. A reader takes it for the end of the journal, a writer cuts it off;
 * - anything unreadable that has more behind it is damage to what was acknowledged.
 * The uuid ends in a checksum of itself: by one wrong bit the journal would be another one, all of
 * whose events the ledger has not posted yet.
 * An event line is never taken for a header: events have a `userId`, headers have the exact form.
 */

/** One frame holds at most this much: the largest body that is taken (16 MiB), its mark, some room. */
export const MAX_FRAME_BYTES = 24 * 1024 * 1024;
/** No header line is longer. */
export const MAX_HEADER_BYTES = 128;

const { crc32 } = Bun.hash;

const LF = 10;
const JOURNAL =
  /^\{"journal":"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})","base":(\d{1,15}),"version":1\}$/;
const FRAME = /^\{"frame":\{"bytes":(\d{1,9}),"crc32":"([0-9a-f]{8})","at":(\d{1,15})\}\}$/;
const FRAME_BEGIN = '{"frame":{"bytes":';

export interface JournalHeader {
  id: string;
  base: number;
  /** Length of the header line itself, its newline included. */
  bytes: number;
}

/**
 * A whole frame: `header` is its first line, without the newline, `payload` holds its event lines;
 * `from` and `to` are offsets in what was read.
 */
export interface Frame {
  from: number;
  to: number;
  header: string;
  payload: Buffer;
}

/** Bytes that were acknowledged cannot be read. Says where, and what a person can do. */
export class JournalDamage extends Error {
  constructor(path: string, at: number, what: string) {
    super(
      `${path} is damaged at byte ${at}: ${what}; restore it from a copy, or see bun run processor.ts --check, which --repair mends`,
    );
  }
}

/**
 * The ledger has posted more than the journal holds: an older copy of the journal was put back. What it
 * accepted now would never be posted, because the checkpoint is ahead of it.
 */
export class JournalBehind extends Error {
  constructor(path: string, what: string) {
    super(
      `${path} is behind the ledger: ${what}. An older copy of the journal was put back: restore the newest ` +
        "one, or stop the server and run bun run processor.ts --check --repair, which marks what is missing as lost",
    );
  }
}

export function encodeJournalHeader(id: string, base: number): Buffer {
  return Buffer.from(`{"journal":"${id}","base":${base},"version":1}\n`);
}

/** A name for a new journal: a UUID (version 8) whose last 8 digits are the CRC-32 of the others. */
export function newJournalId(): string {
  const random = crypto.randomUUID();
  const digits = `${random.slice(0, 14)}8${random.slice(15, 28)}`;
  return digits + hex(crc32(digits));
}

/** Whether nothing shows that it is not as it was given; of other versions than 8 nothing can. */
function isJournalId(id: string): boolean {
  return id[14] === "4" || (id[14] === "8" && id.endsWith(hex(crc32(id.slice(0, 28)))));
}

/** Reads the header line that `bytes` begins with, or `null` when there is none. */
export function parseJournalHeader(bytes: Buffer): JournalHeader | null {
  const match = JOURNAL.exec(firstLine(bytes, 0) ?? "");
  if (!match || !isJournalId(match[1] as string)) return null;
  return { id: match[1] as string, base: Number(match[2]), bytes: match[0].length + 1 };
}

/** One frame of event lines, ready to be written by one call. */
export function encodeFrame(payloads: Uint8Array[], payloadBytes: number, at: number): Buffer {
  let sum = 0;
  for (const payload of payloads) sum = crc32(payload, sum);
  const header = `{"frame":{"bytes":${payloadBytes},"crc32":"${hex(sum)}","at":${at}}}\n`;
  return Buffer.concat([Buffer.from(header), ...payloads], header.length + payloadBytes);
}

/** When the frame of this header line was written. */
export function frameTime(header: string): number {
  return Number(FRAME.exec(header)?.[3]);
}

/**
 * Reads the whole frames that `bytes` begins with. `end` is where the last of them ends; `rest`
 * says what follows: nothing, a frame that is not all there (yet), or something unreadable, in
 * words. `behind` tells whether bytes follow that an unreadable last frame cannot explain.
 */
export function parseFrames(bytes: Buffer): {
  frames: Frame[];
  end: number;
  rest: "nothing" | "short" | { fault: string; behind: boolean };
} {
  const frames: Frame[] = [];
  let end = 0;
  for (;;) {
    if (end === bytes.length) return { frames, end, rest: "nothing" };
    const line = firstLine(bytes, end);
    if (line === null && bytes.length - end < MAX_HEADER_BYTES)
      return { frames, end, rest: "short" };
    const match = FRAME.exec(line ?? "");
    const payloadBytes = Number(match?.[1]);
    if (!match || payloadBytes > MAX_FRAME_BYTES)
      return fault("no frame begins here", frameBeginsAfter(bytes, end));
    const from = end + match[0].length + 1;
    const to = from + payloadBytes;
    if (to > bytes.length)
      return frameBeginsAfter(bytes, from) ? fault("a frame is cut short", true) : short();
    const payload = bytes.subarray(from, to);
    const sum = crc32(payload);
    if (sum !== parseInt(match[2] as string, 16))
      return fault(
        `the checksum of a frame is ${hex(sum)}, not ${match[2]}`,
        // With a wrong digit in its length it may reach to the end over all the frames behind it.
        to < bytes.length || frameBeginsAfter(bytes, from),
      );
    frames.push({ from: end, to, header: match[0], payload });
    end = to;
  }
  function short() {
    return { frames, end, rest: "short" as const };
  }
  function fault(what: string, behind: boolean) {
    return { frames, end, rest: { fault: what, behind } };
  }
}

/** Where the first frame header in `bytes` begins, at the start or after a newline; -1: nowhere. */
export function findFrame(bytes: Buffer): number {
  for (let at = bytes.indexOf(FRAME_BEGIN); at >= 0; at = bytes.indexOf(FRAME_BEGIN, at + 1)) {
    if ((at === 0 || bytes[at - 1] === LF) && FRAME.test(firstLine(bytes, at) ?? "")) return at;
  }
  return -1;
}

function frameBeginsAfter(bytes: Buffer, at: number): boolean {
  return findFrame(bytes.subarray(at + 1)) >= 0;
}

/**
 * Where the next frame begins behind the one at `at`, which cannot be read; -1: nowhere. That is behind a
 * newline, or where the header of the one at `at` says: it may be its last newline that has rotted.
 */
export function findNextFrame(bytes: Buffer, at: number): number {
  const found = findFrame(bytes.subarray(at + 1));
  const next = found < 0 ? -1 : at + 1 + found;
  const [line, payloadBytes] = FRAME.exec(firstLine(bytes, at) ?? "") ?? [];
  if (line === undefined) return next;
  const told = at + line.length + 1 + Number(payloadBytes);
  return FRAME.test(firstLine(bytes, told) ?? "") && (next < 0 || told < next) ? told : next;
}

/** Whether there is the header of a frame in `bytes`, whatever is before it. */
export function holdsFrame(bytes: Buffer): boolean {
  return new RegExp(FRAME.source.slice(1, -1)).test(bytes.toString("latin1"));
}

/** The line that stands in the place of bytes that are lost; `file` has them now, if there were any. */
export function encodeLost(bytes: number, file: string | null): Buffer {
  return Buffer.from(`${JSON.stringify({ lost: { bytes, file } })}\n`);
}

export function isLost(line: Uint8Array): boolean {
  return /^\{"lost":\{"bytes":\d+,"file":(null|"[^"]*")\}\} *$/.test(Buffer.from(line).toString());
}

function firstLine(bytes: Buffer, from: number): string | null {
  // To make a view for `indexOf` takes longer than to look through these few bytes.
  const limit = Math.min(from + MAX_HEADER_BYTES, bytes.length);
  for (let at = from; at < limit; at++)
    if (bytes[at] === LF) return bytes.toString("latin1", from, at);
  return null;
}

function hex(sum: number): string {
  return sum.toString(16).padStart(8, "0");
}
