/**
 * Deletes segments that are old enough and wholly posted, oldest first. What a segment contributed to
 * each balance becomes part of the journal's snapshot before the file is deleted. If the process dies
 * between the two, the file remains, and the next run deletes it.
 */
import { dirname } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

import { disk } from "../journal/disk.ts";
import { openJournalReader } from "../journal/reader.ts";
import { listSegmentFiles, openSegment } from "../journal/segments.ts";
import { readPosted } from "../ledger/checkpoints.ts";
import type { Database } from "../ledger/database.ts";
import { snapshotUpTo } from "./recount.ts";

const POLL_MS = 2_000;
const DAY_MS = 24 * 3600 * 1000;

interface Retention {
  database: Database;
  /** The journal's active file. */
  path: string;
  keepDays: number;
}

/** Deletes old segments again and again until `stop` is aborted. Says what it deletes, and each new failure. */
export async function retain(
  retention: Retention & { stop: AbortSignal; say(line: string): void },
): Promise<void> {
  const { keepDays, stop, say } = retention;
  let failure = "";
  while (!stop.aborted) {
    try {
      for await (const path of deleteSegments(retention))
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

/** Deletes the segments that may be deleted now; yields their paths. Throws CannotProceed or Unavailable. */
export async function* deleteSegments({ database, path, keepDays }: Retention) {
  const journal = await openJournalReader(path);
  if (!journal) return;
  const posted = await readPosted(database, journal.id);
  const files = await listSegmentFiles(path, disk);
  // If a rotation died before it made the active file, only the last segment identifies the journal.
  if ((await disk.size(path)) === 0) files.pop();
  for (const file of files) {
    const segment = await openSegment(file, disk);
    if (!segment || segment.to > posted) break;
    const ageMs = disk.now() - (await disk.modifiedMs(segment.path));
    if (ageMs < keepDays * DAY_MS) break;
    await snapshotUpTo(database, journal, segment.to);
    await disk.remove(segment.path);
    // Before the next one: after a power cut, no segment may be there without those behind it.
    await disk.syncDirectory(dirname(path));
    yield segment.path;
  }
}
