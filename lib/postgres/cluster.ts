/**
 * The embedded Postgres: one for each DATA_DIR, shared by every process that uses that DATA_DIR.
 * The first user starts it, and it stops after the last one (watcher.ts).
 *
 * A user holds `start.lock`, opens its end of `users`, and repeats this until it has joined:
 *
 *     state       postmaster.pid     `users`      action
 *     ready       ready              is read      join
 *     unwatched   ready              is not read  wait: it is stopping; if it stays, watch it
 *     starting    starting           any          wait, however long a recovery takes
 *     stopping    stopping           any          wait; after 15 s, kill it
 *     hidden      none that is ours  is read      wait, then give up: another container runs it
 *     absent      none that is ours  is not read  start it
 *
 * Every user checks twice a second, so a killed Postgres is back within two seconds.
 */
import { closeSync } from "node:fs";
import { join, resolve } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Settings } from "../config.ts";
import { explain } from "../errors.ts";
import { waitForLock } from "../lock.ts";
import {
  type ClusterOptions,
  createCluster,
  type DataDir,
  isPrepared,
  openDataDir,
  OtherMajor,
  removeRemnants,
} from "./data-dir.ts";
import {
  isBeingPrepared,
  killPostmaster,
  type Launch,
  observe,
  startPostmaster,
  type State,
  trimLog,
} from "./postmaster.ts";
import { clusterUrl } from "./socket.ts";
import { hasUsers, openWriteEnd, spawnWatcher } from "./watcher.ts";

const MAX_WAIT_MS = 60_000;
const MAX_STOP_MS = 15_000; // the watcher requests a stop for 8 s, then forces it
const MAX_RETRY_MS = 3_000;
const MAX_HIDDEN_MS = 1_500;
const MAX_UNWATCHED_MS = 300;
const MAX_LEAVE_MS = 3_000;
const CHECK_EVERY_MS = 500;
const POLL_MS = 20;

export type Cluster = Awaited<ReturnType<typeof openCluster>>;

/** The embedded Postgres cannot run. The message is one line with the reason and the remedy. */
export class ClusterError extends Error {
  constructor(path: string, cause: unknown) {
    const reason = explain(cause)
      .trim()
      .replace(/\s*\n\s*/g, "; ");
    const isRemedied = cause instanceof OtherMajor;
    const remedy = isRemedied ? "" : "; fix that, or set DATABASE_URL to another Postgres";
    super(`cannot run the embedded Postgres in ${path}: ${reason}${remedy}`, { cause });
  }
}

/**
 * Where the ledger is: DATABASE_URL, or the embedded Postgres of DATA_DIR, which some thread of
 * this process must have open. Call it for every connection: its socket may move.
 */
export function ledgerUrl(settings: Settings<"DATA_DIR" | "DATABASE_URL">): () => string {
  return () => settings.DATABASE_URL ?? clusterUrl(join(settings.DATA_DIR, "postgres"));
}

/** This process as a user of the cluster. */
interface User {
  dataDir: DataDir;
  log: (line: string) => void;
  signal: AbortSignal;
  /** Our end of `users`: while it is open, the watcher keeps Postgres running. */
  writeEnd: number | null;
  /** The postmaster that we joined last. */
  pid: number | null;
}

/**
 * Starts or joins the embedded Postgres in `path` (DATA_DIR/postgres). `log` receives a line for
 * what an operator should know: a cluster is created, Postgres was restarted. Throws ClusterError.
 */
export async function openCluster(
  path: string,
  log: (line: string) => void,
  options: ClusterOptions = {},
) {
  const closing = new AbortController();
  let user: User | null = null;
  try {
    const dataDir = await openDataDir(resolve(path), options);
    user = { dataDir, log, signal: closing.signal, writeEnd: null, pid: null };
    await ensureRunning(user);
  } catch (error) {
    if (user) setWriteEnd(user, null);
    throw new ClusterError(resolve(path), error);
  }
  const { dataDir } = user;
  const monitoring = monitor(user);
  return {
    /** The current URL, for this process: that of a deep folder is of use to no other. */
    url: () => clusterUrl(dataDir.path),
    /** Leaves. For the last user, waits until Postgres has stopped, at most 3 s. */
    async close(): Promise<void> {
      closing.abort();
      await monitoring;
      setWriteEnd(user, null);
      const deadline = Date.now() + MAX_LEAVE_MS;
      while (Date.now() < deadline && !hasUsers(dataDir) && observe(dataDir).pid !== 0)
        await Bun.sleep(POLL_MS);
    },
  };
}

