/**
 * A lock on a file that a dead process cannot keep: the operating system releases it.
 *
 * Bun has no `flock`, so SQLite acquires the lock (`fcntl` on Unix, `LockFileEx` on Windows) on an
 * empty database file. It also excludes the other threads of the process. Measured: it is free at
 * once after kill -9 of the holder. The file itself stays; its existence means nothing.
 */
import { Database } from "bun:sqlite";

import { requireWritableFolder } from "./errors.ts";

export interface Lock {
  release(): void;
}

/**
 * All locks that are held: a database without references is garbage-collected, and its lock with it.
 * A second processor then followed the same journal, two seconds after the first had begun.
 */
const held = new Set<Database>();

/** Acquires the lock of `path`; `null` when a living process holds it. Never waits. Throws an Error. */
export function tryLock(path: string): Lock | null {
  let db: Database | null = null;
  try {
    db = new Database(path, { create: true });
    db.run("pragma journal_mode = memory");
    db.run("begin exclusive");
    // A read-only file can be opened, but "begin exclusive" does not lock it: really write.
    db.run("pragma user_version = 0");
  } catch (error) {
    db?.close();
    const { code, message } = error as { code?: string; message: string };
    if (code === "SQLITE_BUSY") return null;
    requireWritableFolder(path); // SQLite does not say why
    throw new Error(`cannot lock ${path}: ${message}`);
  }
  const lock = db;
  held.add(lock);
  return {
    release() {
      lock.close();
      held.delete(lock);
    },
  };
}

/** Waits for the lock of `path`, polling every `everyMs`; `null` when `signal` is aborted first. */
export async function waitForLock(
  path: string,
  signal: AbortSignal,
  everyMs = 200,
): Promise<Lock | null> {
  while (!signal.aborted) {
    const lock = tryLock(path);
    if (lock) return lock;
    await Bun.sleep(everyMs);
  }
  return null;
}
