/**
 * Counting again: what the ledger should hold is what its sources hold, up to their checkpoints,
 * without what did not count (`uncounted`, `quarantine`). Nothing that posting has worked out is
 * relied upon but these: the journals and the files are read from their first byte, or from where
 * the snapshot of their removed segments ends.
 */
import { basename } from "node:path";

import { type Database, CannotProceed, type Statements } from "../ledger/database.ts";
import {
  addToSnapshot,
  aloneNow,
  type LeftOut,
  listLineEnds,
  listOtherTypes,
  listRecountable,
  openLeftOut,
  openTally,
  readRemoved,
  type Tally,
} from "../ledger/reconcile.ts";
import { decodeEvent, getEventTypes, openScanner, InvalidEvent } from "../event/event.ts";
import { isLost } from "../journal/format.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import { type Checkpoint, journalKey, parseKey } from "../ledger/checkpoints.ts";
import { matchGenerations } from "../event/generations.ts";
import { eachEvent, readBlocks, readFile } from "../event/lines.ts";
import { linesOf } from "./batches.ts";
import { parseSourceMark } from "../journal/source-mark.ts";
import { Sums } from "../event/sums.ts";

const BLOCK_BYTES = 1024 * 1024;
/** So many users are summed up in memory before they go to the tally. */
const MAX_USERS = 50_000;

/** Called as bytes are read: how many of how many, and the events in them. */
export type Passed = (bytes: number, totalBytes: number, events: number) => void;

export interface Recounted {
  events: number;
  /** Lines in the place of what a repair has taken out: what was posted of it nobody can count again. */
  lost: number;
  /** Lines that have counted and are no events by today's rules: how many, and the first of them. */
  strange: number;
  first: { source: string; position: number; reason: string } | null;
}

/** A source of the ledger that is there to be read again, up to its checkpoint. */
interface Found {
  checkpoint: Checkpoint;
  journal?: JournalReader;
  file?: Bun.BunFile;
}

/**
 * Adds up in `tally` what the sources of the ledger hold, as `sql` sees their checkpoints. `paths` are
 * journals and files, among which all of them must be, whole: otherwise throws CannotProceed, which says
 * what is missing, a line each.
 */
export async function recount(
  sql: Statements,
  paths: string[],
  tally: Tally,
  passed: Passed,
): Promise<Recounted> {
  const found = await find(await listRecountable(sql), paths);
  const totalBytes = found.reduce((sum, { checkpoint }) => sum + checkpoint.position, 0);
  const recounted: Recounted = { events: 0, lost: 0, strange: 0, first: null };
  let bytes = 0;
  for (const { checkpoint, journal, file } of found) {
    const { key: source, position } = checkpoint;
    const from = journal ? await readRemoved(sql, source) : 0;
    await tally.addSnapshot(sql, source);
    const count = openCount(
      sql,
      tally,
      source,
      recounted,
      await openLeftOut(sql, source, from, position),
    );
    const tell = (at: number) => passed(bytes + at, totalBytes, recounted.events);
    if (journal) await countJournal(journal, from, position, count, tell);
    if (file) await countFile(file, await listLineEnds(sql, source, 0), position, count, tell);
    await count.end();
    bytes += position;
  }
  return recounted;
}

/**
 * Makes the journal's bytes before `position`, all of them posted, part of its snapshot, so that they
 * need not be kept. `false`: another recount is at work, try again later.
 */
export async function snapshotUpTo(
  database: Database,
  journal: JournalReader,
  position: number,
): Promise<boolean> {
  const source = journalKey(journal.id);
  const taken = await aloneNow(database, async (sql) => {
    await sql`insert into removed (source, position) values (${source}, 0) on conflict do nothing`;
    const from = await readRemoved(sql, source);
    if (from >= position) return true;
    // What is let go of could not be told any more from what has counted.
    const others = await listOtherTypes(sql, getEventTypes());
    if (others.length > 0)
      throw new CannotProceed(
        `events were posted as ${others.join(", ")}, which is not what EVENT_TYPES says today: put it back, or see processor.ts --rebuild`,
      );
    const tally = await openTally(sql);
    const recounted: Recounted = { events: 0, lost: 0, strange: 0, first: null };
    const leftOut = await openLeftOut(sql, source, from, position);
    const count = openCount(sql, tally, source, recounted, leftOut);
    await countJournal(journal, from, position, count, () => {});
    await count.end();
    const { first } = recounted;
    if (first)
      throw new CannotProceed(
        `position ${first.position} of ${source} has counted, but is no event now (${first.reason}): its file is kept`,
      );
    await addToSnapshot(sql, tally, source, position);
    return true;
  });
  return taken ?? false;
}

