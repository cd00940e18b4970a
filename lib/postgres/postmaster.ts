/**
 * The first process of the private Postgres: whether it lives, how it starts, why it ended. A pid
 * counts only if its command line names this cluster: pids are used again, in a container at once.
 */
import { lstatSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { firstReason, fromWithin, giveAway, type DataDir } from "./data-dir.ts";
import { type Hold, spawnWatcher } from "./watcher.ts";

const LOG_MAX_BYTES = 4 * 1024 * 1024;

/** Robust rather than fast where a small private instance has the choice. */
const SETTINGS = [
  "listen_addresses=127.0.0.1",
  "unix_socket_directories=",
  "max_connections=100",
  "shared_buffers=128MB",
  "wal_level=minimal",
  "max_wal_senders=0",
  "io_method=sync", // no worker processes
  "huge_pages=off", // asking for them can be deadly under a container's limit
  "dynamic_shared_memory_type=mmap", // /dev/shm is 64 MB in a container, and outlives a kill -9
  "log_checkpoints=off",
  "log_min_error_statement=panic", // statements hold people's data
];

export interface Postmaster {
  pid: number;
  port: number;
  /** Its own word: `starting`, `ready`, `stopping`. */
  status: string;
}

/** Why a start failed, and whether the next may go better; `null` while Postgres runs. */
export type Failure = () => { why: string; mayPass: boolean } | null;

/** The Postgres of this cluster as `postmaster.pid` has it, or `null` when none is alive. */
export function look(home: DataDir): Postmaster | null {
  const lines = textOf(join(home.cluster, "postmaster.pid")).split("\n");
  const pid = Number(lines[0]);
  if (!(pid > 1) || !commandLine(pid).includes(nameOf(home))) return null;
  return { pid, port: Number(lines[3]), status: lines[7]?.trim() || "starting" };
}

/** Starts Postgres under a watcher, which reads what `hold` gets; answers before it is ready. */
export function start(home: DataDir, hold: Hold): Failure {
  const logFrom = trimLog(home);
  const pidFile = join(home.cluster, "postmaster.pid");
  const stale = parseInt(textOf(pidFile));
  // Postgres itself sees that a pid is dead, and then checks its shared memory by this file; only
  // one that lives on as something else would stop it.
  if (stale > 0 && commandLine(stale) !== "") rmSync(pidFile, { force: true });

  const portFile = join(home.dir, "port");
  const before = Number(textOf(portFile));
  const port = freePort(before);
  if (port !== before) writeFileSync(portFile, `${port}\n`, { mode: 0o600 });
  giveAway(portFile, home.runAs);

  const options = [`port=${port}`, nameOf(home), ...SETTINGS].flatMap((line) => ["-c", line]);
  const command = [join(home.native, "bin", "postgres"), "-D", fromWithin(home.cluster)];
  const watcher = spawnWatcher(home, hold, "start", ...command, ...options);
  return () => {
    if (watcher.exitCode === null && watcher.signalCode === null) return null;
    const said = textOf(home.log, logFrom);
    // The children of a killed Postgres keep its shared memory until they notice; a port that was
    // free may be taken by now.
    const mayPass = /still in use|already in use|lock file .* already exists/i.test(said);
    return { why: firstReason(said) || `Postgres ended, and ${home.log} says nothing`, mayPass };
  };
}

/** Empties the log when it has grown; answers how many bytes are in it. */
export function trimLog({ log }: DataDir): number {
  const bytes = lstatSync(log, { throwIfNoEntry: false })?.size ?? 0;
  if (bytes <= LOG_MAX_BYTES) return bytes;
  truncateSync(log);
  return 0;
}

/** What the command line of this cluster's Postgres holds, and of no other. */
function nameOf(home: DataDir): string {
  return `cluster_name=daybook-${lstatSync(home.cluster, { bigint: true }).ino}.`;
}

/** Empty when there is no such process, or only what is left of it until its parent looks. */
function commandLine(pid: number): string {
  if (process.platform !== "linux")
    return Bun.spawnSync(["ps", "-ww", "-o", "command=", "-p", `${pid}`]).stdout.toString();
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8");
  } catch {
    return "";
  }
}

/** `wanted` if it is free, else any other; 0 wants none. */
function freePort(wanted: number): number {
  try {
    const listener = Bun.listen({ hostname: "127.0.0.1", port: wanted, socket: { data() {} } });
    listener.stop(true);
    return listener.port;
  } catch (error) {
    if (wanted === 0) throw error;
    return freePort(0);
  }
}

/** The file's text behind `from` bytes; empty when there is no such file. */
function textOf(path: string, from = 0): string {
  try {
    return readFileSync(path).subarray(from).toString();
  } catch (error) {
    if ((error as { code?: string }).code === "ENOENT") return "";
    throw error;
  }
}
