/**
 * The watcher stops the embedded Postgres after its last user has left or died.
 *
 * The watcher is the shell script below. It starts Postgres as its child and reads the FIFO `users`,
 * of which every user holds the write end. The operating system closes what a dead process had
 * open, so end of file on `users` means that no user is left, even after kill -9. Watcher and
 * Postgres run in a session of their own, so neither Ctrl-C nor the death of a user reaches them.
 *
 * A FIFO with a reader also proves that a Postgres runs, even one in another container, whose pid
 * cannot be seen from here.
 *
 * Alternatives that lost: a Bun process as watcher (40 MB); a lock or pid file for each user (needs
 * polling, and a reused pid keeps Postgres alive for ever); a watching connection inside Postgres
 * (dies with the backends when one of them crashes).
 */
import { closeSync, constants, existsSync, openSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { runAsSelf } from "./binaries.ts";
import type { DataDir } from "./data-dir.ts";

const { O_RDONLY, O_WRONLY, O_NONBLOCK, O_APPEND, O_CREAT } = constants;

/**
 * `start COMMAND…` runs Postgres and watches it; `watch PID` watches one that is running. Standard
 * input is `users`. INT requests Postgres' fast shutdown; it is repeated because a Postgres that is
 * just starting ignores it. The script exits once `postmaster.pid` names another process, and kills
 * its reader once Postgres has ended, so it never signals a pid that was reused.
 */
const SCRIPT = `
umask 077
stop_after_last_user() {
  while read -r _; do :; done
  exec </dev/null
  for signal in INT INT INT INT INT INT INT INT QUIT QUIT KILL; do
    [ -f postmaster.pid ] && read -r pid <postmaster.pid && [ "$pid" != "$1" ] && exit
    kill -$signal "$1" || exit
    sleep 1 & trap 'kill $!; wait; exit' TERM
    wait
  done
}
verb=$1; shift
[ $verb = watch ] && { stop_after_last_user "$1"; exit; }
exec 3<&0 </dev/null >&2
"$@" 3<&- & postgres=$!
{ exec <&3 3<&- 2>/dev/null; stop_after_last_user $postgres; } & reader=$!
exec 3<&-
wait $postgres
kill $reader
wait $reader`;

/** Starts the script above with `args`. The caller must hold a write end of `users`. */
export function spawnWatcher({ path, runAs }: DataDir, ...args: string[]): Bun.Subprocess {
  const reader = openSync(join(path, "users"), O_RDONLY); // blocks if nobody holds a write end
  const log = openSync(join(path, "postgres.log"), O_WRONLY | O_APPEND | O_CREAT, 0o600);
  try {
    const watcher = Bun.spawn(["sh", "-c", SCRIPT, "daybook-watcher", ...args], {
      ...runAs,
      cwd: join(path, "cluster"),
      stdio: [reader, "ignore", log],
      detached: true,
    });
    watcher.unref();
    return watcher;
  } finally {
    closeSync(reader);
    closeSync(log);
  }
}

/** Opens a write end of `users`, and creates the FIFO first if necessary. Requires `start.lock`. */
export function openWriteEnd({ path }: DataDir): number {
  const users = join(path, "users");
  if (!existsSync(users)) {
    const mkfifo = Bun.spawnSync(["mkfifo", "-m", "600", "users"], { ...runAsSelf, cwd: path });
    if (!mkfifo.success) throw new Error(mkfifo.stderr.toString() || "mkfifo failed");
  }
  // Opening for writing fails while nobody reads, so be that reader for a moment.
  const reader = openSync(users, O_RDONLY | O_NONBLOCK);
  try {
    return openSync(users, O_WRONLY);
  } finally {
    closeSync(reader);
  }
}

/** Whether a watcher reads `users`, of whichever Postgres. */
export function isWatched({ path }: DataDir): boolean {
  try {
    closeSync(openSync(join(path, "users"), O_WRONLY | O_NONBLOCK));
    return true;
  } catch (error) {
    if (["ENXIO", "ENOENT"].includes((error as { code: string }).code)) return false;
    throw error;
  }
}

/** Whether a user is left. Nobody writes to `users`, so a read finds its end, or EAGAIN. */
export function hasUsers({ path }: DataDir): boolean {
  try {
    readFileSync(join(path, "users"), { flag: O_RDONLY | O_NONBLOCK });
    return false;
  } catch (error) {
    return (error as { code?: string }).code === "EAGAIN";
  }
}