/** Where each checkpoint's source is. */
async function find(checkpoints: Checkpoint[], paths: string[]): Promise<Found[]> {
  const found = new Map<string, Found>();
  const lacks: string[] = [];
  for (const path of paths) {
    const journal = await openJournalReader(path);
    if (!journal) {
      for (const one of await matchFile(path, checkpoints)) found.set(one.checkpoint.key, one);
      continue;
    }
    const checkpoint = checkpoints.find(({ key }) => key === journalKey(journal.id));
    if (checkpoint) found.set(checkpoint.key, { checkpoint, journal });
  }
  for (const { key, position } of checkpoints) {
    if (found.has(key)) continue;
    const { kind, name } = parseKey(key);
    lacks.push(
      kind === "journal"
        ? `journal ${name} has been posted, and is not here: give the path of its eventsPost.jsonl`
        : `a file ${name} has been posted, and its first ${position} bytes are not here: give its path`,
    );
  }
  if (lacks.length > 0) throw new CannotProceed(lacks.join("\n"));
  return [...found.values()];
}

/** The checkpoints of files of this name whose posted bytes are those that `path` begins with. */
async function matchFile(path: string, checkpoints: Checkpoint[]): Promise<Found[]> {
  const file = Bun.file(path);
  if (!(await file.exists())) return [];
  const generations = checkpoints.flatMap((checkpoint) => {
    const parsed = parseKey(checkpoint.key);
    const isNamed = parsed.kind === "file" && parsed.name === basename(path);
    return isNamed ? [{ checkpoint, offset: checkpoint.position, digest: checkpoint.digest }] : [];
  });
  const matches = await matchGenerations(readFile(file), file.size, generations);
  return matches.map(({ generation: { checkpoint } }) => ({ checkpoint, file }));
}

/** Takes lines in order of their positions. */
interface Count {
  /** To be awaited before lines that begin before `position` are added. */
  upTo(position: number): Promise<void>;
  /** Lines whose first byte is at `position` of the source. */
  add(lines: Uint8Array, position: number): void;
  end(): Promise<void>;
}

function openCount(
  sql: Statements,
  tally: Tally,
  source: string,
  recounted: Recounted,
  leftOut: LeftOut,
): Count {
  const scanner = openScanner();
  let sums = new Sums();
  const flush = async () => {
    const full = sums;
    sums = new Sums();
    await tally.add(sql, full);
  };
  return {
    async upTo(position) {
      await leftOut.load(position);
      if (sums.size >= MAX_USERS) await flush();
    },
    add(lines, position) {
      eachEvent(
        lines,
        scanner,
        (at) => {
          if (leftOut.has(position + at)) return;
          const { userFrom, userTo, hash, sign, whole, billionths } = scanner;
          recounted.events++;
          if (sign === 0) return;
          sums.add(lines, userFrom, userTo, hash, sign * whole, sign * billionths);
        },
        (line, at) => {
          if (parseSourceMark(line) || leftOut.has(position + at)) return;
          const decoded = decodeEvent(line);
          if (decoded instanceof InvalidEvent && isLost(line)) recounted.lost++;
          else if (decoded instanceof InvalidEvent) {
            recounted.strange++;
            recounted.first ??= { source, position: position + at, reason: decoded.reason };
          } else {
            recounted.events++;
            if (decoded.sign !== 0) sums.addTo(decoded.userId, decoded.amount);
          }
        },
      );
    },
    async end() {
      await flush();
      await leftOut.close();
    },
  };
}

async function countJournal(
  journal: JournalReader,
  from: number,
  to: number,
  count: Count,
  tell: (at: number) => void,
): Promise<void> {
  if (journal.start > from)
    throw new CannotProceed(
      `journal ${journal.id} is needed from position ${from} on, and what is here begins at ${journal.start}: put its segments back`,
    );
  for (let position = from; position < to;) {
    const frames = await journal.read(position).catch((error: Error) => {
      throw new CannotProceed(error.message);
    });
    if (frames.length === 0)
      throw new CannotProceed(
        `journal ${journal.id} has been posted up to ${to}, and what is here ends at ${position}`,
      );
    for (const { payload, to: end } of frames) {
      if (position >= to) break;
      position = end;
      await count.upTo(end);
      count.add(payload, end - payload.length);
    }
    tell(position);
  }
}

/** `lineEnds`: where lines were taken that had no newline then. */
async function countFile(
  file: Bun.BunFile,
  lineEnds: number[],
  to: number,
  count: Count,
  tell: (at: number) => void,
): Promise<void> {
  let from = 0;
  for (const end of [...lineEnds, to]) {
    const read = (at: number, wanted: number) => file.slice(at, Math.min(wanted, end)).bytes();
    for await (const block of readBlocks(read, from, BLOCK_BYTES)) {
      await count.upTo(block.to);
      const lines = linesOf(block);
      count.add(lines.bytes, lines.from);
      tell(block.to);
    }
    from = end;
  }
}
