/**
 * `processor.ts --quarantine`: lists the lines in quarantine, retries or dismisses them. A line that is
 * valid by now (its id is free, or the rules have changed) is posted by a retry. What is dismissed never
 * counts.
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
import { CannotProceed, RowRefused, type Transaction } from "../ledger/database.ts";
import { noteEventTypes, OTHER_EVENT } from "../ledger/ledger.ts";
import {
  dismiss,
  type Place,
  type QuarantinedLine,
  readQuarantine,
  release,
} from "../ledger/quarantine.ts";
import { readSnapshotEnd, withRecountLock } from "../ledger/reconcile.ts";
import { identityOf, lineOf } from "./fold.ts";
import type { Reconciliation } from "./recount.ts";

const MAX_PRINTED_CHARS = 200;

/** Prints each line in quarantine; returns how many there are. */
export async function listQuarantine({ database, print }: Reconciliation): Promise<number> {
  let count = 0;
  let last: QuarantinedLine | undefined;
  do {
    const rows = await database.use((sql) => readQuarantine(sql, last));
    for (const { key, position, reason, line, at } of rows) {
      const isLong = line.length > MAX_PRINTED_CHARS;
      const shown = JSON.stringify(isLong ? `${line.slice(0, MAX_PRINTED_CHARS)}…` : line);
      print(`${key}@${position}, ${at.toISOString()}: ${reason}: ${shown}`);
    }
    count += rows.length;
    last = rows.at(-1);
  } while (last);
  print(`lines in quarantine: ${count}`);
  return count;
}

/**
 * Dismisses the lines at `places`, written as the list shows them (`SOURCE`, or `SOURCE@POSITION`), or all.
 * Throws CannotProceed for a place that has none; what stands before it is dismissed.
 */
export async function dismissQuarantine({ database, print }: Reconciliation, places: string[]) {
  let dismissed = 0;
  for (const text of places.length > 0 ? places : [null]) {
    const count = await dismiss(database, text === null ? null : parsePlace(text));
    if (count === 0 && text !== null)
      throw new CannotProceed(`${text}: no such line is in quarantine; --quarantine lists them`);
    dismissed += count;
  }
  print(`lines dismissed: ${dismissed}`);
  return 0;
}

function parsePlace(text: string): Place {
  const [, key = text, position] = /^(.+)@(\d{1,15})$/s.exec(text) ?? [];
  return { key, position: position === undefined ? null : Number(position) };
}

/** Posts the lines that are valid by now; returns how many remain. `paths` are journals. */
export async function retryQuarantine(run: Reconciliation): Promise<number> {
  const { database, paths, print, say } = run;
  await noteEventTypes(database, getEventTypes());
  const places = new Map<string, number>();
  let posted = 0;
  let remaining = 0;
  let last: QuarantinedLine | undefined;
  do {
    // No segment is removed while its lines are read. After that, the lines are posted one by one.
    const found = await withRecountLock(database, say, async (tx) => {
      const rows = await readQuarantine(tx, last);
      const lines = await readLines(rows, await openJournals(tx, paths), places);
      return rows.map((row) => ({ row, ...lines.get(row) }));
    });
    for (const each of found) {
      const { row } = each;
      const why = await retry(run, each);
      if (why === "posted") posted++;
      else if (why !== "gone") {
        remaining++;
        print(`${row.key}@${row.position} remains: ${why}`);
      }
    }
    last = found.at(-1)?.row;
  } while (last);
  print(`lines posted: ${posted}; remaining in quarantine: ${remaining}`);
  return remaining;
}

/** The journals of `paths`, by checkpoint key, each with the position before which it may be deleted. */
async function openJournals(sql: Transaction, paths: string[]) {
  const journals = new Map<string, { journal: JournalReader; from: number }>();
  for (const path of paths) {
    const journal = await openNamedJournal(path);
    if (!journal) continue;
    const key = journalKey(journal.id);
    const from = Math.max(journal.start, await readSnapshotEnd(sql, key));
    journals.set(key, { journal, from });
  }
  return journals;
}

/**
 * The lines of `rows` as they were sent: from their journal, else from the quarantine unless it was cut.
 * `places` keeps, for the next page, up to where each journal has been read.
 */
async function readLines(
  rows: QuarantinedLine[],
  journals: Awaited<ReturnType<typeof openJournals>>,
  places: Map<string, number>,
): Promise<Map<QuarantinedLine, { line: Uint8Array; atMs: number | null }>> {
  const lines = new Map<QuarantinedLine, { line: Uint8Array; atMs: number | null }>();
  for (const row of rows) {
    const { key, reason, line, at } = row;
    // Where its frame is gone: it was quarantined soon after it was stored.
    const atMs = parseKey(key).generation === null ? at.getTime() : null;
    if (Buffer.byteLength(line) < SHOWN_BYTES && !line.includes("\ufffd"))
      lines.set(row, { line: Buffer.from(reason === OTHER_EVENT ? lineOf(line) : line), atMs });
  }
  for (const [key, { journal, from: start }] of journals) {
    const wanted = new Map(rows.filter((row) => row.key === key).map((row) => [row.position, row]));
    const last = Math.max(...wanted.keys());
    for (let position = Math.max(start, places.get(key) ?? 0); position <= last;) {
      const frames = await journal.read(position);
      if (frames.length === 0) break;
      for (const { payload, from, to, atMs } of frames) {
        if (from > last) break;
        places.set(key, from); // the next page may begin in the same frame
        const visit = (line: Uint8Array, index: number) => {
          const row = wanted.get(to - payload.length + index);
          if (row) lines.set(row, { line: Uint8Array.from(line), atMs });
        };
        eachLine(payload, visit, MAX_JOURNALED_BYTES);
        position = to;
      }
    }
  }
  return lines;
}

/** Posts a line and returns "posted", or "gone" if somebody else has, or returns why it remains. */
async function retry(
  { database, say }: Reconciliation,
  { row, line, atMs = null }: { row: QuarantinedLine; line?: Uint8Array; atMs?: number | null },
): Promise<string> {
  if (!line) return `${row.reason}, and only the beginning of the line was kept`;
  const isJournaled = parseKey(row.key).generation === null;
  const change = decodeEvent(line, isJournaled ? MAX_JOURNALED_BYTES : MAX_EVENT_BYTES);
  if (change instanceof InvalidEvent) return change.reason;
  const { id, sign } = change;
  const event = id === undefined || sign === 0 ? null : identityOf({ ...change, id });
  const posting = (tx: Transaction) => release(tx, row, { ...change, event, atMs });
  try {
    // "Read committed", because others may post to the same user meanwhile.
    const outcome = await withRecountLock(database, say, posting, "read committed");
    return outcome === "disputed" ? OTHER_EVENT : outcome;
  } catch (error) {
    if (error instanceof RowRefused) return error.reason;
    throw error;
  }
}
