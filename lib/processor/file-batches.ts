/**
 * A file of events as a source: known by its name, without the folder, and by its bytes.
 *
 * The checkpoint `file:NAME#GENERATION` says how many bytes are posted and what their SHA-256 is. A
 * file that begins with exactly those bytes goes on behind them; a file of the same name that
 * begins otherwise is the next generation, and is posted whole.
 */
import type { FileHandle } from "node:fs/promises";
import { basename } from "node:path";

import type { Database } from "../ledger/database.ts";
import type { BatchLimit } from "./batch-limit.ts";
import { BATCH_BYTES, Fold } from "./fold.ts";
import { type Batch, listCheckpoints, openCheckpoint } from "../ledger/ledger.ts";
import {
  type Block,
  isComplete,
  type Read,
  readBlocks,
  readHandle,
  withoutBom,
} from "../event/lines.ts";

const BLOCK_BYTES = 1024 * 1024;

/** Where batches come from. */
export interface BatchReader {
  /** The checkpoint it began at. */
  readonly from: number;
  /**
   * The next one, or `null` when all that is whole has been given. It cannot be posted before `busy`
   * settles: what arrives until then can be part of it.
   */
  next(busy: Promise<unknown>): Promise<Batch | null>;
}

/** Opens `path`, of which `handle` is, where its posting was left. `leftOver` is told of a torn last line. */
export async function openFileSource(
  database: Database,
  path: string,
  handle: FileHandle,
  effort: BatchLimit,
  leftOver: (bytes: number) => void,
): Promise<BatchReader> {
  const read = readHandle(handle);
  const { size } = await handle.stat();
  const { source, from, hash } = await locate(database, read, size, basename(path));
  const blocks = readBlocks(read, from, BLOCK_BYTES);
  let position = from;

  return {
    from,
    async next() {
      const fold = new Fold(effort.users);
      const batchFrom = position;
      while (!fold.full && position - batchFrom < BATCH_BYTES) {
        const { value: block } = await blocks.next();
        if (!block) break;
        if (!block.whole && !isComplete(block.bytes)) {
          leftOver(block.to - block.from);
          break;
        }
        if (block.tooLong === "first part")
          fold.quarantine(block.bytes, block.from, "too long to be an event");
        const lines = linesOf(block);
        fold.addLines(lines.bytes, lines.from);
        // Should the file grow behind it, this is where a line ends all the same.
        if (!block.whole) fold.leaveOut(block.to, block.to, "end of a line without newline");
        hash.update(block.bytes);
        position = block.to;
      }
      if (position === batchFrom) return null;
      return fold.batch(source, batchFrom, position, hash.copy().digest("hex"));
    },
  };
}

/** The lines of `block`, a block of a file, and the position of their first byte. */
export function linesOf(block: Block): { bytes: Uint8Array; from: number } {
  if (block.tooLong) return { bytes: new Uint8Array(), from: block.from };
  const bytes = block.from === 0 ? withoutBom(block.bytes) : block.bytes;
  return { bytes, from: block.from + block.bytes.length - bytes.length };
}

interface Located {
  source: string;
  from: number;
  /** Of the bytes before `from`. */
  hash: Bun.CryptoHasher;
}

/** Finds the generation of `name` whose posted bytes the file begins with, or opens a new one. */
async function locate(
  database: Database,
  read: Read,
  size: number,
  name: string,
): Promise<Located> {
  const prefix = `file:${name}#`;
  const known = (await listCheckpoints(database, prefix)).filter(({ source }) =>
    /^\d+$/.test(source.slice(prefix.length)),
  );
  const hash = new Bun.CryptoHasher("sha256");
  let at = 0;
  let found: Located | null = null;
  for (const { source, position, digest } of known.toSorted((a, b) => a.position - b.position)) {
    if (position > size) break;
    await hashRange(read, hash, at, position);
    at = position;
    const here = hash.copy();
    if (here.copy().digest("hex") === digest) found = { source, from: position, hash: here };
  }
  if (found) return found;

  const generation = Math.max(0, ...known.map(({ source }) => +source.slice(prefix.length))) + 1;
  const source = `${prefix}${generation}`;
  const empty = new Bun.CryptoHasher("sha256");
  const from = await openCheckpoint(database, source, 0, empty.copy().digest("hex"));
  // Another process has opened this generation and gone on: look again whether its bytes are ours.
  return from === 0 ? { source, from, hash: empty } : locate(database, read, size, name);
}

export async function hashRange(read: Read, hash: Bun.CryptoHasher, from: number, to: number) {
  for (let at = from; at < to; at += BLOCK_BYTES)
    hash.update(await read(at, Math.min(at + BLOCK_BYTES, to)));
}
