/**
 * The private Postgres: one for each DATA_DIR, shared by every process that uses that DATA_DIR. The
 * first to come starts it, and it stops when the last has gone (lib/postgres/watcher.ts).
 *
 * What a user finds, holding `start.lock`, and does (`ensure`):
 *
 *     postmaster.pid says   and                        so
 *     ready                 someone reads `users`      join: hold `users` open
 *     ready                 nobody does                it is about to stop; if it stays, watch it
 *     starting, stopping                               wait
 *     nothing, or the pid of something else            start it
 *
 * Each user looks again twice a second: a Postgres that was killed is back within two seconds.
 */
import { closeSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { giveAway, type DataDir, makeCluster, openDataDir } from "./data-dir.ts";
import { waitForLock } from "../lock.ts";
import { type Failure, look, type Postmaster, start, trimLog } from "./postmaster.ts";
import { hasUsers, isWatched, makeUsers, openUsers, spawnWatcher } from "./watcher.ts";

const READY_MS = 60_000;
const LOCKED_MS = 3600_000; // whoever holds it may wait for a recovery
const STOP_MS = 15_000; // the watcher asks for 8 s, then demands
const RETRY_MS = 3_000;
const LONELY_MS = 300;
const LOOK_EVERY_MS = 500;
const PAUSE_MS = 2_000;
const LEAVE_MS = 3_000;

export interface Cluster {
  /** Where Postgres is now; another port is possible after each restart. */
  url(): string;
  /** Leaves. Whoever leaves last gets its answer when Postgres has stopped, after 3 s at most. */
  close(): Promise<void>;
}

/** The private Postgres cannot run: one line with the reason and the way out. */
export class ClusterError extends Error {
  constructor(dir: string, cause: unknown) {
    const why = (cause instanceof Error ? cause.message : String(cause)).trim();
    super(
      `cannot run a private Postgres in ${dir}: ${why.replace(/\s*\n\s*/g, "; ")}; ` +
        "mend that, or set DATABASE_URL to a Postgres of yours",
      { cause },
    );
  }
}

/**
 * Where the ledger is: at `databaseUrl`, or in the private Postgres of `dataDir`, which some thread of
 * this process has open. To be asked anew each time, since a restart of that may change the port.
 */
export function ledgerUrl(dataDir: string, databaseUrl: string | null): () => string {
  return () => databaseUrl ?? clusterUrl(join(dataDir, "postgres"));
}

/** Throws when there never was one in `dir`. */
function clusterUrl(dir: string): string {
  const read = (name: string) => readFileSync(join(dir, name), "utf8").trim();
  return `postgres://daybook:${read("password")}@127.0.0.1:${read("port")}/postgres`;
}

/**
 * Starts or joins the private Postgres in `dir` (DATA_DIR/postgres). `say` gets a line for what a
 * person should know: a cluster is made, Postgres had to be started again. Throws ClusterError.
 */
export async function openCluster(dir: string, say: (line: string) => void): Promise<Cluster> {
  const closing = new AbortController();
  let home: DataDir;
  let users: number | null = null;
  let current: Postmaster | null = null;
  let isFailing = false;
  let timer: Timer;
  let looking: Promise<void> | null = null;
  try {
    home = await openDataDir(resolve(dir));
    current = await ensure();
  } catch (error) {
    hold(null);
    throw new ClusterError(resolve(dir), error);
  }
  lookLater(LOOK_EVERY_MS);

  return {
    url: () => clusterUrl(home.dir),
    async close() {
      closing.abort();
      clearTimeout(timer);
      await looking;
      hold(null);
      const until = Date.now() + LEAVE_MS;
      while (Date.now() < until && !hasUsers(home) && look(home) !== null) await Bun.sleep(10);
    },
  };

  function hold(fd: number | null) {
    if (users !== null) closeSync(users);
    users = fd;
  }

  function lookLater(ms: number) {
    timer = setTimeout(() => (looking = lookAgain()), ms);
    timer.unref();
  }

  async function lookAgain() {
    try {
      if (current && isUp(current.pid)) {
        trimLog(home);
      } else {
        const next = await ensure();
        if (isFailing || next.pid !== current?.pid)
          say(`private Postgres was gone and is back on port ${next.port}`);
        current = next;
      }
      isFailing = false;
    } catch (error) {
      if (!isFailing && !closing.signal.aborted) say(new ClusterError(home.dir, error).message);
      isFailing = true;
    }
    if (!closing.signal.aborted) lookLater(isFailing ? PAUSE_MS : LOOK_EVERY_MS);
  }

  function isUp(pid: number): boolean {
    const found = look(home);
    return found?.pid === pid && found.status === "ready" && isWatched(home);
  }

  /** Comes back when Postgres is ready and watched, and we hold our end of `users`. */
  async function ensure(): Promise<Postmaster> {
    const path = join(home.dir, "start.lock");
    const over = AbortSignal.any([closing.signal, AbortSignal.timeout(LOCKED_MS)]);
    const lock = await waitForLock(path, over, 20);
    if (lock === null) throw new Error(`${path} is held by a process that does not come to an end`);
    try {
      giveAway(path, home.runAs);
      makeUsers(home);
      await makeCluster(home, say);
      return await startOrJoin();
    } finally {
      lock.release();
    }
  }

  async function startOrJoin(): Promise<Postmaster> {
    let untilMs = Date.now() + READY_MS;
    const firstAt: Record<string, number> = {};
    const msSince = (what: string) => Date.now() - (firstAt[what] ??= Date.now());
    let failure: Failure | null = null;
    for (; !closing.signal.aborted && Date.now() < untilMs; await Bun.sleep(20)) {
      const found = look(home);
      // Recovery after a crash takes its time; whoever gives it up makes the next one begin anew.
      if (found?.status === "starting") untilMs = Date.now() + READY_MS;
      if (found?.status === "ready") {
        const fd = openUsers(home);
        if (fd !== null) {
          hold(fd);
          // The last user may have left just before: give the watcher the time to say so.
          await Bun.sleep(10);
          if (isUp(found.pid)) return found;
        } else if (msSince("lonely") > LONELY_MS) spawnWatcher(home, hold, "watch", `${found.pid}`);
      } else if (found?.status === "stopping") {
        if (msSince("stopping") > STOP_MS) process.kill(found.pid, "SIGKILL");
      } else if (found === null && failure === null) {
        const goneMs = msSince("gone");
        // Somebody watches a Postgres whose pid we cannot see: never start a second one, unless we
        // have seen the first. Then what reads on is the half that is left of a killed watcher.
        if (!isWatched(home) || (current && goneMs > RETRY_MS / 2)) failure = start(home, hold);
        else if (goneMs > RETRY_MS)
          throw new Error("a Postgres that cannot be seen from here uses it (another container?)");
      } else if (found === null) {
        const failed = failure?.();
        if (!failed) continue;
        if (!failed.mayPass || msSince("gone") > RETRY_MS) throw new Error(failed.why);
        failure = null;
      }
    }
    throw new Error(`Postgres was not ready within ${READY_MS / 1000} s; see ${home.log}`);
  }
}
