/**
 * Files of events: one event a line, LF or CRLF, a BOM at the start, blank lines and a last line
 * without newline are all fine.
 */
import type { FileHandle } from "node:fs/promises";

import { decodeEvent, MAX_EVENT_BYTES, InvalidEvent } from "./event.ts";
import type { Scanner } from "./scanner.ts";

/** As many bad lines an answer of the server lists when it is asked to. */
export const MAX_LISTED_ERRORS = 20_000;

const LF = 10;
const BLANK = new Set([9, 13, 32]);

/**
 * Calls `visit` for each line of `bytes` that is not blank, without its newline and the white
 * space around it; `at` is the offset of the line's first byte, `number` counts all lines from 1,
 * `next` is the offset behind its newline. A last line without newline is a line. One that is too
 * long to be an event stays as it is: white space and an event may be the end of a longer one.
 */
export function eachLine(
  bytes: Uint8Array,
  visit: (line: Uint8Array, at: number, number: number, next: number) => void,
): void {
  for (let from = 0, number = 1; from < bytes.length; number++)
    from = visitLine(bytes, from, number, visit);
}

/**
 * The same, but events that `scanner` takes go to `scanned`, which finds them there: `at` is the offset
 * of the event's first byte, `number` its line's. All other lines go to `visit`.
 */
export function eachEvent(
  bytes: Uint8Array,
  scanner: Scanner,
  scanned: (at: number, number: number) => void,
  visit: (line: Uint8Array, at: number, number: number, next: number) => void,
): void {
  for (let from = 0, number = 1; from < bytes.length; number++) {
    const next = scanner.scan(bytes, from);
    if (next > 0) scanned(from, number);
    from = next > 0 ? next : visitLine(bytes, from, number, visit);
  }
}

/** Visits the line that begins at `from`; returns where the next one begins. */
function visitLine(
  bytes: Uint8Array,
  from: number,
  number: number,
  visit: (line: Uint8Array, at: number, number: number, next: number) => void,
): number {
  const newline = bytes.indexOf(LF, from);
  const next = newline < 0 ? bytes.length : newline + 1;
  let start = from;
  let end = newline < 0 ? next : newline;
  while (end > start && BLANK.has(bytes[end - 1] as number)) end--;
  while (start < end && BLANK.has(bytes[start] as number)) start++;
  const isTooLong = next - from > MAX_EVENT_BYTES + 2;
  if (end > start && isTooLong) visit(bytes.subarray(from, next), from, number, next);
  else if (end > start) visit(bytes.subarray(start, end), start, number, next);
  return next;
}

/** How many lines `bytes` has, the last one without newline included. */
export function countLines(bytes: Uint8Array): number {
  let count = 0;
  for (let from = 0; from < bytes.length; count++) {
    const newline = bytes.indexOf(LF, from);
    from = newline < 0 ? bytes.length : newline + 1;
  }
  return count;
}

/** Whether what follows the last newline of a file can be taken: a whole event, or nothing but blanks. */
export function isComplete(lastLine: Uint8Array): boolean {
  let complete = true;
  eachLine(withoutBom(lastLine), (line) => {
    complete = !(decodeEvent(line) instanceof InvalidEvent);
  });
  return complete;
}

/** The same bytes without a byte order mark. */
export function withoutBom(bytes: Uint8Array): Uint8Array {
  return bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf ? bytes.subarray(3) : bytes;
}

/**
 * Bytes `from` to `to` of a file, which end where a line ends. `whole` is false only for what
 * follows the last newline. A line that is too long to be an event comes in parts, each of which is
 * itself too long to be one; the first stands for the line.
 */
export interface Block {
  bytes: Uint8Array;
  from: number;
  to: number;
  whole: boolean;
  tooLong: null | "first part" | "further part";
}

/** How many bytes of a line are kept to show it. */
export const SHOWN_BYTES = 4096;

/** Bytes `from` to `to` of something, fewer only at its end. Callers go forward. */
export type Read = (from: number, to: number) => Promise<Uint8Array>;

export function readFile(file: Bun.BunFile): Read {
  return (from, to) => file.slice(from, to).bytes();
}

/** The same of a file that stays the one that was opened, whatever takes its name. */
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

/** Reads a stream, keeping no more than what was read and not passed yet. */
export function readStream(stream: ReadableStream<Uint8Array>): Read {
  const chunks = stream.getReader();
  let kept: Uint8Array = new Uint8Array();
  let keptFrom = 0;
  return async (from, to) => {
    const parts = [kept.subarray(from - keptFrom)];
    let bytes = (parts[0] as Uint8Array).length;
    while (bytes < to - from) {
      const { value, done } = await chunks.read();
      if (done) break;
      parts.push(value);
      bytes += value.length;
    }
    kept = Buffer.concat(parts, bytes);
    keptFrom = from;
    return kept.subarray(0, to - from);
  };
}

/**
 * Reads lines from byte `from` to the end in blocks of about `blockBytes`, in memory bounded by
 * twice that, whatever the lines are. `inLongLine`: `from` is in a line that is too long.
 */
export async function* readBlocks(
  read: Read,
  from: number,
  blockBytes: number,
  inLongLine = false,
): AsyncGenerator<Block> {
  const blockSize = Math.max(blockBytes, 4 * MAX_EVENT_BYTES);
  let inLine: null | "further part" = inLongLine ? "further part" : null;
  for (let at = from; ;) {
    const bytes = await read(at, at + blockSize);
    if (bytes.length === 0) return;
    const atEnd = bytes.length < blockSize;
    const newline = inLine ? bytes.indexOf(LF) : bytes.lastIndexOf(LF);
    let end = newline + 1;
    let tooLong: Block["tooLong"] = inLine;
    if (newline >= 0) inLine = null;
    else if (inLine || !atEnd) {
      tooLong ??= "first part";
      inLine = atEnd ? null : "further part";
      // What is held back makes the last part too long as well, wherever the line ends.
      end = atEnd ? bytes.length : bytes.length - 2 * MAX_EVENT_BYTES;
    }
    const whole = end > 0;
    if (!whole) end = bytes.length;
    yield { bytes: bytes.subarray(0, end), from: at, to: at + end, whole, tooLong };
    // Whatever the file grows by from here on continues this line: nothing to go on with.
    if (!whole) return;
    at += end;
  }
}
