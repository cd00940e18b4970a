/**
 * A source cut into chunks that end where a line ends, each one request to the server, with the
 * SHA-256 of the source up to its end.
 */
import { MAX_EVENT_BYTES } from "../event/event.ts";
import {
  type Block,
  countLines,
  MAX_LISTED_ERRORS,
  type Read,
  readBlocks,
  isComplete,
} from "../event/lines.ts";

/** Large enough that its sync and its round trip do not count. */
export const CHUNK_BYTES = 1024 * 1024;
const LF = 10;

/** Bytes `from` to `to` of the source. */
export interface Chunk {
  bytes: Uint8Array;
  from: number;
  to: number;
  /** The number of its first line in the source, from 1. */
  firstLine: number;
  /** SHA-256 of the bytes before `to`. */
  digest: string;
  /** Where the next chunk begins. */
  end: Start;
  /** Part of one line that is too long to be an event; only the first part stands for it. */
  tooLong: Block["tooLong"];
}

/** Where reading begins: `hash` is of all the bytes before `offset`. */
export interface Start {
  offset: number;
  line: number;
  /** Where that line begins: before `offset` when part of it has been taken. */
  lineFrom: number;
  hash: Bun.CryptoHasher;
}

export function begin(): Start {
  return { offset: 0, line: 1, lineFrom: 0, hash: new Bun.CryptoHasher("sha256") };
}

/**
 * Reads chunks from `start` on. A last line without newline is a chunk if it is a whole event and
 * the source will not grow (`final`); else `leftOver` is told of it.
 */
export async function* readChunks(
  read: Read,
  start: Start,
  final: boolean,
  leftOver: (line: number) => void,
): AsyncGenerator<Chunk> {
  let at = start;
  const cut = (bytes: Uint8Array, lines: number, tooLong: Chunk["tooLong"]): Chunk => {
    const { offset: from, line: firstLine } = at;
    const to = from + bytes.length;
    const lineFrom = bytes.includes(LF) ? from + bytes.lastIndexOf(LF) + 1 : at.lineFrom;
    const hash = at.hash.copy().update(bytes);
    at = { offset: to, line: firstLine + lines, lineFrom, hash };
    const digest = at.hash.copy().digest("hex");
    return { bytes, from, to, firstLine, digest, end: at, tooLong };
  };
  // The beginning of such a line was taken, and stands for it.
  const inLongLine = start.offset - start.lineFrom > MAX_EVENT_BYTES;
  for await (const block of readBlocks(read, start.offset, CHUNK_BYTES, inLongLine)) {
    const { bytes, whole, tooLong } = block;
    if (!whole && !(final && isComplete(bytes))) {
      leftOver(at.line);
    } else if (tooLong) {
      yield cut(bytes, bytes.at(-1) === LF ? 1 : 0, tooLong);
    } else {
      for (let from = 0; from < bytes.length;) {
        const end = endOfLines(bytes, from, MAX_LISTED_ERRORS);
        const part = bytes.subarray(from, end);
        yield cut(part, countLines(part), null);
        from = end;
      }
    }
  }
}

function endOfLines(bytes: Uint8Array, from: number, lines: number): number {
  let end = from;
  for (let count = 0; count < lines && end < bytes.length; count++) {
    const newline = bytes.indexOf(LF, end);
    end = newline < 0 ? bytes.length : newline + 1;
  }
  return end;
}

/** Goes over the bytes from `start` to `offset`, and returns where that is. */
export async function advance(read: Read, start: Start, offset: number): Promise<Start> {
  const hash = start.hash.copy();
  let { line, lineFrom } = start;
  for (let at = start.offset; at < offset; at += CHUNK_BYTES) {
    const bytes = await read(at, Math.min(at + CHUNK_BYTES, offset));
    hash.update(bytes);
    for (let n = bytes.indexOf(LF); n >= 0; n = bytes.indexOf(LF, n + 1)) {
      line++;
      lineFrom = at + n + 1;
    }
  }
  return { offset, line, lineFrom, hash };
}

/**
 * What was taken last before `end`, from the first line that begins in there: the last chunk, and
 * perhaps some before it, of no more lines than a chunk may have. Returns it with where `end` is, or
 * no chunk when no line begins there.
 */
export async function lastChunk(
  read: Read,
  start: Start,
  offset: number,
): Promise<{ chunk: Chunk | null; start: Start }> {
  // One byte more, which is a newline when a chunk of the full length begins behind it.
  const near = await advance(read, start, Math.max(start.offset, offset - CHUNK_BYTES - 1));
  const end = await advance(read, near, offset);
  const bytes = await read(near.offset, offset);
  let skip = near.offset === 0 ? 0 : bytes.indexOf(LF) + 1;
  if (near.offset > 0 && skip === 0) return { chunk: null, start: end };
  let firstLine = near.line + (near.offset === 0 ? 0 : 1);
  const tooMany = Math.max(0, countLines(bytes.subarray(skip)) - MAX_LISTED_ERRORS);
  skip = endOfLines(bytes, skip, tooMany);
  firstLine += tooMany;
  const chunk: Chunk = {
    bytes: bytes.subarray(skip),
    from: near.offset + skip,
    to: offset,
    firstLine,
    digest: end.hash.copy().digest("hex"),
    end,
    tooLong: null,
  };
  return { chunk, start: end };
}
