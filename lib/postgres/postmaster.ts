/**
 * The postmaster, the first process of the embedded Postgres: whether it runs, how it starts, why it
 * failed. A pid counts only if its command line names this cluster, because pids are reused, and in
 * a restarted container immediately.
 */
import {
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  readFileSync,
  readSync,
  statfsSync,
  truncateSync,
} from "node:fs";
import { runAsSelf } from "./binaries.ts";
import { clusterName, type DataDir, firstReason, inCluster, pathFromInside } from "./data-dir.ts";
import { socketSettings } from "./socket.ts";
import { isWatched, spawnWatcher } from "./watcher.ts";

const MAX_LOG_BYTES = 4 * 1024 * 1024;

/** Where a small instance has the choice, robust rather than fast. */
const SETTINGS = [
  "listen_addresses=", // any local user could take the port of one that has died, and be sent the password
  "unix_socket_permissions=0700",
  "max_connections=100",
  "shared_buffers=128MB",
  "wal_level=minimal",
  "max_wal_senders=0",
  "io_method=sync", // no worker processes
  "huge_pages=off", // requesting them can get Postgres killed under a container's memory limit
  "dynamic_shared_memory_type=mmap", // /dev/shm has 64 MB in a container, and outlives a kill -9
  "log_checkpoints=off",
  "log_min_error_statement=panic", // statements contain people's data
];

/**
 * On a small disk, checkpoints come before the write-ahead log fills it, and a sort fails before its
 * temporary files do. (`max_wal_size` bounds nothing that is written within one checkpoint.)
 */
function diskSettings(path: string): string[] {
  const { blocks, bsize } = statfsSync(path);
  const mib = Math.floor((blocks * bsize) / 1024 / 1024);
  if (mib === 0) return []; // some file systems report no size
  const walMib = Math.max(64, Math.min(1024, Math.floor(mib / 20)));
  return [
    `max_wal_size=${walMib}MB`,
    `min_wal_size=${Math.min(80, walMib)}MB`,
    `temp_file_limit=${Math.max(16, Math.floor(mib / 20))}MB`,
  ];
}

/** See the table in cluster.ts. */
export type State = "ready" | "unwatched" | "starting" | "stopping" | "hidden" | "absent";

/** A start of Postgres. */
export type Launch = ReturnType<typeof startPostmaster>;

/** The state of this cluster's Postgres, and its pid: 0 if it is not in sight. */
export function observe(dataDir: DataDir): { state: State; pid: number } {
  const lines = pidFileOf(dataDir).split("\n");
  const pid = Number(lines[0]);
  const isRead = isWatched(dataDir);
  if (!(pid > 1) || !commandLine(pid).includes(clusterName(dataDir)))
    return { state: isRead ? "hidden" : "absent", pid: 0 };
  const status = lines[7]?.trim() || "starting"; // Postgres' own words
  return { state: status === "ready" && !isRead ? "unwatched" : (status as State), pid };
}

/** Whether the preparation of a process that has died still runs: its pid is negative. */
export function isBeingPrepared(dataDir: DataDir): boolean {
  const pid = -parseInt(pidFileOf(dataDir));
  return pid > 1 && commandLine(pid).includes(clusterName(dataDir));
}

/** Starts Postgres under a watcher, and returns before it is ready. */
export function startPostmaster(dataDir: DataDir) {
  const { path, native } = dataDir;
  const logOffset = trimLog(dataDir);
  const stalePid = parseInt(pidFileOf(dataDir));
  // Postgres handles the file of a dead pid itself, and uses it to check its shared memory. It
  // refuses to start only if the pid now belongs to another process. That of its socket has no use.
  const stale = [".s.PGSQL.5432.lock"];
  if (stalePid > 0 && commandLine(stalePid) !== "") stale.push("postmaster.pid");
  Bun.spawnSync(["rm", "-f", ...stale], inCluster(dataDir));

  const named = [...socketSettings(dataDir), clusterName(dataDir)];
  const command = [`${native}/bin/postgres`, "-D", pathFromInside(`${path}/cluster`)];
  const ours = [...SETTINGS, ...diskSettings(path)];
  for (const setting of [...named, ...ours, ...dataDir.settings]) command.push("-c", setting);
  const watcher = spawnWatcher(dataDir, "start", ...command);
  return {
    /** Throws the reason if Postgres has ended, and a retry cannot succeed or `mayRetry` is false. */
    hasFailed(mayRetry: boolean): boolean {
      if (watcher.exitCode === null && watcher.signalCode === null) return false;
      const log = textOf(`${path}/postgres.log`, logOffset);
      // The children of a killed Postgres keep its shared memory until they notice.
      if (mayRetry && /still in use|already in use|lock file .* already exists/i.test(log))
        return true;
      throw new Error(firstReason(log) || "Postgres ended without a message");
    },
  };
}

/** Empties the log once it exceeds MAX_LOG_BYTES. Returns its size in bytes. */
export function trimLog({ path }: DataDir): number {
  const log = `${path}/postgres.log`;
  const bytes = lstatSync(log, { throwIfNoEntry: false })?.size ?? 0;
  if (bytes <= MAX_LOG_BYTES) return bytes;
  truncateSync(log);
  return 0;
}

/** Empty for a process that does not exist, or that has ended and is not reaped yet. */
function commandLine(pid: number): string {
  if (process.platform === "linux") return textOf(`/proc/${pid}/cmdline`);
  return Bun.spawnSync(
    ["ps", "-ww", "-o", "command=", "-p", `${pid}`],
    runAsSelf,
  ).stdout.toString();
}

/** `postmaster.pid`, in the folder of the user that runs Postgres: no link is followed, no FIFO waited for. */
function pidFileOf({ path }: DataDir): string {
  const { O_RDONLY, O_NOFOLLOW, O_NONBLOCK } = constants;
  let fd: number;
  try {
    fd = openSync(`${path}/cluster/postmaster.pid`, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
  } catch (error) {
    if (["ENOENT", "ENOTDIR", "ELOOP", "ENXIO"].includes((error as { code: string }).code))
      return "";
    throw error;
  }
  try {
    const bytes = Buffer.alloc(8192);
    return fstatSync(fd).isFile() ? bytes.toString("utf8", 0, readSync(fd, bytes)) : "";
  } finally {
    closeSync(fd);
  }
}

/** Signals as the user that runs Postgres: its pid is known from a file of that user. */
export function killPostmaster({ runAs }: DataDir, pid: number): void {
  Bun.spawnSync(["kill", "-KILL", `${pid}`], { ...runAs, cwd: "/" });
}

/** The file's text from `offset` on; empty if file or process is gone or another user's. */
function textOf(path: string, offset = 0): string {
  try {
    return readFileSync(path).subarray(offset).toString();
  } catch (error) {
    const { code } = error as { code: string };
    if (["ENOENT", "ESRCH", "EACCES", "EPERM"].includes(code)) return "";
    throw error;
  }
}
