/**
 * `processor.ts --quarantine`: lists the lines in quarantine, or retries them. A line that is valid by
 * now (its id is free, or the rules have changed) is posted.
 */
import {
  decodeEvent,
  getEventTypes,
  InvalidEvent,
  MAX_EVENT_BYTES,
  MAX_JOURNALED_BYTES,
} from "../event/event.ts";
import { eachLine, SHOWN_BYTES } from "../event/lines.ts";
import { type JournalReader, openNamedJournal } from "../journal/reader.ts";
import { journalKey, parseKey } from "../ledger/checkpoints.ts";
import { describe, RowRefused, type Sql } from "../ledger/database.ts";
import { noteEventTypes, OTHER_EVENT } from "../ledger/ledger.ts";
import { type QuarantinedLine, readQuarantine, release } from "../ledger/quarantine.ts";
import { readSnapshotEnd, withRecountLock } from "../ledger/reconcile.ts";
import { identityOf, lineOf } from "./fold.ts";
import type { Reconciliation } from "./recount.ts";

const LIST_DEADLINE_MS = 3_600_000;
const MAX_PRINTED_CHARS = 200;

/** A journal, and the position up to which its lines have been looked at. */
interface Place {
  journal: JournalReader;
  position: number;
}

/** Prints each line in quarantine; returns how many there are. */
export async function listQuarantine({ database, print }: Reconciliation): Promise<number> {
  return database.use(async (sql) => {
    let count = 0;
    for await (const rows of readQuarantine(sql)) {
      for (const { key, position, reason, line, at } of rows) {
        const isLong = line.length > MAX_PRINTED_CHARS;
        const shown = JSON.stringify(isLong ? `${line.slice(0, MAX_PRINTED_CHARS)}…` : line);
        print(`${key} at ${position}, ${at.toISOString()}: ${reason}: ${shown}`);
      }
      count += rows.length;
    }
    print(`lines in quarantine: ${count}`);
    return count;
  }, LIST_DEADLINE_MS);
}

/** Posts the lines that are valid by now; returns how many remain. `paths` are journals. */
export async function retryQuarantine(run: Reconciliation): Promise<number> {
  const { database, paths, print, say } = run;
  await noteEventTypes(database, getEventTypes());
  return withRecountLock(database, say, async (sql) => {
    const journals = await openJournals(sql, paths);
    let posted = 0;
    let remaining = 0;
    for await (const rows of readQuarantine(sql)) {
      const lines = await readLines(rows, journals);
      for (const row of rows) {
        const why = await retry(sql, row, lines.get(row));
        if (why === null) posted++;
        else {
          remaining++;
          print(`${row.key} at ${row.position} remains: ${why}`);
        }
      }
    }
    print(`lines posted: ${posted}; remaining in quarantine: ${remaining}`);
    return remaining;
  });
}

/** The journals of `paths`, by checkpoint key. */
async function openJournals(sql: Sql, paths: string[]): Promise<Map<string, Place>> {
  const journals = new Map<string, Place>();
  for (const path of paths) {
    const journal = await openNamedJournal(path);
    if (!journal) continue;
    const key = journalKey(journal.id);
    // Segments before the end of the snapshot may be deleted at any moment.
    const position = Math.max(journal.start, await readSnapshotEnd(sql, key));
    journals.set(key, { journal, position });
  }
  return journals;
}

/** The lines of `rows` as they were sent: from their journal, else from the quarantine unless it was cut. */
async function readLines(
  rows: QuarantinedLine[],
  journals: ReadonlyMap<string, Place>,
): Promise<Map<QuarantinedLine, Uint8Array>> {
  const lines = new Map<QuarantinedLine, Uint8Array>();
  for (const row of rows) {
    const { reason, line } = row;
    if (Buffer.byteLength(line) < SHOWN_BYTES && !line.includes("\ufffd"))
      lines.set(row, Buffer.from(reason === OTHER_EVENT ? lineOf(line) : line));
  }
  for (const [key, place] of journals) {
    const wanted = new Map(rows.filter((row) => row.key === key).map((row) => [row.position, row]));
    const last = Math.max(...wanted.keys());
    for (let position = place.position; position <= last;) {
      const frames = await place.journal.read(position);
      if (frames.length === 0) break;
      for (const { payload, from, to } of frames) {
        if (from > last) break;
        place.position = from; // the next page may begin in the same frame
        const visit = (line: Uint8Array, index: number) => {
          const row = wanted.get(to - payload.length + index);
          if (row) lines.set(row, Uint8Array.from(line));
        };
        eachLine(payload, visit, MAX_JOURNALED_BYTES);
        position = to;
      }
    }
  }
  return lines;
}

/** Posts a line and returns `null`, or returns why it remains. */
async function retry(sql: Sql, row: QuarantinedLine, line?: Uint8Array): Promise<string | null> {
  if (!line) return `${row.reason}, and only the beginning of the line was kept`;
  const isJournaled = parseKey(row.key).generation === null;
  const change = decodeEvent(line, isJournaled ? MAX_JOURNALED_BYTES : MAX_EVENT_BYTES);
  if (change instanceof InvalidEvent) return change.reason;
  const { id, sign } = change;
  const event = id === undefined || sign === 0 ? null : identityOf({ ...change, id });
  try {
    return (await release(sql, row, { ...change, event })) ? null : OTHER_EVENT;
  } catch (error) {
    const failure = describe(error);
    if (failure instanceof RowRefused) return failure.reason;
    throw failure;
  }
}
