/**
 * Recounting: the ledger should hold what its sources hold up to their checkpoints, without what did not
 * count (the tables `uncounted` and `quarantine`). A recount relies on nothing else that posting has
 * computed: it reads journals and files from their first byte, or from the end of the snapshot of their
 * removed segments.
 */
import {
  decodeEvent,
  getEventTypes,
  InvalidEvent,
  MAX_EVENT_BYTES,
  MAX_JOURNALED_BYTES,
  openScanner,
} from "../event/event.ts";
import { matchGenerations } from "../event/generations.ts";
import { openInput, sourceName } from "../event/input.ts";
import { type Block, eachEvent, type Read, readBlocks, readFile } from "../event/lines.ts";
import { Points } from "../event/points.ts";
import { Sums } from "../event/sums.ts";
import { isLost } from "../journal/format.ts";
import { type JournalReader, openNamedJournal } from "../journal/reader.ts";
import { parseSourceMark } from "../journal/source-mark.ts";
import { type Checkpoint, journalKey, parseKey } from "../ledger/checkpoints.ts";
import { CannotProceed, type Database, type Transaction } from "../ledger/database.ts";
import {
  type Exclusions,
  extendSnapshot,
  listLineEnds,
  listOtherTypes,
  listRecountable,
  openExclusions,
  openTally,
  type Recountable,
  type Tally,
  withRecountLock,
} from "../ledger/reconcile.ts";
import { openPointTally, type PointTally } from "../ledger/points.ts";
import { showProgress, visible } from "../progress.ts";
import { linesOf } from "./batches.ts";

const BLOCK_BYTES = 1024 * 1024;
/** This many users are summed in memory before they go to the tally. */
const MAX_USERS = 50_000;

/** What the tools work with that compare a ledger with its sources. */
export interface Reconciliation {
  database: Database;
  /** Journals (their active files, or readers of those of a stream) and event files. */
  paths: (string | JournalReader)[];
  print(line: string): void;
  say(line: string): void;
}

/** A source of the ledger that can be read again, up to its checkpoint. */
export type Source = { checkpoint: Recountable } & ({ journal: JournalReader } | { file: Read });

/** The part of a source that is recounted: positions of a journal, or offsets in a file. */
interface Range {
  key: string;
  from: number;
  to: number;
  /** What begins before this position has no points of revenue over time. */
  pointsFrom: number;
}

/** Lines of a source: the first begins at `from`, the next ones at `to`. */
type Lines = Pick<Block, "bytes" | "from" | "to"> & {
  /** When a server stored them; `null` for those of a file, whose points are those of its posting. */
  atMs: number | null;
  /** Of a file: all bytes of the block, those of a line that is too long to be an event too. */
  all?: Uint8Array;
};

/**
 * Recounts `recountable` sources of the ledger, up to their checkpoints, and shows the progress. Throws
 * CannotProceed, with a line for each source that is not whole among `paths`.
 */
export async function recount(
  sql: Transaction,
  recountable: Recountable[],
  paths: Reconciliation["paths"],
): Promise<Recount> {
  const { sources, missing } = await locateSources(recountable, paths);
  const several = missing.length > 1 ? ["(several that are gone are retired together)"] : [];
  if (missing.length > 0) refuse([...missing.map(describeMissing), ...several].join("\n"));
  const totalBytes = sources.reduce((sum, { checkpoint }) => sum + checkpoint.position, 0);
  const progress = showProgress("recounting", totalBytes, 0);
  const found = await Recount.open(sql);
  for (const { key } of recountable) {
    await found.tally.addSnapshot(key);
    if (parseKey(key).generation === null) await found.points.addSnapshot(key);
  }
  let doneBytes = 0;
  try {
    for (const source of sources) {
      const { position: to } = source.checkpoint;
      const lines = readSource(sql, source);
      await found.add(rangeOf(source), lines, (readTo) =>
        progress.update(doneBytes + readTo, found.events),
      );
      doneBytes += to;
    }
  } finally {
    progress.stop();
  }
  return found;
}

/**
 * Adds the journal's bytes before `position`, all of them posted, to its snapshot, so that they need not
 * be kept. Throws CannotProceed if another recount is under way, and if they would not count today as they
 * were posted: without them, nobody could find out how they were.
 */
