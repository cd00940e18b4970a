/** The journal as a source of batches: its frames from the checkpoint on. */
import { setTimeout as sleep } from "node:timers/promises";

import { type Database, Unavailable } from "../ledger/database.ts";
import type { BatchLimit } from "./batch-limit.ts";
import { BATCH_BYTES, Fold } from "./fold.ts";
import { JournalDamage } from "../journal/format.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import {
  frameDigest,
  journalKey,
  openCheckpoint,
  parseFrameDigest,
  readPosted,
} from "../ledger/checkpoints.ts";
import type { BatchReader } from "./file-batches.ts";

/** While a posting is on its way, the journal is looked at this often for more. */
const LOOK_MS = 5;
/** A database that cannot be asked is tried again after this long. */
const ASK_AGAIN_MS = 500;

/** Batches of `journal` from its checkpoint on; `ahead` as `Fold` wants it. Throws JournalDamage. */
export async function openJournalSource(
  database: Database,
  path: string,
  journal: JournalReader,
  effort: BatchLimit,
  ahead: ReadonlyMap<string, number>,
): Promise<BatchReader> {
  const key = journalKey(journal.id);
  const { position: from, digest } = await openCheckpoint(database, key, null);
  if (from > (await journal.end()))
    throw new JournalDamage(path, await journal.end(), `the ledger has posted up to ${from}`);
  if (from < journal.start)
    throw new JournalDamage(
      path,
      0,
      `the ledger has posted up to ${from}, but what is kept begins at ${journal.start}; put the segments between back`,
    );
  // An older copy that was put back and has grown since holds other events at these positions.
  const { position: at = 0, header = "" } = parseFrameDigest(digest) ?? {};
  const found = header ? await journal.read(at).catch((error: Error) => error) : [];
  const last = found instanceof Error ? null : found[0];
  // Asked afterwards: what is posted may be let go of at any moment.
  const isKept = async () => at >= ((await openJournalReader(path))?.start ?? 0);
  if (header && (last?.header !== header || last.to !== from) && (await isKept())) {
    if (found instanceof Error) throw found;
    const what = `the ledger has posted another frame here: ${header}`;
    throw new JournalDamage(path, at, what);
  }
  const posted = new Map(ahead);
  let position = from;

  return {
    from,
    async next(busy) {
      let isBusy = true;
      const ready = busy.then(
        () => (isBusy = false),
        () => (isBusy = false),
      );
      const fold = new Fold(effort.users, posted);
      const batchFrom = position;
      let last = "";
      while (!fold.full && position - batchFrom < BATCH_BYTES) {
        const frames = await journal.read(position).catch(async (error) => {
          const now = await readPosted(database, journal.id);
          if (now <= batchFrom) throw error;
          throw new Unavailable("another processor has posted this, and let go of it", true);
        });
        for (const { from, to, header, payload } of frames) {
          fold.addFrame(payload, to - payload.length);
          last = frameDigest(from, header);
          position = to;
          if (fold.full) break;
        }
        if (frames.length > 0) continue;
        if (position === batchFrom || !isBusy) break;
        await Promise.race([ready, Bun.sleep(LOOK_MS)]);
      }
      if (position === batchFrom) return null;
      for (const [name, { to }] of fold.sources) if (posted.has(name)) posted.set(name, to);
      // What the writer has not synced yet could still be lost: the ledger must not be ahead.
      await journal.sync();
      // A frame whose sync failed is taken back by the writer, although ours may have succeeded.
      if ((await journal.end()) < position)
        throw new Error(`${path}: its writer has taken back what it could not sync`);
      return fold.batch(key, batchFrom, position, last);
    },
  };
}

/**
 * A journal that ends before what the ledger has posted of it is an older copy: what it takes would
 * never be posted. `asked` settles when the database was asked once, `compared` when it has answered
 * or `stop` is told. Both throw JournalDamage.
 */
export function compareWithLedger(path: string, database: Database, stop: AbortSignal) {
  const asked = reachesLedger(path, database);
  const untilAnswered = async () => {
    for (let answer = asked; !(await answer); answer = reachesLedger(path, database)) {
      await sleep(ASK_AGAIN_MS, null, { signal: stop }).catch(() => {});
      if (stop.aborted) return;
    }
  };
  return { asked, compared: untilAnswered() };
}

/** `false`: the database cannot be asked. */
async function reachesLedger(path: string, database: Database): Promise<boolean> {
  const reader = await openJournalReader(path);
  if (!reader) return true;
  try {
    const posted = await readPosted(database, reader.id);
    // Read after the checkpoint: what is posted was in the file before.
    const end = await reader.end();
    if (posted <= end) return true;
    const what = `it ends there, but the ledger has posted it up to ${posted}`;
    throw new JournalDamage(path, end, what);
  } catch (error) {
    if (error instanceof Unavailable) return false;
    throw error;
  }
}
