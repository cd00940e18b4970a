/**
 * Deletes segments that are old enough and wholly posted, oldest first. What a segment contributed to
 * each balance becomes part of the journal's snapshot before the file is deleted. If the process dies
 * between the two, the file remains, and the next run deletes it.
 */
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

import { disk } from "../journal/disk.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import { listSegmentFiles, openSegment, type SegmentFile } from "../journal/segments.ts";
import { noteSegments, readOldSegments } from "../ledger/boundary.ts";
import { journalKey, readPosted } from "../ledger/checkpoints.ts";
import type { Database } from "../ledger/database.ts";
import { snapshotUpTo } from "./recount.ts";

const POLL_MS = 2_000;
const DAY_MS = 24 * 3600 * 1000;
const NOTE_EVERY_MS = 3600 * 1000;

interface Retention {
  database: Database;
  /** The journal's active file. */
  path: string;
  keepDays: number;
}

/** Calls `deleteOld` again and again until `stop` is aborted. Says what it deletes, and each new failure. */
export async function retain(
  deleteOld: () => AsyncIterable<string>,
  { keepDays, stop, say }: { keepDays: number; stop: AbortSignal; say(line: string): void },
): Promise<void> {
  let failure = "";
  while (!stop.aborted) {
    try {
      for await (const path of deleteOld())
        say(`deleted ${path}: posted, and older than ${keepDays} days`);
      failure = "";
    } catch (error) {
      const { message } = error as Error;
      if (message !== failure) say(`old segments are kept for now; ${message}`);
      failure = message;
    }
    await sleep(POLL_MS, undefined, { signal: stop }).catch(() => {}); // aborted
  }
}

/** What a purge needs of a stream. */
export interface Purged {
  ids(): Promise<Iterable<string>>;
  open(id: string): Promise<JournalReader | null>;
  /** Where a journal may begin when what is before `position` is deleted. */
  kept(id: string, position: number): Promise<{ position: number; seq: number } | null>;
  purge(id: string, seq: number): Promise<void>;
}

/**
 * The same for the journals of a stream, which have no segments: what is old is what was found posted long
 * enough ago, which the ledger notes once an hour. Yields what it has deleted.
 */
export function openPurging({
  database,
  stream,
  keepDays,
}: {
  database: Database;
  stream: Purged;
  keepDays: number;
}) {
  const days = Math.floor(keepDays);
  const moreMs = (keepDays - days) * DAY_MS;
  const noted = new Map<string, number>();
  /** Up to where journals were seen to be old enough but for the fraction of a day, and when. */
  const seen = new Map<string, { position: number; ms: number }[]>();

  return async function* () {
    for (const id of await stream.ids()) {
      const key = journalKey(id);
      const posted = await readPosted(database, id);
      const now = performance.now();
      if (days > 0 && now - (noted.get(id) ?? Number.NEGATIVE_INFINITY) > NOTE_EVERY_MS) {
        await noteSegments(database, key, [posted]);
        noted.set(id, now);
      }
      const oldTo = days > 0 ? await readOldSegments(database, key, days) : posted;
      const places = seen.get(id) ?? [];
      seen.set(id, places);
      if (oldTo > (places.at(-1)?.position ?? 0)) places.push({ position: oldTo, ms: now });
      const due = places.findLast(({ ms }) => now - ms >= moreMs);
      const journal = due && (await stream.open(id));
      const kept = due && (await stream.kept(id, due.position));
      if (!journal || !kept || kept.position <= journal.start) continue;
      await snapshotUpTo(database, journal, kept.position);
      await stream.purge(id, kept.seq);
      places.splice(0, places.indexOf(due));
      yield `journal ${id} up to position ${kept.position}`;
    }
  };
}

/**
 * Returns a function that deletes the segments which may be deleted now, and yields their paths. A
 * segment's age begins when it is found wholly posted: whole days pass in the ledger (ledger/boundary.ts),
 * a fraction of a day on the clock of this process, so no reading of a clock deletes anything. It throws
 * CannotProceed or Unavailable.
 */
export function openRetention({ database, path, keepDays }: Retention) {
  const days = Math.floor(keepDays);
  const moreMs = (keepDays - days) * DAY_MS;
  /** The bases of the segments that are noted in the ledger. */
  const noted = new Set<number>();
  /** When segments were first seen that are old enough but for the fraction of a day, by base. */
  const seenMs = new Map<number, number>();

  return async function* () {
    const journal = await openJournalReader(path);
    if (!journal) return;
    const key = journalKey(journal.id);
    const posted = await readPosted(database, journal.id);
    const files = await listSegmentFiles(path, disk);
    // If a rotation died before it made the active file, only the last segment identifies the journal.
    if ((await disk.size(path)) === 0) files.pop();
    const oldTo = days === 0 ? Infinity : await findOld(key, await listPosted(files, posted));
    const now = performance.now();
    for (const { base } of files) if (base <= oldTo && !seenMs.has(base)) seenMs.set(base, now);
    for (const file of files) {
      const segment = await openSegment(file, disk);
      if (!segment || segment.to > posted) break;
      if (now - (seenMs.get(file.base) ?? now) < moreMs || file.base > oldTo) break;
      await snapshotUpTo(database, journal, segment.to);
      await disk.remove(segment.path);
      // Before the next one: after a power cut, no segment may be there without those after it.
      await disk.syncDirectory(dirname(path));
      yield segment.path;
    }
  };

  async function listPosted(files: SegmentFile[], posted: number): Promise<number[]> {
    const last = files.at(-1);
    const end = (last && (await openSegment(last, disk))?.to) ?? Infinity;
    const isPosted = (_: SegmentFile, i: number) => (files[i + 1]?.base ?? end) <= posted;
    return files.filter(isPosted).map(({ base }) => base);
  }

  /** Up to which base segments are older than `days`. */
  async function findOld(key: string, posted: number[]): Promise<number> {
    const fresh = posted.filter((base) => !noted.has(base));
    if (fresh.length > 0) await noteSegments(database, key, fresh);
    for (const base of fresh) noted.add(base);
    return readOldSegments(database, key, days);
  }
}
