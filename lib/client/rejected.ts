/**
 * FILE.rejected.jsonl: the lines of FILE that the server did not want, each with its number, the
 * byte it begins at, and the reason. No line is there twice, whatever was killed: a chunk's lines
 * are written before the next chunk is sent, so that only those of the last chunk can be missing,
 * and the byte tells which are there.
 */
import { appendFileSync, existsSync, rmSync, truncateSync } from "node:fs";

import { eachLine, readBlocks, readFile, SHOWN_BYTES } from "../event/lines.ts";
import { CHUNK_BYTES, type Chunk } from "./chunks.ts";
import type { Lines } from "./api.ts";

export interface Rejected {
  readonly path: string;
  /** How many lines are in the file. */
  count(): number;
  /** Writes down what the server said of a chunk. */
  add(chunk: Chunk, errors: Lines["errors"]): void;
}

/**
 * Opens the file for a source that is taken up to `offset`; what it says from there on goes. With
 * `writes` false, another client of the same file writes it: this one only counts.
 */
export async function openRejected(
  path: string,
  offset: number,
  writes: boolean,
  say: (line: string) => void,
): Promise<Rejected> {
  let count = 0;
  let last = -1;
  let keeps = writes;
  // A bad line harms nobody else: where it cannot be kept, the good ones are sent all the same.
  const giveUp = (error: unknown) => {
    keeps = false;
    say(`rejected lines cannot be kept: ${(error as Error).message}; they are only counted`);
  };
  try {
    const found = await survey(path, offset);
    ({ count, last } = found);
    if (writes && found.bytes === 0) rmSync(path, { force: true });
    else if (writes) truncateSync(path, found.bytes);
  } catch (error) {
    giveUp(error);
  }

  return {
    path,
    count: () => count,
    add(chunk, errors) {
      if (chunk.tooLong === "further part" || errors.length === 0) return;
      const wanted = new Map(errors.map(({ line, message }) => [line, message]));
      let text = "";
      eachLine(chunk.bytes, (line, start, number) => {
        const message = wanted.get(number);
        const at = chunk.from + start;
        if (message === undefined || at <= last) return;
        const shown = Buffer.from(line.subarray(0, SHOWN_BYTES)).toString();
        const record = { line: chunk.firstLine + number - 1, at, message, text: shown };
        text += `${JSON.stringify(record)}\n`;
        last = at;
        count++;
      });
      try {
        if (text && keeps) appendFileSync(path, text);
      } catch (error) {
        giveUp(error);
      }
    },
  };
}

/** The lines of the file that hold for what is before `offset`: how many, to where, and the last. */
async function survey(path: string, offset: number) {
  const kept = { count: 0, bytes: 0, last: -1 };
  if (!existsSync(path)) return kept;
  let good = true;
  for await (const block of readBlocks(readFile(Bun.file(path)), 0, CHUNK_BYTES)) {
    eachLine(block.bytes, (line, _at, _number, next) => {
      const at = block.whole ? recordedAt(line) : null;
      good &&= at !== null && at < offset;
      if (!good) return;
      kept.count++;
      kept.bytes = block.from + next;
      kept.last = at as number;
    });
    if (!good) break;
  }
  return kept;
}

function recordedAt(line: Uint8Array): number | null {
  try {
    const { at } = JSON.parse(Buffer.from(line).toString()) as { at?: unknown };
    return typeof at === "number" ? at : null;
  } catch {
    return null; // torn by a kill
  }
}
