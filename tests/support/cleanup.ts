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

afterAll(async () => {
  for (const cleanup of cleanups) await cleanup();
});
