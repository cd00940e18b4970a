/**
 * A file or stream of events as it is found: plain, or compressed with gzip or zstd, recognized by its first
 * bytes. Offsets count the bytes of the events, whether they are compressed or not. NULs at the end of a
 * file, as a crash leaves them, are not read.
 */
import { open } from "node:fs/promises";
import { basename } from "node:path";
import { pipeline, Readable } from "node:stream";
import { createGunzip, createZstdDecompress } from "node:zlib";

import { type Foreign, foreignFormat, HEAD_BYTES } from "./formats.ts";
import { type Read, readHandle, readStream } from "./lines.ts";
import { openFrameWalk } from "./zstd-frames.ts";

const BLOCK_BYTES = 256 * 1024;
const NAMES = { gzip: /\.gz$/i, zstd: /\.zst$/i };

type Compression = keyof typeof NAMES;

export interface Input {
  compression: Compression | null;
  /** Reads up to the NULs at the end. */
  read: Read;
  /** Reads them too: an earlier version has stored those of some files. */
  readAll: Read;
  /** About how many bytes of the file, as it is on the disk, hold the events up to `offset`. */
  fileOffset(offset: number): number;
  /** How many NULs are at the end of the file, which ends at `to`, after `from`. */
  countNuls(from: number, to: number): Promise<number>;
}

/** A compressed file is damaged: what follows cannot be read. */
export class DamagedInput extends Error {}

/** The events in a file. */
export async function openInput(raw: Read): Promise<Input> {
  const compression = compressionOf(await raw(0, 4));
  if (!compression)
    return {
      ...{ compression, read: withoutNulTail(raw), readAll: raw },
      fileOffset: (offset) => offset,
      countNuls: (from, to) => countNuls(raw, from, to),
    };
  let readTo = 0;
  async function* blocks() {
    for (let from = 0; ; from = readTo) {
      const block = await raw(from, from + BLOCK_BYTES);
      if (block.length === 0) return;
      readTo = from + block.length;
      yield block;
    }
  }
  const decompressed = rereadable(() => decompress(blocks(), compression));
  let decompressedTo = 1;
  const read: Read = async (from, to) => {
    const bytes = await decompressed(from, to);
    decompressedTo = Math.max(decompressedTo, from + bytes.length);
    return bytes;
  };
  const fileOffset = (offset: number) => Math.floor((readTo * offset) / decompressedTo);
  return { compression, read, readAll: read, fileOffset, countNuls: async () => 0 };
}

/** The events in a stream, and its first bytes. */
export async function openStreamInput(stream: AsyncIterable<Uint8Array>) {
  const raw = readStream(stream);
  const compression = compressionOf(await raw(0, 4));
  async function* blocks() {
    for (let from = 0; ;) {
      const block = await raw(from, from + BLOCK_BYTES);
      if (block.length === 0) return;
      from += block.length;
      yield block;
    }
  }
  const read = compression ? readStream(decompress(blocks(), compression)) : raw;
  return { compression, read };
}

/** What `path` is, if it is not lines of events, with the command that converts it; and its name as a source. */
export async function inspectFile(path: string): Promise<{
  problem: string | null;
  name: string;
  compression: Compression | null;
  head: Buffer;
}> {
  await using handle = await open(path);
  const { compression, read } = await openInput(readHandle(handle));
  // What is damaged is reported when it is read to its end.
  const head = await read(0, HEAD_BYTES).catch(() => new Uint8Array());
  const foreign = foreignFormat(head);
  const problem = foreign && explainForeign(foreign, { path, compression });
  return { problem, name: sourceName(path, compression), compression, head: Buffer.from(head) };
}

export function explainForeign(
  foreign: Foreign,
  { path, compression }: { path: string | null; compression: Compression | null },
): string {
  const what = `this is not one event a line, but ${foreign.format}`;
  if ("advice" in foreign) return `${what}; ${foreign.advice}`;
  const { filter } = foreign;
  if (path === null) return `${what}; pipe it through: ${filter}`;
  const quoted = /^[\w./-]+$/.test(path) ? path : `'${path.replaceAll("'", "'\\''")}'`;
  const input = compression ? `${compression} -dc < ${quoted} |` : `cat ${quoted} |`;
  return `${what}; convert it: ${input} ${filter} > ${quoted}.jsonl`;
}

/** The name of a file as a source: that of its content. */
export function sourceName(path: string, compression: Compression | null): string {
  const name = basename(path);
  return (compression && name.replace(NAMES[compression], "")) || name;
}

