/**
 * A source, cut into chunks that end where a line ends. Each chunk is one request to the server, with the
 * SHA-256 of the source up to the end of the chunk.
 */
import { MAX_EVENT_BYTES } from "../event/event.ts";
import {
  type Block,
  isComplete,
  MAX_LISTED_ERRORS,
  nextLine,
  type Read,
  readBlocks,
} from "../event/lines.ts";

/** Large enough that the server's sync and the round trip do not matter. */
export const CHUNK_BYTES = 1024 * 1024;
const LF = 10;

export interface Chunk {
  bytes: Uint8Array;
  start: Place;
  end: Place;
  /** Set for a part of a line that is too long to be an event; only the first part represents the line. */
  tooLong: Block["tooLong"];
}

/** A place in a source; `hash` covers all bytes before `offset`. */
export interface Place {
  offset: number;
  /** The number of the line that contains `offset`, from 1. */
  line: number;
  /** The offset at which that line begins. */
  lineFrom: number;
  hash: Bun.CryptoHasher;
}

export function startOfSource(): Place {
  return { offset: 0, line: 1, lineFrom: 0, hash: new Bun.CryptoHasher("sha256") };
}

/** SHA-256 (hex) of the bytes before `place`. */
export function digestAt(place: Place): string {
  return place.hash.copy().digest("hex");
}

/** How many lines begin between two places; a line without newline counts. */
export function countLines(from: Place, to: Place): number {
  return to.line - from.line + (to.lineFrom < to.offset ? 1 : 0);
}

/** The place after `bytes`, which begin at `place`. */
function advance({ offset, line, lineFrom, hash }: Place, bytes: Uint8Array): Place {
  for (let n = bytes.indexOf(LF); n >= 0; n = bytes.indexOf(LF, n + 1)) {
    line++;
    lineFrom = offset + n + 1;
  }
  return { offset: offset + bytes.length, line, lineFrom, hash: hash.copy().update(bytes) };
}

/**
 * Reads chunks from `start` on. A last line without newline becomes a chunk if it is a complete event and
 * the source will not grow (`isFinal`); otherwise `leftOver` is called with its number.
 */
export async function* readChunks(
  read: Read,
  start: Place,
  { isFinal, leftOver }: { isFinal: boolean; leftOver(line: number): void },
): AsyncGenerator<Chunk> {
  let place = start;
  const cut = (bytes: Uint8Array, tooLong: Chunk["tooLong"]): Chunk => {
    const chunk = { bytes, start: place, end: advance(place, bytes), tooLong };
    place = chunk.end;
    return chunk;
  };
  // The first part of such a line is stored already, and represents the line.
  const inLongLine = start.offset - start.lineFrom > MAX_EVENT_BYTES;
  for await (const block of readBlocks(read, start.offset, CHUNK_BYTES, inLongLine)) {
    const { bytes, whole, tooLong } = block;
    if (!whole && !(isFinal && isComplete(bytes))) leftOver(place.line);
    else if (tooLong) yield cut(bytes, tooLong);
    else
      for (let from = 0, to = 0; from < bytes.length; from = to) {
        to = skipLines(bytes, from, MAX_LISTED_ERRORS);
        yield cut(bytes.subarray(from, to), null);
      }
  }
}

/** The first lines of a chunk, at most `maxBytes` of them but at least one, and the rest. */
export function splitChunk(chunk: Chunk, maxBytes: number): [Chunk, Chunk | null] {
  const { bytes, start, end, tooLong } = chunk;
  if (tooLong || bytes.length <= maxBytes) return [chunk, null];
  const index = bytes.lastIndexOf(LF, maxBytes - 1) + 1 || nextLine(bytes, 0);
  if (index === bytes.length) return [chunk, null];
  const first = bytes.subarray(0, index);
  const middle = advance(start, first);
  return [
    { bytes: first, start, end: middle, tooLong },
    { bytes: bytes.subarray(index), start: middle, end, tooLong },
  ];
}

/** The index after the next `lines` lines of `bytes`. */
function skipLines(bytes: Uint8Array, from: number, lines: number): number {
  let index = from;
  for (let count = 0; count < lines && index < bytes.length; count++)
    index = nextLine(bytes, index);
  return index;
}

/**
 * What was stored last before `offset`, in chunks: at least the last two, which may have been under way at
 * once. None where no line begins. `end` is the place at `offset`, or before it if the source is no longer
 * that long.
 */
export async function lastChunks(
  read: Read,
  offset: number,
): Promise<{ chunks: Chunk[]; end: Place }> {
  // One byte more, which is a newline if chunks of full length begin after it.
  const nearOffset = Math.max(0, offset - 2 * CHUNK_BYTES - 1);
  let near = startOfSource();
  for (let from = 0; from < nearOffset; from += CHUNK_BYTES)
    near = advance(near, await read(from, Math.min(from + CHUNK_BYTES, nearOffset)));
  const bytes = await read(nearOffset, offset);
  const chunks: Chunk[] = [];
  const firstIndex = nearOffset === 0 ? 0 : nextLine(bytes, 0);
  let end = advance(near, bytes.subarray(0, firstIndex));
  for (let from = firstIndex, to = 0; from < bytes.length; from = to) {
    to = skipLines(bytes, from, MAX_LISTED_ERRORS);
    const start = end;
    end = advance(start, bytes.subarray(from, to));
    chunks.push({ bytes: bytes.subarray(from, to), start, end, tooLong: null });
  }
  return { chunks, end };
}
