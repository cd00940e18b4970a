/**
 * Lets go of segments that are old enough and wholly posted, oldest first, and of nothing else. What a
 * segment has made of each balance becomes part of the journal's snapshot before its file goes: a
 * removal that dies in between leaves a file that the next one removes.
 */
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

import type { Database } from "../ledger/database.ts";
import { disk } from "../journal/disk.ts";
import { openJournalReader } from "../journal/reader.ts";
import { listSegmentFiles, openSegment } from "../journal/segments.ts";
import { readPosted } from "../ledger/checkpoints.ts";
import { snapshotUpTo } from "./recount.ts";

const LOOK_EVERY_MS = 2_000;
const DAY_MS = 24 * 3600 * 1000;

/** Looks now and then, until told to stop, whether segments of the journal `path` may go. */
export async function retain(options: {
  database: Database;
  /** The journal's active file. */
  path: string;
  keepDays: number;
  stop: AbortSignal;
  say(line: string): void;
}): Promise<void> {
  const { database, path, keepDays, stop, say } = options;
  let trouble = "";
  while (!stop.aborted) {
    try {
      for (const removed of await removeOld(database, path, keepDays))
        say(`removed ${removed}: posted, and older than ${keepDays} days`);
      trouble = "";
    } catch (error) {
      const { message } = error as Error;
      if (message !== trouble) say(`old segments are kept for now; ${message}`);
      trouble = message;
    }
    await sleep(LOOK_EVERY_MS, undefined, { signal: stop }).catch(() => {}); // told to stop
  }
}

/** Removes what may go; returns its paths. */
async function removeOld(database: Database, path: string, keepDays: number): Promise<string[]> {
  const journal = await openJournalReader(path);
  if (!journal) return [];
  const posted = await readPosted(database, journal.id);
  const removed: string[] = [];
  const files = await listSegmentFiles(path, disk);
  // While no file has its name (a rotation that died) the last one alone knows which journal it is.
  if ((await disk.size(path)) === 0) files.pop();
  for (const file of files) {
    const segment = await openSegment(file, disk);
    if (!segment || segment.to > posted) break;
    const ageMs = disk.now() - (await disk.modifiedMs(segment.path));
    if (ageMs < keepDays * DAY_MS) break;
    if (!(await snapshotUpTo(database, journal, segment.to))) break;
    await disk.remove(segment.path);
    removed.push(segment.path);
  }
  if (removed.length > 0) await disk.syncDirectory(dirname(path));
  return removed;
}