function compressionOf(head: Uint8Array): Compression | null {
  const hex = Buffer.from(head.subarray(0, 4)).toString("hex");
  if (hex.startsWith("1f8b08")) return "gzip";
  return hex === "28b52ffd" || /^5[0-9a-f]2a4d18$/.test(hex) ? "zstd" : null;
}

async function* decompress(
  blocks: AsyncIterable<Uint8Array>,
  compression: Compression,
): AsyncGenerator<Uint8Array> {
  const walk = compression === "zstd" ? openFrameWalk() : null;
  const iterator = blocks[Symbol.asyncIterator]();
  let [inputBytes, dataBytes] = [0, 0]; // the second without the NULs at the end
  let failure: unknown = null;
  async function nextBlock(): Promise<Uint8Array | null> {
    try {
      const { value: block, done } = await iterator.next();
      if (done && walk?.isWhole() === false) throw new Error("its end is missing");
      if (done) return null;
      walk?.push(block);
      const last = block.findLastIndex((byte: number) => byte !== 0);
      if (last >= 0) dataBytes = inputBytes + last + 1;
      inputBytes += block.length;
      return block;
    } catch (error) {
      throw (failure ??= error);
    }
  }
  async function* walked() {
    for (let block; (block = await nextBlock());) yield block;
  }
  const decompressor = compression === "zstd" ? createZstdDecompress() : createGunzip();
  const output = pipeline(Readable.from(walked()), decompressor, () => {});
  try {
    yield* output as AsyncIterable<Uint8Array>;
    // Where something follows that it does not know, Bun 1.4.5 ends the output without an error: behind a
    // zstd frame anything, behind a gzip member NULs with all after them. NULs alone are padding of gzip.
    while (!failure && (await nextBlock()));
    if (failure) throw failure;
    if (dataBytes > decompressor.bytesWritten)
      throw new Error(`what follows byte ${decompressor.bytesWritten} cannot be read`);
  } catch (error) {
    const { message } = (failure ?? error) as Error;
    const what = message === "unexpected end of file" ? "its end is missing" : message;
    throw new DamagedInput(
      `the ${compression} data is damaged: ${what}; restore it from its origin`,
    );
  }
}

/** Reads a stream forward, and opens it again for a read of what it has passed. One read at a time. */
function rereadable(openStream: () => AsyncIterable<Uint8Array>): Read {
  let stream: Read | null = null;
  let at = 0;
  let turn: Promise<unknown> = Promise.resolve();
  return (from, to) => {
    const result = turn.then(async () => {
      if (!stream || from < at) {
        stream = readStream(openStream());
        at = 0;
      }
      for (; at < from; at = Math.min(at + BLOCK_BYTES, from))
        await stream(at, Math.min(at + BLOCK_BYTES, from));
      return await stream(from, to);
    });
    turn = result.catch(() => (stream = null));
    return result;
  };
}

/** Reads as if the file ended before the NULs at its end. */
function withoutNulTail(raw: Read): Read {
  let dataAt = 0; // something other than NUL is there
  return async (from, to) => {
    const bytes = await raw(from, to);
    if (bytes.at(-1) !== 0 || from + bytes.length <= dataAt) return bytes;
    for (let at = from + bytes.length; ;) {
      const block = await raw(at, at + BLOCK_BYTES);
      if (block.length === 0) break;
      const index = block.findIndex((byte) => byte !== 0);
      if (index >= 0) {
        dataAt = at + index;
        return bytes;
      }
      at += block.length;
    }
    return bytes.subarray(0, bytes.findLastIndex((byte) => byte !== 0) + 1);
  };
}

async function countNuls(raw: Read, from: number, to: number): Promise<number> {
  for (let end = to; end > from;) {
    const start = Math.max(from, end - BLOCK_BYTES);
    const index = (await raw(start, end)).findLastIndex((byte) => byte !== 0);
    if (index >= 0) return to - (start + index + 1);
    end = start;
  }
  return Math.max(0, to - from);
}

/** How a person removes the NULs of a file, without which it is the same source. */
export function explainNuls(path: string, count: number): string {
  const copy = `${path}.new`;
  return (
    `ends with ${count} NUL bytes, as a crash leaves them: not events. ` +
    `Remove them: tr -d '\\0' < ${path} > ${copy} && mv ${copy} ${path}`
  );
}
