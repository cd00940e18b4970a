/**
 * FILE.rejected.jsonl: the lines of FILE that the server did not want, each with its number, the
 * byte it begins at, and the reason. No line is there twice, whatever was killed: a piece's lines
 * are written before the next piece is sent, so that only those of the last piece can be missing,
 * and the byte tells which are there.
 */
import { appendFileSync, existsSync, rmSync, truncateSync } from "node:fs";

import { decodeEvent, Refusal } from "./event.ts";
import { eachLine, readBlocks, readFile, SHOWN_BYTES, withoutBom } from "./lines.ts";
import { PIECE_BYTES, type Piece } from "./pieces.ts";
import type { Answer } from "./remote.ts";

export interface Rejected {
  readonly path: string;
  /** How many lines are in the file. */
  count(): number;
  /** Writes down what the server said of a piece. */
  add(piece: Piece, errors: Answer["errors"]): void;
  /** The same for a piece that was taken, but whose answer was lost; returns what it said. */
  addUnheard(piece: Piece): Counts;
}

export type Counts = Pick<Answer, "accepted" | "rejected" | "errors">;

/**
 * Opens the file for a source that is taken up to `offset`; what it says from there on goes. With
 * `writes` false, another client of the same file writes it: this one only counts.
 */
export async function openRejected(
  path: string,
  offset: number,
  writes: boolean,
): Promise<Rejected> {
  let { count, bytes, last } = await survey(path, offset);
  if (writes && bytes === 0) rmSync(path, { force: true });
  else if (writes) truncateSync(path, bytes);

  const rejected: Rejected = {
    path,
    count: () => count,
    add(piece, errors) {
      if (piece.tooLong === "further part" || errors.length === 0) return;
      const wanted = new Map(errors.map(({ line, message }) => [line, message]));
      let text = "";
      eachLine(piece.bytes, (line, start, number) => {
        const message = wanted.get(number);
        const at = piece.from + start;
        if (message === undefined || at <= last) return;
        const shown = Buffer.from(line.subarray(0, SHOWN_BYTES)).toString();
        const record = { line: piece.firstLine + number - 1, at, message, text: shown };
        text += `${JSON.stringify(record)}\n`;
        last = at;
        count++;
      });
      if (text && writes) appendFileSync(path, text);
    },
    addUnheard(piece) {
      const counts = decide(piece);
      rejected.add(piece, counts.errors);
      return counts;
    },
  };
  return rejected;
}

/** The lines of the file that hold for what is before `offset`: how many, to where, and the last. */
async function survey(path: string, offset: number) {
  const kept = { count: 0, bytes: 0, last: -1 };
  if (!existsSync(path)) return kept;
  let good = true;
  for await (const block of readBlocks(readFile(Bun.file(path)), 0, PIECE_BYTES)) {
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

/** What a server with the same rules says of a piece. */
function decide(piece: Piece): Counts {
  const counts: Counts = { accepted: 0, rejected: 0, errors: [] };
  const bytes = piece.from === 0 ? withoutBom(piece.bytes) : piece.bytes;
  eachLine(bytes, (line, _at, number) => {
    const decoded = decodeEvent(line);
    if (decoded instanceof Refusal) {
      counts.rejected++;
      counts.errors.push({ line: number, message: decoded.reason });
    } else counts.accepted++;
  });
  return counts;
}
