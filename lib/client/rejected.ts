/**
 * FILE.rejected.jsonl: the lines of FILE that the server rejected, each with its number, the offset at
 * which it begins, and the reason. No line is in it twice, whatever crashed: the rejected lines of a
 * chunk are written before the next but one is sent. So only those of the last two chunks can be missing,
 * and the offsets tell which.
 */
import { appendFileSync, existsSync, rmSync, truncateSync } from "node:fs";

import { explain } from "../errors.ts";
import { eachLine, readBlocks, readFile, SHOWN_BYTES } from "../event/lines.ts";
import type { LineCounts } from "./api.ts";
import { type Chunk, CHUNK_BYTES } from "./chunks.ts";

export type Rejected = Awaited<ReturnType<typeof openRejected>>;

/**
 * Opens the file for a source that is stored up to `offset`, and deletes its records from there on. With
 * `isOwner` false, another client writes the file, and this one only counts.
 */
export async function openRejected(
  path: string,
  { offset, isOwner, say }: { offset: number; isOwner: boolean; say(line: string): void },
) {
  let isKept = isOwner;
  // A bad line harms no other line: if it cannot be kept, the good lines are sent all the same.
  const stopKeeping = (error: unknown) => {
    isKept = false;
    say(`rejected lines are only counted: ${explain(error)}`);
  };
  const records = { count: 0, bytes: 0, lastOffset: -1 };
  try {
    await readRecords(path, offset, records);
    if (isOwner && records.bytes === 0) rmSync(path, { force: true });
    else if (isOwner) truncateSync(path, records.bytes);
  } catch (error) {
    stopKeeping(error);
  }

  return {
    path,
    /** How many lines were rejected, whether or not this client writes them to the file. */
    count: () => records.count,
    /** Whether this client writes the file, and can. */
    isKept: () => isKept,
    /** Adds the lines of a chunk that the server rejected. */
    add({ bytes, start, tooLong }: Chunk, errors: LineCounts["errors"]): void {
      if (tooLong === "further part" || errors.length === 0) return;
      const messages = new Map(errors.map(({ line, message }) => [line, message]));
      let text = "";
      eachLine(bytes, (line, index, number) => {
        const message = messages.get(number);
        const at = start.offset + index;
        if (message === undefined || at <= records.lastOffset) return;
        const shown = Buffer.from(line.subarray(0, SHOWN_BYTES)).toString();
        const record = { line: start.line + number - 1, at, message, text: shown };
        text += `${JSON.stringify(record)}\n`;
        records.lastOffset = at;
        records.count++;
      });
      try {
        if (text && isKept) appendFileSync(path, text);
      } catch (error) {
        stopKeeping(error);
      }
    },
  };
}

/** Adds up the records at `path` whose lines begin before `offset`: those up to the first one that is not valid. */
async function readRecords(
  path: string,
  offset: number,
  records: { count: number; bytes: number; lastOffset: number },
): Promise<void> {
  if (!existsSync(path)) return;
  let isValid = true;
  for await (const block of readBlocks(readFile(Bun.file(path)), 0, CHUNK_BYTES))
    eachLine(block.bytes, (line, _index, _number, next) => {
      const at = block.whole ? recordedOffset(line) : Infinity;
      isValid &&= at < offset;
      if (!isValid) return;
      records.count++;
      records.bytes = block.from + next;
      records.lastOffset = at;
    });
}

/** The offset in a record, or infinity if a crash cut the record short. */
function recordedOffset(line: Uint8Array): number {
  try {
    const { at } = JSON.parse(Buffer.from(line).toString()) as { at?: unknown };
    return typeof at === "number" ? at : Infinity;
  } catch {
    return Infinity;
  }
}
