/**
 * The descriptors of this process. Connections can use up all that the system allows, and then nothing
 * can be opened: no next file of the journal, no connection to Postgres, not even a connection to accept.
 *
 * So some are held in reserve. When no other one is left they are released, and idle connections are
 * closed. Bun closes only connections that have been answered; those that never sent a request end at
 * the idle timeout. Until then its accept loop uses a whole core.
 */
import { closeSync, openSync } from "node:fs";

import { type Log, watchHealth } from "../log.ts";

/** Enough for the next file of the journal, its directory, reads of it, Postgres, and some connections. */
const RESERVED = 16;
const CHECK_MS = 250;

/** Watches until disposed. While no descriptor is left, closes the idle connections of `server` and logs it. */
export function watchDescriptors(server: { closeIdle(): void }, log: Log): Disposable {
  const health = watchHealth(log, "warn", "descriptors are available again");
  const reserve: number[] = [];
  const timer = setInterval(check, CHECK_MS);
  timer.unref();
  check();
  return {
    [Symbol.dispose]() {
      clearInterval(timer);
      release();
    },
  };

  function check(): void {
    try {
      // One more than the reserve, so it is never the last one that is reserved.
      closeSync(open());
      while (reserve.length < RESERVED) reserve.push(open());
      health.recovered();
    } catch (error) {
      release();
      server.closeIdle();
      const code = (error as { code?: string }).code ?? String(error);
      health.failing(
        `no descriptor is left (${code}): idle connections are closed; raise ulimit -n`,
      );
    }
  }

  function release(): void {
    for (const descriptor of reserve.splice(0)) closeSync(descriptor);
  }
}

function open(): number {
  return openSync("/dev/null", "r");
}
