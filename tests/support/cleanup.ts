/**
 * Preloaded by bunfig.toml: only an `afterAll` of a preloaded file runs after the last test file of a
 * process instead of after the file that registers it. It imports nothing, so tests that need no Postgres
 * do not load it.
 */
import { afterAll } from "bun:test";

const cleanups: (() => Promise<void>)[] = [];

/** Calls `cleanup` after the last test file of this process. */
export function afterRun(cleanup: () => Promise<void>): void {
  cleanups.push(cleanup);
}

// A busy machine stops a Postgres in more than the 5 s that a hook has.
afterAll(async () => {
  for (const cleanup of cleanups) await cleanup();
}, 60_000);
