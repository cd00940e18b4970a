/** How far posting is behind all journals, once a second, for METRICS_PORT. */
import { setTimeout as sleep } from "node:timers/promises";

import type { Journals } from "../journal/reader.ts";
import { journalKey, readCheckpoints } from "../ledger/checkpoints.ts";
import type { Context } from "./posting.ts";

const EVERY_MS = 1_000;

/** Reports it until it is stopped. While the database is down, what it said last is posted. */
export async function reportLag(journals: Journals, { database, stop, report }: Context) {
  let posted: Map<string, number> | null = null;
  for (; !stop.aborted; await sleep(EVERY_MS, undefined, { signal: stop }).catch(() => {}))
    try {
      const ends = await journals.ends();
      const rows = await readCheckpoints(database, Array.from(ends.keys(), journalKey)).catch(
        () => null,
      );
      if (rows) posted = new Map(rows.map(({ key, position }) => [key, position]));
      if (posted) report({ type: "lag", ...(await lagOf(journals, ends, posted)) });
    } catch {
      // The journal cannot be read now, and the posting of it says so.
    }
}

async function lagOf(
  journals: Journals,
  ends: ReadonlyMap<string, number>,
  posted: ReadonlyMap<string, number>,
): Promise<{ bytes: number; seconds: number }> {
  let bytes = 0;
  let oldestMs = Date.now();
  for (const [id, end] of ends) {
    const position = posted.get(journalKey(id)) ?? 0;
    if (position >= end) continue;
    bytes += end - position;
    const journal = await journals.open(id);
    const [frame] = (await journal?.read(Math.max(position, journal.start))) ?? [];
    oldestMs = Math.min(oldestMs, frame?.atMs ?? oldestMs);
  }
  return { bytes, seconds: (Date.now() - oldestMs) / 1000 };
}
