/**
 * A lock on a file that a dead process cannot keep: the operating system lets go of it.
 *
 * Bun has no `flock`, so SQLite takes the lock (`fcntl` on Unix, `LockFileEx` on Windows) on an
 * empty database file. It also holds between the threads of one process. Measured: free again at
 * once after kill -9 of the holder. The file itself stays; it says nothing by being there.
 */
import { Database } from "bun:sqlite";

export interface Lock {
  release(): void;
}

/**
 * All that are held: a database that nobody refers to is collected, and its lock with it. A second
 * processor then followed the same journal, two seconds after the first had begun.
 */
const held = new Set<Database>();

/** Takes the lock of `path`, or answers `null` when somebody alive has it. Never waits. */
export function tryLock(path: string): Lock | null {
  let db: Database | null = null;
  try {
    db = new Database(path, { create: true });
    db.run("pragma journal_mode = memory");
    db.run("begin exclusive");
    // A file that may only be read is opened all the same, and locked by nobody: really write.
    db.run("pragma user_version = 0");
  } catch (error) {
    db?.close();
    const { code, message } = error as { code?: string; message: string };
    if (code === "SQLITE_BUSY") return null;
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

/** Waits for the lock of `path`, asking every `everyMs`, until `signal` says to stop (`null`). */
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