function setWriteEnd(user: User, fd: number | null): void {
  if (user.writeEnd !== null) closeSync(user.writeEnd);
  user.writeEnd = fd;
}

/** Keeps Postgres running until `user.signal` aborts. Logs only the first of several failures. */
async function monitor(user: User): Promise<void> {
  let isFailing = false;
  const options = { ref: false, signal: user.signal };
  while (await delay(CHECK_EVERY_MS, true, options).catch(() => false)) {
    try {
      const before = user.pid;
      await ensureRunning(user);
      if (isFailing || user.pid !== before) user.log("the embedded Postgres is running again");
      isFailing = false;
    } catch (error) {
      if (!isFailing && !user.signal.aborted)
        user.log(new ClusterError(user.dataDir.path, error).message);
      isFailing = true;
    }
  }
}

/** Returns once we use a Postgres that is ready and watched, and throws once `user.signal` aborts. */
async function ensureRunning(user: User): Promise<void> {
  const { dataDir, signal } = user;
  trimLog(dataDir);
  const { state, pid } = observe(dataDir);
  if (state === "ready" && pid === user.pid) return;
  const path = join(dataDir.path, "start.lock");
  const lock = await waitForLock(path, signal, POLL_MS);
  try {
    signal.throwIfAborted();
    removeRemnants(dataDir);
    if (!isPrepared(dataDir)) {
      await untilAbsent(user);
      await createCluster(dataDir, user.log);
    }
    setWriteEnd(user, openWriteEnd(dataDir));
    // If the last user left just before, its watcher stops reading within this time.
    await Bun.sleep(10);
    user.pid = await startOrJoin(user);
  } finally {
    lock?.release();
  }
}

/** Waits for the Postgres of an earlier version, which may be stopping, as long as for any that stops. */
async function untilAbsent({ dataDir, signal }: User): Promise<void> {
  const deadline = Date.now() + MAX_STOP_MS;
  for (; observe(dataDir).pid !== 0 || isBeingPrepared(dataDir); await Bun.sleep(POLL_MS)) {
    signal.throwIfAborted();
    if (Date.now() > deadline)
      throw new Error("an earlier version of this program is using it; stop that first");
  }
}

/** Returns the pid of the postmaster. Requires `start.lock` and an open `writeEnd`. */
async function startOrJoin({ dataDir, signal, pid: lastPid }: User): Promise<number> {
  let launch: Launch | null = null;
  const firstSeen: Partial<Record<State, number>> = {};
  for (; ; await Bun.sleep(POLL_MS)) {
    signal.throwIfAborted();
    const { state, pid } = observe(dataDir);
    const ms = Date.now() - (firstSeen[pid === 0 ? "absent" : state] ??= Date.now());
    if (launch?.hasFailed(ms < MAX_RETRY_MS)) launch = null;
    if (ms > MAX_WAIT_MS && state !== "starting")
      throw new Error(`still ${state} after 60 s; see ${dataDir.path}/postgres.log`);
    switch (state) {
      case "ready":
        return pid;
      case "unwatched":
        if (ms > MAX_UNWATCHED_MS) spawnWatcher(dataDir, "watch", `${pid}`);
        break;
      case "starting":
        break; // a start that is given up makes the next one recover from the beginning
      case "stopping":
        if (ms > MAX_STOP_MS) killPostmaster(dataDir, pid);
        break;
      case "hidden":
        // Ours has not written its postmaster.pid yet, or a dead one's watcher is about to end.
        if (launch || ms < MAX_HIDDEN_MS) break;
        // If we have seen its Postgres, what still reads is the remnant of a killed watcher.
        if (lastPid !== null) launch = startPostmaster(dataDir);
        else if (ms > MAX_RETRY_MS)
          throw new Error("an invisible process uses it, probably in another container");
        break;
      case "absent":
        launch ??= startPostmaster(dataDir);
    }
  }
}
