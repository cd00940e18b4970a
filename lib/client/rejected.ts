/**
 * FILE.rejected.jsonl: the lines of FILE that the server rejected, each with its number, the offset at
 * which it begins, and the reason. No line is in it twice, whatever crashed: the lines of a chunk are
 * written before the next chunk is sent. So only those of the last chunk can be missing, and the
 * offset says which are there.
 */
import { appendFileSync, existsSync, rmSync, truncateSync } from "node:fs";

import { eachLine, readBlocks, readFile, SHOWN_BYTES } from "../event/lines.ts";
import type { LineCounts } from "./api.ts";
import { type Chunk, CHUNK_BYTES } from "./chunks.ts";

export interface Rejected {
  readonly path: string;
  /** How many lines are in the file. */
  count(): number;
  /** Adds what the server said of a chunk. */
  add(chunk: Chunk, errors: LineCounts["errors"]): void;
}

/**
 * Opens the file for a source that is stored up to `offset`, and deletes what it says from there on.
 * With `isOwner` false, another client of the same file writes it, and this one only counts.
 */
export async function openRejected(
  path: string,
  { offset, isOwner, say }: { offset: number; isOwner: boolean; say(line: string): void },
): Promise<Rejected> {
  let count = 0;
  let lastOffset = -1;
  let isKept = isOwner;
  // A bad line harms no other line: where it cannot be kept, the good ones are sent all the same.
  const stopKeeping = (error: unknown) => {
    isKept = false;
    say(`cannot write rejected lines: ${(error as Error).message}; they are only counted`);
  };
  try {
    const valid = await readValid(path, offset);
    ({ count, lastOffset } = valid);
    if (isOwner && valid.bytes === 0) rmSync(path, { force: true });
    else if (isOwner) truncateSync(path, valid.bytes);
  } catch (error) {
    stopKeeping(error);
  }

  return {
    path,
    count: () => count,
    add(chunk, errors) {
      if (chunk.tooLong === "further part" || errors.length === 0) return;
      const messages = new Map(errors.map(({ line, message }) => [line, message]));
      let text = "";
      eachLine(chunk.bytes, (line, index, number) => {
        const message = messages.get(number);
        const at = chunk.from + index;
        if (message === undefined || at <= lastOffset) return;
        const shown = Buffer.from(line.subarray(0, SHOWN_BYTES)).toString();
        const record = { line: chunk.firstLine + number - 1, at, message, text: shown };
        text += `${JSON.stringify(record)}\n`;
        lastOffset = at;
        count++;
      });
      try {
        if (text && isKept) appendFileSync(path, text);
      } catch (error) {
        stopKeeping(error);
      }
    },
  };
}

/** The records that hold for what is before `offset`: how many, their bytes, and the last one's offset. */
async function readValid(path: string, offset: number) {
  const valid = { count: 0, bytes: 0, lastOffset: -1 };
  if (!existsSync(path)) return valid;
  let isValid = true;
  for await (const block of readBlocks(readFile(Bun.file(path)), 0, CHUNK_BYTES)) {
    eachLine(block.bytes, (line, _index, _number, next) => {
      const at = block.whole ? recordedOffset(line) : null;
      isValid &&= at !== null && at < offset;
      if (!isValid) return;
      valid.count++;
      valid.bytes = block.from + next;
      valid.lastOffset = at as number;
    });
    if (!isValid) break;
  }
  return valid;
}

function recordedOffset(line: Uint8Array): number | null {
  try {
    const { at } = JSON.parse(Buffer.from(line).toString()) as { at?: unknown };
    return typeof at === "number" ? at : null;
  } catch {
    return null; // torn by a crash
  }
}
