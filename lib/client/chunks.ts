/**
 * A source cut into chunks that end where a line ends. Each is one request to the server, with the
 * SHA-256 of the source up to its end.
 */
import { MAX_EVENT_BYTES } from "../event/event.ts";
import {
  type Block,
  countLines,
  isComplete,
  MAX_LISTED_ERRORS,
  type Read,
  readBlocks,
} from "../event/lines.ts";

/** Large enough that its sync and its round trip do not matter. */
export const CHUNK_BYTES = 1024 * 1024;
const LF = 10;

/** Bytes `from` to `to` of the source. */
export interface Chunk {
  bytes: Uint8Array;
  from: number;
  to: number;
  /** The number of its first line in the source, from 1. */
  firstLine: number;
  /** SHA-256 (hex) of the bytes before `to`. */
  digest: string;
  /** Where the next chunk begins. */
  end: Place;
  /** Set for a part of a line that is too long to be an event; only the first part stands for the line. */
  tooLong: Block["tooLong"];
}

/** A place in a source; `hash` is of all bytes before `offset`. */
export interface Place {
  offset: number;
  line: number;
  /** Where that line begins: before `offset` when part of it has been stored. */
  lineFrom: number;
  hash: Bun.CryptoHasher;
}

export function startOfSource(): Place {
  return { offset: 0, line: 1, lineFrom: 0, hash: new Bun.CryptoHasher("sha256") };
}

/**
 * Reads chunks from `start` on. A last line without newline is a chunk if it is a complete event and
 * the source will not grow (`isFinal`); otherwise `leftOver` gets its number.
 */
export async function* readChunks(
  read: Read,
  start: Place,
  { isFinal, leftOver }: { isFinal: boolean; leftOver(line: number): void },
): AsyncGenerator<Chunk> {
  let place = start;
  const cut = (bytes: Uint8Array, lines: number, tooLong: Chunk["tooLong"]): Chunk => {
    const { offset: from, line: firstLine } = place;
    const to = from + bytes.length;
    const lineFrom = bytes.includes(LF) ? from + bytes.lastIndexOf(LF) + 1 : place.lineFrom;
    const hash = place.hash.copy().update(bytes);
    place = { offset: to, line: firstLine + lines, lineFrom, hash };
    const digest = hash.copy().digest("hex");
    return { bytes, from, to, firstLine, digest, end: place, tooLong };
  };
  // The beginning of such a line is stored, and stands for it.
  const inLongLine = start.offset - start.lineFrom > MAX_EVENT_BYTES;
  for await (const block of readBlocks(read, start.offset, CHUNK_BYTES, inLongLine)) {
    const { bytes, whole, tooLong } = block;
    if (!whole && !(isFinal && isComplete(bytes))) leftOver(place.line);
    else if (tooLong) yield cut(bytes, bytes.at(-1) === LF ? 1 : 0, tooLong);
    else
      for (let from = 0; from < bytes.length;) {
        const part = bytes.subarray(from, endOfLines(bytes, from, MAX_LISTED_ERRORS));
        yield cut(part, countLines(part), null);
        from += part.length;
      }
  }
}

/** The index behind the next `lines` lines of `bytes`. */
function endOfLines(bytes: Uint8Array, from: number, lines: number): number {
  let end = from;
  for (let count = 0; count < lines && end < bytes.length; count++) {
    const newline = bytes.indexOf(LF, end);
    end = newline < 0 ? bytes.length : newline + 1;
  }
  return end;
}

/** Reads the bytes from `start` to `offset`, and returns the place there. */
export async function advance(read: Read, start: Place, offset: number): Promise<Place> {
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
 * What was stored last before `offset`: the last chunk, and perhaps some lines before it, no more than
 * a chunk may have. Returns it with the place at `offset`; the chunk is `null` when no line begins in it.
 */
export async function lastChunk(
  read: Read,
  offset: number,
): Promise<{ chunk: Chunk | null; end: Place }> {
  // One byte more, which is a newline when a chunk of full length begins behind it.
  const near = await advance(read, startOfSource(), Math.max(0, offset - CHUNK_BYTES - 1));
  const end = await advance(read, near, offset);
  const bytes = await read(near.offset, offset);
  const isStart = near.offset === 0;
  const firstIndex = isStart ? 0 : bytes.indexOf(LF) + 1;
  if (!isStart && firstIndex === 0) return { chunk: null, end };
  const extraLines = Math.max(0, countLines(bytes.subarray(firstIndex)) - MAX_LISTED_ERRORS);
  const index = endOfLines(bytes, firstIndex, extraLines);
  const chunk: Chunk = {
    bytes: bytes.subarray(index),
    from: near.offset + index,
    to: offset,
    firstLine: near.line + (isStart ? 0 : 1) + extraLines,
    digest: end.hash.copy().digest("hex"),
    end,
    tooLong: null,
  };
  return { chunk, end };
}
