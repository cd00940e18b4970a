/**
 * Files of events: one event a line, ended by LF or CRLF. A BOM at the start, blank lines and a last
 * line without newline are valid.
 */
import type { FileHandle } from "node:fs/promises";

import { decodeEvent, InvalidEvent, MAX_EVENT_BYTES } from "./event.ts";
import type { Scanner } from "./scanner.ts";

/** How many rejected lines the server lists in an answer at most. */
export const MAX_LISTED_ERRORS = 20_000;
/** How many bytes of a bad line are kept, to show it. */
export const SHOWN_BYTES = 4096;

const LF = 10;
const CR = 13;

/**
 * Receives a line without its newline and the white space around it. `index` is where it begins in the
 * buffer, `number` counts all lines of the buffer from 1, `next` is the index after its newline.
 */
type VisitLine = (line: Uint8Array, index: number, number: number, next: number) => void;

/**
 * Calls `visit` for each line of `bytes` that is not blank; a last line without newline counts. A line
 * of more than `maxBytes`, its blanks included but not its LF or CRLF, is not trimmed: it may be a part of
 * a longer line, and white space with an event at its end must not pass for an event.
 */
export function eachLine(bytes: Uint8Array, visit: VisitLine, maxBytes = MAX_EVENT_BYTES): void {
  for (let from = 0, number = 1; from < bytes.length; number++)
    from = visitLine(bytes, from, { number, visit, maxBytes });
}

/** Where a line begins in a buffer, and its number. */
export interface LinePlace {
  index: number;
  number: number;
}

/** What a line costs that the scanner leaves to others, in bytes that it scans: measured, rounded up. */
const LINE_WORK = 256;
const BYTE_WORK = 16;

/**
 * Like eachLine, but calls `scanned` for the events that `scanner` recognizes, with the index of the
 * event's first byte and the number of its line; the event itself is in `scanner`.
 */
export function eachEvent(
  bytes: Uint8Array,
  scanner: Scanner,
  scanned: (index: number, number: number) => void,
  visit: VisitLine,
  maxBytes = MAX_EVENT_BYTES,
): void {
  const start = { index: 0, number: 1 };
  eachEventFrom(start, { bytes, scanner, scanned, visit, maxBytes, maxWork: Infinity });
}

/**
 * The same from a place on, until `maxWork` is done: one for each byte of a scanned event, and more for
 * other lines. Returns where to continue, with an index at the end of `bytes` when there is no more.
 */
export function eachEventFrom(
  { index, number }: LinePlace,
  options: {
    bytes: Uint8Array;
    scanner: Scanner;
    scanned(index: number, number: number): void;
    visit: VisitLine;
    maxBytes: number;
    maxWork: number;
  },
): LinePlace {
  const { bytes, scanner, scanned, visit, maxBytes, maxWork } = options;
  for (let from = index, work = 0; ; number++) {
    if (from >= bytes.length || work >= maxWork) return { index: from, number };
    const next = scanner.scan(bytes, from);
    if (next > 0) {
      scanned(from, number);
      work += next - from;
      from = next;
    } else {
      const begin = from;
      from = visitLine(bytes, from, { number, visit, maxBytes });
      work += LINE_WORK + BYTE_WORK * Math.min(from - begin, maxBytes);
    }
  }
}

/** Visits the line that begins at `from`. Returns the index of the next line. */
function visitLine(
  bytes: Uint8Array,
  from: number,
  { number, visit, maxBytes }: { number: number; visit: VisitLine; maxBytes: number },
): number {
  const next = nextLine(bytes, from);
  let start = from;
  while (start < next && isBlank(bytes[start] as number)) start++;
  if (start === next) return next;
  if (lineBytes(bytes, from, next) > maxBytes) {
    visit(bytes.subarray(from, next), from, number, next);
    return next;
  }
  let end = next;
  while (isBlank(bytes[end - 1] as number)) end--;
  visit(bytes.subarray(start, end), start, number, next);
  return next;
}

function isBlank(byte: number): boolean {
  return byte === LF || byte === 32 || byte === CR || byte === 9;
}

/** The length of the line from `from` to `next`, without its LF or CRLF. */
function lineBytes(bytes: Uint8Array, from: number, next: number): number {
  if (bytes[next - 1] !== LF) return next - from;
  return next - from - (bytes[next - 2] === CR && next - 2 >= from ? 2 : 1);
}

/** The index after the newline of the line that contains `from`, or the end of `bytes`. */
export function nextLine(bytes: Uint8Array, from: number): number {
  const newline = bytes.indexOf(LF, from);
  return newline < 0 ? bytes.length : newline + 1;
}

