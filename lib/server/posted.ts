/**
 * Waiting until the ledger has posted a position. However many wait, the database is asked by one
 * loop, and only while somebody waits.
 */
import { type Database, Unavailable } from "../ledger/database.ts";
import { journalKey, readCheckpoints } from "../ledger/checkpoints.ts";

const ASK_EVERY_MS = 10;
const MAX_WAITERS = 10_000;

export interface Posted {
  /** Throws Unavailable when too many wait, or the database is away. Returns `true` once `journal` is posted up to `position`, or `false` after `withinMs`. */
  wait(journal: string, position: number, withinMs: number): Promise<boolean>;
}

interface Waiter {
  source: string;
  position: number;
  untilMs: number;
  resolve(posted: boolean): void;
  reject(error: unknown): void;
}

export function watchPosted(database: Database): Posted {
  let waiters: Waiter[] = [];
  let asking = false;

  return {
    wait(journal, position, withinMs) {
      return new Promise((resolve, reject) => {
        if (waiters.length >= MAX_WAITERS) throw new Unavailable("too many wait for it", true);
        const untilMs = performance.now() + withinMs;
        waiters.push({ source: journalKey(journal), position, untilMs, resolve, reject });
        if (!asking) ask();
      });
    },
  };

  async function ask() {
    asking = true;
    while (waiters.length > 0) {
      try {
        const sources = [...new Set(waiters.map(({ source }) => source))];
        const rows = await readCheckpoints(database, sources);
        const positions = new Map(rows.map(({ key, position }) => [key, position]));
        const nowMs = performance.now();
        waiters = waiters.filter((waiter) => {
          const posted = (positions.get(waiter.source) ?? 0) >= waiter.position;
          const late = nowMs > waiter.untilMs;
          if (posted || late) waiter.resolve(posted);
          return !posted && !late;
        });
      } catch (error) {
        const failed = waiters;
        waiters = [];
        for (const { reject } of failed) reject(error);
      }
      if (waiters.length > 0) await Bun.sleep(ASK_EVERY_MS);
    }
    asking = false;
  }
}
