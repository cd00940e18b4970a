/**
 * Moves the ledger's day, by which ids and segments grow old. It moves by one day at a time, after this
 * process has seen for an hour of its own monotonic clock that it is due, and that nobody else has moved it.
 * So a clock that is wrong for less than an hour deletes nothing, neither ahead nor behind, nor at a start,
 * nor after a failover. If all processors live for less than an hour, things only grow old more slowly.
 */
import { moveDay, readDay } from "../ledger/boundary.ts";
import type { Database } from "../ledger/database.ts";

const DUE_MS = 3600 * 1000;
/** After such a gap between two looks (the database was down, the machine asleep) the hour begins again. */
const MAX_GAP_MS = 5 * 60 * 1000;

/** Returns a function that looks at the ledger's day; call it every minute or so. It throws Unavailable. */
export function openAging(database: Database, nowMs = () => performance.now()) {
  let due: { day: string; sinceMs: number; seenMs: number } | null = null;
  return async (): Promise<void> => {
    const { day, isDue } = await readDay(database);
    const ms = nowMs();
    if (!isDue) due = null;
    else if (due?.day !== day || ms - due.seenMs > MAX_GAP_MS)
      due = { day, sinceMs: ms, seenMs: ms };
    else if (ms - due.sinceMs < DUE_MS) due.seenMs = ms;
    else {
      await moveDay(database, day);
      due = null;
    }
  };
}