/** Whether the bytes after a file's last newline can be stored: a complete event, or only white space. */
export function isComplete(lastLine: Uint8Array): boolean {
  let complete = true;
  eachLine(withoutBom(lastLine), (line) => {
    complete = !(decodeEvent(line) instanceof InvalidEvent);
  });
  return complete;
}

/** The bytes without a byte order mark at their start. */
export function withoutBom(bytes: Uint8Array): Uint8Array {
  return bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf ? bytes.subarray(3) : bytes;
}

/**
 * Returns the bytes between two offsets of a file or stream, fewer only at its end. Successive calls
 * never go back to before `from`.
 */
export type Read = (from: number, to: number) => Promise<Uint8Array>;

/** Reads the file at its path. */
export function readFile(file: Bun.BunFile): Read {
  return (from, to) => file.slice(from, to).bytes();
}

/** Like readFile, but reads the opened file, even when another file has its name now. */
export function readHandle(handle: FileHandle): Read {
  return async (from, to) => {
    const bytes = Buffer.allocUnsafe(Math.max(0, to - from));
    let length = 0;
    while (length < bytes.length) {
      const left = bytes.length - length;
      const { bytesRead } = await handle.read(bytes, length, left, from + length);
      if (bytesRead === 0) break;
      length += bytesRead;
    }
    return bytes.subarray(0, length);
  };
}

/** Reads a stream. Holds only the bytes from the last `from` on. */
export function readStream(stream: AsyncIterable<Uint8Array>): Read {
  const chunks = stream[Symbol.asyncIterator]();
  let held: Uint8Array = new Uint8Array();
  let heldFrom = 0;
  return async (from, to) => {
    const parts = [held.subarray(from - heldFrom)];
    let length = held.length - (from - heldFrom);
    while (length < to - from) {
      const { value, done } = await chunks.next();
      if (done) break;
      parts.push(value);
      length += value.length;
    }
    held = Buffer.concat(parts, length);
    heldFrom = from;
    return held.subarray(0, to - from);
  };
}

/**
 * Bytes `from` to `to` of a file, cut at the end of a line. `whole` is false only for the bytes after
 * the last newline. A line that is too long to be an event comes in parts, each of which is itself too
 * long to be an event; its first part represents the line.
 */
export interface Block {
  bytes: Uint8Array;
  from: number;
  to: number;
  whole: boolean;
  tooLong: null | "first part" | "further part";
}

/**
 * Reads lines from offset `from` to the end, in blocks of about `blockBytes`. Holds at most twice that,
 * however long the lines are. `inLongLine`: `from` is inside a line that is too long.
 */
export async function* readBlocks(
  read: Read,
  from: number,
  blockBytes: number,
  inLongLine = false,
): AsyncGenerator<Block> {
  const blockSize = Math.max(blockBytes, 4 * MAX_EVENT_BYTES);
  let inLine: null | "further part" = inLongLine ? "further part" : null;
  for (let offset = from; ;) {
    const bytes = await read(offset, offset + blockSize);
    if (bytes.length === 0) return;
    const atEnd = bytes.length < blockSize;
    const newline = inLine ? bytes.indexOf(LF) : bytes.lastIndexOf(LF);
    let end = newline + 1;
    let tooLong: Block["tooLong"] = inLine;
    if (newline >= 0) inLine = null;
    else if (inLine || !atEnd) {
      tooLong ??= "first part";
      inLine = atEnd ? null : "further part";
      // The bytes held back make the last part too long as well, wherever the line ends.
      end = atEnd ? bytes.length : bytes.length - 2 * MAX_EVENT_BYTES;
    }
    const whole = end > 0;
    if (!whole) end = bytes.length;
    yield { bytes: bytes.subarray(0, end), from: offset, to: offset + end, whole, tooLong };
    // What is appended to the file later continues this line, so no block begins after it.
    if (!whole) return;
    offset += end;
  }
}

/** Gives the items of a generator, each after the one that follows it was asked for. */
export async function* readAhead<T>(items: AsyncGenerator<T>): AsyncGenerator<T> {
  const ask = () => {
    const item = items.next();
    item.catch(() => {}); // awaited in its turn
    return item;
  };
  let next = ask();
  try {
    for (;;) {
      const { value, done } = await next;
      if (done) return;
      next = ask();
      yield value;
    }
  } finally {
    await next.catch(() => {}); // what it reads may be closed after this
  }
}