export async function snapshotUpTo(
  database: Database,
  journal: JournalReader,
  position: number,
): Promise<void> {
  const key = journalKey(journal.id);
  await withRecountLock(database, refuse, async (sql) => {
    const checkpoint = (await listRecountable(sql)).find((each) => each.key === key);
    if (!checkpoint || checkpoint.removedTo >= position) return;
    const { removedTo: from, pointsFrom } = checkpoint;
    const range = { key, from, to: position, pointsFrom };
    const others = await listOtherTypes(sql, getEventTypes());
    if (others.length > 0)
      refuse(
        `EVENT_TYPES differs from what events were posted as (${others.join(", ")}): restore it, or run processor.ts --rebuild --yes`,
      );
    const recount = await Recount.open(sql);
    await recount.add(range, readJournal(journal, range));
    const { tally, points, firstInvalid } = recount;
    if (firstInvalid)
      refuse(
        `the line at position ${firstInvalid.position} of ${visible(key)} has counted, but is not an event by today's rules (${firstInvalid.reason})`,
      );
    await points.keep();
    await extendSnapshot(sql, tally, { key, position });
  });
}

function refuse(reason: string): never {
  throw new CannotProceed(reason);
}

/** Finds the source of each checkpoint that is not wholly in its snapshot among `paths`. */
export async function locateSources(
  recountable: Recountable[],
  paths: Reconciliation["paths"],
): Promise<{ sources: Source[]; missing: Recountable[] }> {
  const checkpoints = recountable.filter(({ position, removedTo }) => removedTo < position);
  const found = new Map<string, Source>();
  for (const path of paths) {
    const journal = await openPath(path);
    const checkpoint = checkpoints.find(({ key }) => journal && key === journalKey(journal.id));
    if (journal && checkpoint) found.set(checkpoint.key, { checkpoint, journal });
    if (!journal && typeof path === "string")
      for (const source of await matchFile(path, checkpoints))
        found.set(source.checkpoint.key, source);
  }
  const missing = checkpoints.filter(({ key }) => !found.has(key));
  return { sources: [...found.values()], missing };
}

/** The journal at `path`; `null` if that is something else. */
export async function openPath(path: string | JournalReader): Promise<JournalReader | null> {
  return typeof path === "string" ? openNamedJournal(path) : path;
}

/** The lines of a source from the end of its snapshot to its checkpoint. Throws CannotProceed where it is not whole. */
export async function* readSource(sql: Transaction, source: Source): AsyncGenerator<Lines[]> {
  const range = rangeOf(source);
  const { key, from, to } = range;
  if ("journal" in source) yield* readJournal(source.journal, range);
  else yield* readPostedFile(source.file, from, [...(await listLineEnds(sql, key)), to]);
}

function rangeOf({ checkpoint }: Source): Range {
  const { key, position: to, removedTo: from, pointsFrom } = checkpoint;
  return { key, from, to, pointsFrom };
}

export function describeMissing({ key, position }: Checkpoint): string {
  const { name: given, generation } = parseKey(key);
  const name = visible(given);
  const gone = `; if it is gone for good, --retire ${visible(key)} keeps what it has added`;
  return generation === null
    ? `missing: journal ${name}, which has been posted; add the path of its eventsPost.jsonl${gone}`
    : `missing: the first ${position} bytes of file ${name}, which have been posted; add its path${gone}`;
}

/** The checkpoints of files of this name whose posted bytes are those that the file at `path` begins with. */
async function matchFile(path: string, checkpoints: Recountable[]): Promise<Source[]> {
  const file = Bun.file(path);
  if (!(await file.exists())) return [];
  const { compression, readAll } = await openInput(readFile(file));
  const generations = checkpoints.flatMap((checkpoint) => {
    const { name, generation } = parseKey(checkpoint.key);
    const isNamed = generation !== null && name === sourceName(path, compression);
    return isNamed ? [{ checkpoint, offset: checkpoint.position, digest: checkpoint.digest }] : [];
  });
  const matches = await matchGenerations(readAll, generations);
  return matches.map(({ generation: { checkpoint } }) => ({ checkpoint, file: readAll }));
}

