/**
 * `processor.ts --quarantine`: lists the lines in quarantine, retries or dismisses them. A line that is
 * valid by now (its id is free, or the rules have changed) is posted by a retry. What is dismissed never
 * counts.
 */
import {
  type Change,
  decodeEvent,
  getEventTypes,
  InvalidEvent,
  MAX_EVENT_BYTES,
  MAX_JOURNALED_BYTES,
} from "../event/event.ts";
import { eachLine, SHOWN_BYTES } from "../event/lines.ts";
import type { JournalReader } from "../journal/reader.ts";
import { journalKey, parseKey } from "../ledger/checkpoints.ts";
import { CannotProceed, RowRefused, type Transaction } from "../ledger/database.ts";
import { noteEventTypes, OTHER_EVENT } from "../ledger/ledger.ts";
import { hashOfIdentity } from "../ledger/ids.ts";
import {
  dismiss,
  type PackedLine,
  type Place,
  type QuarantinedLine,
  readClaims,
  readPackedQuarantine,
  readQuarantine,
  release,
  repack,
  unpack,
} from "../ledger/quarantine.ts";
import { listRecountable, readSnapshotEnd, withRecountLock } from "../ledger/reconcile.ts";
import { visible } from "../progress.ts";
import { identityOf, lineOf, shownLine } from "./fold.ts";
import {
  locateSources,
  openPath,
  readSource,
  type Reconciliation,
  type Source,
} from "./recount.ts";

const MAX_PRINTED_CHARS = 200;
/** So many bytes of packed lines are in memory at a time, and those of one frame more. */
const MAX_READ_BYTES = 16 * 1024 * 1024;

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
  let packed: PackedLine | undefined;
  do {
    const lines = await database.use((sql) => readPackedQuarantine(sql, packed));
    for (const { key, position, reason, at } of lines)
      print(`${key}@${position}, ${at.toISOString()}: ${reason}: only its position was kept`);
    count += lines.length;
    packed = lines.at(-1);
  } while (packed);
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
      throw new CannotProceed(
        `${visible(text)}: no such line is in quarantine; --quarantine lists them`,
      );
    dismissed += count;
  }
  print(`lines dismissed: ${dismissed}`);
  return 0;
}

function parsePlace(text: string): Place {
  const [, key = text, position] = /^(.+)@(\d{1,15})$/s.exec(text) ?? [];
  return { key, position: position === undefined ? null : Number(position) };
}

/** Posts the lines that are valid by now; returns how many remain. `paths` are journals and files. */
export async function retryQuarantine(run: Reconciliation): Promise<number> {
  const { database, print } = run;
  await noteEventTypes(database, getEventTypes());
  const whole = await retryWhole(run);
  const packed = await retryPacked(run);
  const remaining = whole.remaining + packed.remaining;
  print(`lines posted: ${whole.posted + packed.posted}; remaining in quarantine: ${remaining}`);
  return remaining;
}

/** Retries the lines that the quarantine keeps. */
async function retryWhole(run: Reconciliation) {
  const { database, paths, print, say } = run;
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
  return { posted, remaining };
}

/**
 * Retries the lines of which only positions were kept, some at a time: those that can count now become lines
 * in quarantine, which are released one by one, and are packed again where that is refused.
 */
async function retryPacked(run: Reconciliation) {
  const { database, paths, print, say } = run;
  const total = { posted: 0, remaining: 0 };
  const [first] = await database.use((sql) => readPackedQuarantine(sql));
  if (!first) return total;
  const { sources } = await locateSources(await database.use(listRecountable), paths);
  const located = new Map(
    sources.map((source) => [source.checkpoint.key, { source, readTo: 0 }] as const),
  );
  let last: PackedLine | undefined;
  for (;;) {
    const taking = (tx: Transaction) => takeValid(tx, located, last);
    const taken = await withRecountLock(database, say, taking, "read committed");
    last = taken.last;
    if (!last) return total;
    const refused: number[] = [];
    for (const each of taken.valid) {
      const { position } = each.row;
      const why = await retry(run, each);
      if (why === "posted") total.posted++;
      else if (why !== "gone") {
        taken.remaining.set(position, why);
        refused.push(position);
      }
    }
    if (refused.length > 0) await repack(database, last, refused);
    for (const [position, why] of taken.remaining) print(`${last.key}@${position} remains: ${why}`);
    total.posted += taken.repeated;
    total.remaining += taken.remaining.size;
  }
}

/** A line as it was sent, and when a server stored it. */
interface SentLine {
  line: Uint8Array;
  atMs: number | null;
}

/** The sources that are here, by checkpoint key, and how far their packed lines have been read. */
type Located = ReadonlyMap<string, { source: Source; readTo: number }>;

/**
 * Takes the next packed lines, those after `last`: the `valid` ones become lines in quarantine, those that
 * have come before (`repeated`) are left out, and the others are `remaining`, with the reason.
 */
