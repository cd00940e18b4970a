/**
 * What the journal asks of the operating system, and nothing else does. It arrives as a value, so
 * that a test can hand in a disk that tears, fills up or lies.
 */
import { constants, fdatasync, fstatSync, fsync, statfsSync, statSync } from "node:fs";
import { mkdir, open, readdir, rename, rm, stat } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import { promisify } from "node:util";

import { type Lock, tryLock } from "../lock.ts";

const syncData = promisify(fdatasync);
const syncAll = promisify(fsync);

/** A file that is open for appending. Every call but `append` is one system call. */
export interface JournalFile {
  /** Writes all of `bytes` at the end; rejects with the `code` of the system (`ENOSPC`, …). */
  append(bytes: Uint8Array): Promise<void>;
  /** Returns once the bytes are on the disk (`fdatasync`). */
  sync(): Promise<void>;
  truncate(bytes: number): Promise<void>;
  /** Whether this file still goes by `path`, and is `bytes` long. */
  is(path: string, bytes: number): boolean;
  close(): Promise<void>;
}

export interface Disk {
  /** Opens `path` for appending; makes it where it is missing. */
  openForAppend(path: string): Promise<JournalFile>;
  /** Syncs a directory, so that the names in it are on the disk too. */
  syncDirectory(path: string): Promise<void>;
  /** Makes `path` and what is above it, each synced into its parent. */
  makeDirectory(path: string): Promise<void>;
  /** The names in a directory. */
  list(path: string): Promise<string[]>;
  rename(from: string, to: string): Promise<void>;
  remove(path: string): Promise<void>;
  /** When the file was last written to, in milliseconds since 1970. */
  modifiedMs(path: string): Promise<number>;
  /** 0 where there is no such file. */
  size(path: string): Promise<number>;
  /** Bytes `from` to `to` of the file, fewer at its end, none where there is no such file. */
  read(path: string, from: number, to: number): Promise<Buffer>;
  /** Syncs bytes that another process may have written, where the file is (still) there. */
  syncFile(path: string): Promise<void>;
  /** Takes the lock of `path` for as long as this process lives, or answers `null`. */
  lock(path: string): Lock | null;
  /** Milliseconds since 1970. */
  now(): number;
}

export const disk: Disk = {
  async openForAppend(path) {
    // Bun.file(path).writer() and Bun.write begin at the start of the file: only a descriptor that
    // is itself open for append appends.
    const handle = await open(path, constants.O_APPEND | constants.O_CREAT | constants.O_WRONLY);
    return {
      async append(bytes) {
        // ENOSPC comes from write() for large pieces and from flush() for small ones; who awaits
        // only one of them hears that all is well. A writer is used once: what a failed one may
        // still hold must not come out later.
        const writer = Bun.file(handle.fd).writer();
        await writer.write(bytes);
        await writer.flush();
      },
      // The asynchronous call: a disk that stalls must not keep GET and /healthz waiting.
      sync: () => syncData(handle.fd),
      truncate: (bytes) => handle.truncate(bytes),
      is(path, bytes) {
        const here = fstatSync(handle.fd);
        const there = statSync(path, { throwIfNoEntry: false });
        return there?.ino === here.ino && there.dev === here.dev && there.size === bytes;
      },
      close: () => handle.close(),
    };
  },
  syncDirectory: (path) => withHandle(path, (fd) => syncAll(fd)),
  async makeDirectory(path) {
    const made = await mkdir(path, { recursive: true });
    if (!made) return;
    for (let at = resolve(path); ; at = dirname(at)) {
      await disk.syncDirectory(dirname(at));
      if (at === resolve(made)) return;
    }
  },
  list: (path) => readdir(path),
  rename,
  remove: (path) => rm(path, { force: true }),
  modifiedMs: async (path) => (await stat(path)).mtimeMs,
  size: (path) =>
    there(
      stat(path).then(({ size }) => size),
      0,
    ),
  read: (path, from, to) =>
    there(
      Bun.file(path)
        .slice(from, to)
        .arrayBuffer()
        .then((bytes) => Buffer.from(bytes)),
      Buffer.alloc(0),
    ),
  syncFile: (path) =>
    there(
      withHandle(path, (fd) => syncData(fd)),
      undefined,
    ),
  lock: tryLock,
  now: () => Date.now(),
};

/** So much of a disk is left alone, or a twentieth of a small one. */
const LEFT_BYTES = 64 * 1024 * 1024;

/**
 * `disk` for a journal that shares it with the private Postgres: an append finds no room while there
 * is still some for what has been acknowledged to be posted. With the last byte taken Postgres fails
 * again and again, until it has no room for its own log either and goes down, and reads with it.
 */
export function leavingRoom(disk: Disk): Disk {
  return {
    ...disk,
    async openForAppend(path) {
      const file = await disk.openForAppend(path);
      return {
        ...file,
        async append(bytes) {
          const { bsize, blocks, bavail } = statfsSync(dirname(path)); // 8 µs
          const left = Math.min(LEFT_BYTES, (blocks * bsize) / 20);
          // Some file systems know no size.
          if (blocks > 0 && bavail * bsize - bytes.length < left)
            throw Object.assign(new Error("left to Postgres"), { code: "ENOSPC" });
          await file.append(bytes);
        },
      };
    },
  };
}

/** What is found, or `otherwise` where there is no such file. */
async function there<T>(found: Promise<T>, otherwise: T): Promise<T> {
  try {
    return await found;
  } catch (error) {
    if ((error as { code?: string }).code === "ENOENT") return otherwise;
    throw error;
  }
}

async function withHandle<T>(path: string, use: (fd: number) => Promise<T>): Promise<T> {
  const handle = await open(path, "r");
  try {
    return await use(handle.fd);
  } finally {
    await handle.close();
  }
}