/** Counts lines of any number of sources into one tally. */
class Recount {
  events = 0;
  /** Lines that stand for what a repair took out. What was posted of it cannot be recounted. */
  lost = 0;
  /** Lines that have counted and are not events by today's rules: how many, and the first of them. */
  invalid = 0;
  firstInvalid: { key: string; position: number; reason: string } | null = null;
  private sums = new Sums();
  private minutes = new Points();
  private readonly scanner = openScanner();

  private constructor(
    private readonly sql: Transaction,
    readonly tally: Tally,
    readonly points: PointTally,
  ) {}

  static async open(sql: Transaction): Promise<Recount> {
    return new Recount(sql, await openTally(sql), await openPointTally(sql));
  }

  /** Counts a range. Calls `readTo` with how far it has read. */
  async add(
    range: Range,
    groups: AsyncIterable<Lines[]>,
    readTo: (to: number) => void = () => {},
  ): Promise<void> {
    const exclusions = await openExclusions(this.sql, range);
    for await (const group of groups) {
      for (const lines of group) {
        await exclusions.load(lines.to);
        if (this.sums.size + this.minutes.size >= MAX_USERS) await this.flush(range.key);
        this.count(range, lines, exclusions);
      }
      readTo(group.at(-1)?.to ?? range.from);
    }
    await exclusions.close();
    await this.flush(range.key);
  }

  private count(
    { key, pointsFrom }: Range,
    { bytes, from, atMs }: Lines,
    exclusions: Exclusions,
  ): void {
    const { scanner, sums } = this;
    const points = atMs !== null && from >= pointsFrom ? this.minutes : null;
    if (atMs !== null) points?.setTime(atMs);
    const maxBytes = parseKey(key).generation === null ? MAX_JOURNALED_BYTES : MAX_EVENT_BYTES;
    eachEvent(
      bytes,
      scanner,
      (index) => {
        if (exclusions.has(from + index)) return;
        const { userFrom, userTo, hash, name, sign, whole, billionths } = scanner;
        this.events++;
        points?.add(name, sign * whole, sign * billionths);
        if (sign === 0) return;
        sums.add(bytes, userFrom, userTo, hash, sign * whole, sign * billionths);
      },
      (line, index) => {
        if (parseSourceMark(line) || exclusions.has(from + index)) return;
        const decoded = decodeEvent(line, maxBytes);
        if (!(decoded instanceof InvalidEvent)) {
          this.events++;
          points?.addAmount(decoded.name, decoded.amount);
          if (decoded.sign !== 0) sums.addTo(decoded.userId, decoded.amount);
        } else if (isLost(line)) this.lost++;
        else {
          this.invalid++;
          this.firstInvalid ??= { key, position: from + index, reason: decoded.reason };
        }
      },
      maxBytes,
    );
  }

  private async flush(key: string): Promise<void> {
    const { sums, minutes } = this;
    this.sums = new Sums();
    this.minutes = new Points();
    await this.tally.add(sums);
    await this.points.add(key, minutes);
  }
}

/** The lines of a journal, a read at a time. Throws CannotProceed where it does not hold the range whole. */
async function* readJournal(journal: JournalReader, { from, to }: Range): AsyncGenerator<Lines[]> {
  if (journal.start > from)
    refuse(
      `journal ${journal.id} begins at position ${journal.start}, but is needed from ${from}: restore its older segments`,
    );
  for (let position = from; position < to;) {
    const frames = await journal.read(position).catch(({ message }: Error) => refuse(message));
    const lines = frames
      .filter((frame) => frame.from < to)
      .map(({ payload, to, atMs }) => ({ bytes: payload, from: to - payload.length, to, atMs }));
    if (lines.length === 0)
      refuse(
        `journal ${journal.id} ends at position ${position}, but has been posted up to ${to}: restore the rest`,
      );
    yield lines;
    position = lines.at(-1)?.to ?? to;
  }
}

/** The lines of a file after `from`, a block at a time. Each of `ends` also ends a line: it was the end when it was posted. */
async function* readPostedFile(file: Read, from: number, ends: number[]): AsyncGenerator<Lines[]> {
  let offset = from;
  for (const end of ends) {
    if (end <= from) continue;
    const read: Read = (from, to) => file(from, Math.min(to, end));
    for await (const block of readBlocks(read, offset, BLOCK_BYTES))
      yield [{ ...linesOf(block), to: block.to, atMs: null, all: block.bytes }];
    offset = end;
  }
}