async function takeValid(tx: Transaction, located: Located, last: PackedLine | undefined) {
  const page = await readPackedQuarantine(tx, last);
  const { lines, sent } = await readPacked(tx, located, page);
  const { wanted, remaining } = await judge(tx, lines, sent);
  const [first] = lines;
  const taken = first ? await unpack(tx, first, wanted) : new Set<number>();
  const texts = new Map(wanted.map(({ position, line }) => [position, line]));
  const valid = lines.flatMap((row) => {
    const line = taken.has(row.position) ? texts.get(row.position) : null;
    return typeof line === "string" ? [{ row: { ...row, line }, ...sent.get(row.position) }] : [];
  });
  return { last: lines.at(-1), remaining, valid, repeated: taken.size - valid.length };
}

/** Which of `lines` leave the packed ones, as `unpack` takes them, and why the others remain. */
async function judge(tx: Transaction, lines: PackedLine[], sent: Map<number, SentLine>) {
  const remaining = new Map<number, string>();
  const changes = new Map<number, Change>();
  for (const { key, position, reason } of lines) {
    const line = sent.get(position)?.line;
    const change = line && decodeLine(key, line);
    if (!change)
      remaining.set(position, `${reason}, and its line is not here: name its file or journal`);
    else if (change instanceof InvalidEvent) remaining.set(position, change.reason);
    else changes.set(position, change);
  }
  const ids = changes.values().map(({ id = "" }) => id);
  const claims = await readClaims(tx, new Set(ids));
  const wanted: { position: number; line: string | null }[] = [];
  for (const { position, reason } of lines) {
    const change = changes.get(position);
    if (!change) continue;
    const event = eventOf(change);
    const claimed = event === null ? undefined : claims.get(change.id as string);
    const text = shownLine(sent.get(position)?.line as Uint8Array);
    if (claimed === undefined)
      wanted.push({ position, line: reason === OTHER_EVENT ? (event ?? text) : text });
    else if (event !== null && claimed === hashOfIdentity(event))
      wanted.push({ position, line: null });
    else remaining.set(position, OTHER_EVENT);
  }
  return { wanted, remaining };
}

/** The lines of `page`, of one batch, as they were sent, by position: `lines` are those that were read. */
async function readPacked(tx: Transaction, located: Located, page: PackedLine[]) {
  const sent = new Map<number, SentLine>();
  const key = page[0]?.key ?? "";
  const end = page.at(-1)?.position ?? 0;
  const place = located.get(key);
  if (!place) return { lines: page, sent };
  const { source } = place;
  const start = "journal" in source ? source.journal.start : 0;
  const snapshotTo = await readSnapshotEnd(tx, key);
  const removedTo = Math.max(place.readTo, page[0]?.from ?? 0, start, snapshotTo);
  if (removedTo > end) return { lines: page, sent };
  place.readTo = removedTo;
  const wanted = new Set(page.map(({ position }) => position));
  const checkpoint = { ...source.checkpoint, removedTo };
  let bytes = 0;
  for await (const group of readSource(tx, { ...source, checkpoint }))
    for (const { bytes: payload, from, to, atMs } of group) {
      const visit = (line: Uint8Array, index: number) => {
        if (!wanted.has(from + index)) return;
        sent.set(from + index, { line: Uint8Array.from(line), atMs });
        bytes += line.length;
      };
      eachLine(payload, visit, MAX_JOURNALED_BYTES);
      if (to > end) return { lines: page, sent }; // the next page may begin in the same lines
      place.readTo = to;
      if (bytes > MAX_READ_BYTES)
        return { lines: page.filter(({ position }) => position < to), sent };
    }
  return { lines: page, sent };
}

/** The journals of `paths`, by checkpoint key, each with the position before which it may be deleted. */
async function openJournals(sql: Transaction, paths: Reconciliation["paths"]) {
  const journals = new Map<string, { journal: JournalReader; from: number }>();
  for (const path of paths) {
    const journal = await openPath(path);
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
): Promise<Map<QuarantinedLine, SentLine>> {
  const lines = new Map<QuarantinedLine, SentLine>();
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
  const change = decodeLine(row.key, line);
  if (change instanceof InvalidEvent) return change.reason;
  const posting = (tx: Transaction) =>
    release(tx, row, { ...change, event: eventOf(change), atMs });
  try {
    // "Read committed", because others may post to the same user meanwhile.
    const outcome = await withRecountLock(database, say, posting, "read committed");
    return outcome === "disputed" ? OTHER_EVENT : outcome;
  } catch (error) {
    if (error instanceof RowRefused) return error.reason;
    throw error;
  }
}

function decodeLine(key: string, line: Uint8Array): Change | InvalidEvent {
  const isJournaled = parseKey(key).generation === null;
  return decodeEvent(line, isJournaled ? MAX_JOURNALED_BYTES : MAX_EVENT_BYTES);
}

/** The identity of an event that claims its id; `null` for one that claims none. */
function eventOf(change: Change): string | null {
  const { id, sign } = change;
  return id === undefined || sign === 0 ? null : identityOf({ ...change, id });
}
