/**
 * The watcher of the private Postgres stops it when the last user has gone, however that died.
 *
 * A user (us) starts the shell script below; the script starts Postgres and reads the FIFO `users`,
 * which each user holds open for writing. The operating system closes what a dead process had open,
 * so the end of that FIFO means that no user is left. Watcher and Postgres have a session of their
 * own: no Ctrl-C and no death of a user reaches them. As the watcher is its parent, Postgres never
 * runs unwatched.
 */
import { closeSync, constants, existsSync, openSync, readSync } from "node:fs";
import { postgresEnv } from "./binaries.ts";
import type { DataDir } from "./data-dir.ts";

const { O_RDONLY, O_WRONLY, O_NONBLOCK } = constants;

/**
 * `start COMMAND…` runs Postgres and watches; `watch PID` watches one that runs already. Standard
 * input is `users`. INT is Postgres's fast shutdown; it is repeated because a Postgres that has
 * only just begun does not hear it yet. After `wait` nobody signals a pid that may be another's.
 */
const SCRIPT = `
umask 077
leave() {
  while read -r _; do :; done
  exec </dev/null
  for signal in INT INT INT INT INT INT INT INT QUIT QUIT KILL; do
    [ -f postmaster.pid ] && read -r now <postmaster.pid && [ "$now" != "$1" ] && exit
    kill -$signal "$1" || exit
    sleep 1 & trap 'kill $!; wait; exit' TERM
    wait
  done
}
verb=$1; shift
exec 2>>../postgres.log
[ $verb = watch ] && { leave "$1"; exit; }
exec 3<&0 </dev/null >&2
"$@" 3<&- & postgres=$!
{ exec <&3 3<&- 2>/dev/null; leave $postgres; } & reader=$!
exec 3<&-
wait $postgres
kill $reader
wait $reader`;

/** Takes our end of `users` and closes the one before it: there is no moment without one. */
export type Hold = (users: number) => void;

/** Starts the script above; `hold` has our end of `users` before the script could see the end. */
export function spawnWatcher(home: DataDir, hold: Hold, ...args: string[]): Bun.Subprocess {
  // A FIFO opens for writing only when someone reads, and for blocking reads only when someone
  // writes: so first a reader that does not wait, which makes way for the one that does.
  const opener = openSync(home.users, O_RDONLY | O_NONBLOCK);
  hold(openSync(home.users, O_WRONLY | O_NONBLOCK));
  const reader = openSync(home.users, O_RDONLY);
  closeSync(opener);
  try {
    const child = Bun.spawn(["sh", "-c", SCRIPT, "daybook-watcher", ...args], {
      ...home.runAs,
      cwd: home.cluster,
      env: postgresEnv,
      stdio: [reader, "ignore", "ignore"],
      detached: true,
    });
    child.unref();
    return child;
  } finally {
    closeSync(reader);
  }
}

/** Makes the FIFO unless it is there. To be called by one process at a time. */
export function makeUsers(home: DataDir): void {
  if (existsSync(home.users)) return;
  const options = { ...home.runAs, cwd: home.dir, env: postgresEnv };
  const made = Bun.spawnSync(["mkfifo", "-m", "600", "users"], options);
  if (!made.success) throw new Error(made.stderr.toString() || "mkfifo failed");
}

/** A descriptor of `users` for writing, or `null` when nobody reads it: no watcher lives. */
export function openUsers(home: DataDir): number | null {
  try {
    return openSync(home.users, O_WRONLY | O_NONBLOCK);
  } catch (error) {
    if (["ENXIO", "ENOENT"].includes((error as { code: string }).code)) return null;
    throw error;
  }
}

/** Whether a watcher lives, of whichever Postgres. */
export function isWatched(home: DataDir): boolean {
  const fd = openUsers(home);
  if (fd !== null) closeSync(fd);
  return fd !== null;
}

/** Whether any user is left. Nobody writes to `users`: reading gives its end, or "nothing yet". */
export function hasUsers(home: DataDir): boolean {
  if (!existsSync(home.users)) return false;
  const fd = openSync(home.users, O_RDONLY | O_NONBLOCK);
  try {
    return readSync(fd, new Uint8Array(1)) > 0;
  } catch (error) {
    return (error as { code?: string }).code === "EAGAIN";
  } finally {
    closeSync(fd);
  }
}
