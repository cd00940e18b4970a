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
import { fileKey, listFileCheckpoints, openCheckpoint } from "../ledger/checkpoints.ts";
import { matchGenerations } from "../event/generations.ts";
import type { Batch } from "../ledger/ledger.ts";
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
  const known = await listFileCheckpoints(database, name);
  const generations = known.map((checkpoint) => ({ ...checkpoint, offset: checkpoint.position }));
  const match = (await matchGenerations(read, size, generations)).at(-1);
  if (match)
    return { source: match.generation.key, from: match.generation.offset, hash: match.hash };

  const key = fileKey(name, Math.max(0, ...known.map(({ generation }) => generation)) + 1);
  const empty = new Bun.CryptoHasher("sha256");
  const { position } = await openCheckpoint(database, key, empty.copy().digest("hex"));
  // Another process has opened this generation and posted some of it: look again whether its bytes are ours.
  return position === 0
    ? { source: key, from: 0, hash: empty }
    : locate(database, read, size, name);
}
