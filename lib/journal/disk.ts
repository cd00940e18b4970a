/**
 * Everything the journal asks of the operating system. It is passed in as a value, so that a test can
 * pass a disk that tears writes, fills up or lies.
 */
import * as fs from "node:fs";
import { constants, fstatSync, statfsSync, statSync } from "node:fs";
import { link, mkdir, readdir, rename, rm, stat } from "node:fs/promises";
import { dirname, resolve } from "node:path";

import { type Lock, tryLock } from "../lock.ts";

/** An open file. It stays readable when it is renamed or removed. */
export interface ReadableFile {
  /** Its length when it was opened. */
  readonly bytes: number;
  /** Bytes `from` to `to`, fewer at the end of what was there when it was opened. */
  read(from: number, to: number): Promise<Buffer>;
}

/** A file that is open for appending. Every call but `append` is one system call. */
export interface JournalFile extends ReadableFile {
  /** Writes all of `bytes` at the end; rejects with the system's `code` (`ENOSPC`, …). */
  append(bytes: Uint8Array): Promise<void>;
  /** Returns once the bytes are on the disk (`fdatasync`). */
  sync(): Promise<void>;
  truncate(bytes: number): Promise<void>;
  /** Whether `path` is still the name of this file, and the file is `bytes` long. */
  is(path: string, bytes: number): boolean;
  close(): Promise<void>;
}

export interface Disk {
  /** Opens `path` for appending; creates it where it is missing. */
  openForAppend(path: string): Promise<JournalFile>;
  /** Calls `use` with the file open for reading, and closes it; `null` if the file does not exist. */
  withFile<T>(path: string, use: (file: ReadableFile) => T | Promise<T>): Promise<T | null>;
  /** Syncs a directory, so that the names in it are on the disk too. */
  syncDirectory(path: string): Promise<void>;
  /** Creates `path` and the directories above it, each synced into its parent. Nobody else may enter `path`. */
  makeDirectory(path: string): Promise<void>;
  /** The names in a directory. */
  list(path: string): Promise<string[]>;
  rename(from: string, to: string): Promise<void>;
  remove(path: string): Promise<void>;
  /** When the file was last written to, in milliseconds since 1970. */
  modifiedMs(path: string): Promise<number>;
  /** 0 if the file does not exist. */
  size(path: string): Promise<number>;
  /** Syncs bytes that another process may have written, if the file is (still) there. */
  syncFile(path: string): Promise<void>;
  /** Acquires the lock of `path` for the life of this process; `null` when another process holds it. */
  lock(path: string): Lock | null;
  /** Milliseconds since 1970. */
  now(): number;
  /** Returns in the next turn of the event loop: requests that are ready now are read before. */
  turn(): Promise<void>;
}

export const disk: Disk = {
  async openForAppend(path) {
    // Bun.file(path).writer() and Bun.write begin at the start of the file: only a descriptor that
    // is itself open for append appends.
    const handle = await open(path, constants.O_APPEND | constants.O_CREAT | constants.O_RDWR);
    reserveDescriptors();
    closeFileToOthers(handle.fd);
    return {
      ...readable(handle),
      async append(bytes) {
        // Not Bun.file(handle.fd).writer(): that duplicates the descriptor, and fails when no descriptor is left.
        for (let at = 0; at < bytes.length;) at += await handle.write(bytes, at, bytes.length - at);
      },
      // The asynchronous call: a disk that stalls must not block GET and /healthz.
      sync: () => handle.datasync(),
      truncate: (bytes) => handle.truncate(bytes),
      is(path, bytes) {
        const here = fstatSync(handle.fd);
        const there = statSync(path, { throwIfNoEntry: false });
        return there?.ino === here.ino && there.dev === here.dev && there.size === bytes;
      },
      close: () => handle.close(),
    };
  },
  withFile: (path, use) => ifExists(path, (handle) => use(readable(handle))),
  async syncDirectory(path) {
    await withHandle(path, (handle) => handle.sync()).catch((error) => {
      if ((error as NodeJS.ErrnoException).code !== "EINVAL") throw error;
      throw Object.assign(
        new Error(
          `cannot sync the folder ${path}: its file system does not support that (EINVAL), so a power cut ` +
            "could take new files with it; use a DATA_DIR on a local disk (ext4, XFS, Btrfs, APFS)",
        ),
        { code: "EINVAL" },
      );
    });
  },
  async makeDirectory(path) {
    const made = await mkdir(path, { recursive: true, mode: 0o700 });
    if (!made) return closeToOthers(path);
    for (let at = resolve(path); ; at = dirname(at)) {
      await disk.syncDirectory(dirname(at));
      if (at === resolve(made)) return;
    }
  },
  list: (path) => readdir(path),
  rename,
  remove: (path) => rm(path, { force: true }),
  modifiedMs: async (path) => (await stat(path)).mtimeMs,
  size: async (path) => statSync(path, { throwIfNoEntry: false })?.size ?? 0,
  async syncFile(path) {
    await ifExists(path, (handle) => handle.datasync());
  },
  lock: tryLock,
  now: () => Date.now(),
  turn: () => new Promise((resolve) => void setImmediate(resolve)),
};

/** Copies a file. It appears at `to` whole, and synced but for its directory. */
export async function copyFile(from: string, to: string): Promise<void> {
  const making = `${to}.copying`;
  await fs.promises.copyFile(from, making);
  await withHandle(making, (handle) => handle.sync());
  await rename(making, to);
}

/** Another file system, one without links, too many links, or a file of another user. */
const CANNOT_LINK = new Set(["EXDEV", "EPERM", "EMLINK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"]);

/** Gives a file a second name, or copies it where that is impossible. Does nothing if it is gone. */
export async function linkFile(from: string, to: string): Promise<void> {
  try {
    await link(from, to);
  } catch (error) {
    const { code = "" } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" && !fs.existsSync(from)) return;
    if (!CANNOT_LINK.has(code)) throw error;
    await copyFile(from, to);
  }
}

/** What 0.1.0 has made may be readable to others. What is another user's, or no file, stays as it is. */
function closeFileToOthers(fd: number): void {
  const stat = fstatSync(fd);
  if (stat.isFile() && isOurs(stat)) fs.fchmodSync(fd, 0o600);
}

/** The same for a folder. One that others use too, as /tmp, stays as it is. */
function closeToOthers(path: string): void {
  const stat = statSync(path);
  const isShared = (stat.mode & 0o1000) !== 0 || dirname(resolve(path)) === resolve(path);
  if (!isShared && stat.isDirectory() && isOurs(stat)) fs.chmodSync(path, 0o700);
}

function isOurs({ uid, mode }: fs.Stats): boolean {
  return uid === process.getuid?.() && (mode & 0o077) !== 0;
}

const MAX_RESERVED_BYTES = 64 * 1024 * 1024;

/** How much of a disk of `size` bytes the journal leaves free for the embedded Postgres. */
export function reservedBytes(size: number): number {
  return Math.min(MAX_RESERVED_BYTES, size / 20);
}

/** What is free on the disk of `path`, for this user, and its size: 0 where the file system reports none. */
export function diskSpace(path: string): { free: number; size: number } {
  const { bsize, blocks, bavail } = statfsSync(path); // 8 µs
  return { free: bavail * bsize, size: blocks * bsize };
}

/**
 * `disk` for a journal that shares it with the embedded Postgres: an append finds no room while there
 * is still enough to post what has been acknowledged. When Postgres gets the last byte it fails again
 * and again, until it has no room for its own log either and goes down, and reads with it.
 */
export function leavingRoom(disk: Disk): Disk {
  return {
    ...disk,
    async openForAppend(path) {
      const file = await disk.openForAppend(path);
      return {
        ...file,
        async append(bytes) {
          const { free, size } = diskSpace(dirname(path));
          if (size > 0 && free - bytes.length < reservedBytes(size))
            throw Object.assign(new Error("reserved for Postgres"), { code: "ENOSPC" });
          await file.append(bytes);
        },
      };
    },
  };
}

/** An open file: each method is one system call. */
type Handle = ReturnType<typeof handleOf>;

function handleOf(fd: number) {
  return {
    fd,
    read: (bytes: Buffer, from: number) =>
      call<number>((done) => fs.read(fd, bytes, 0, bytes.length, from, done)),
    write: (bytes: Uint8Array, at: number, length: number) =>
      call<number>((done) => fs.write(fd, bytes, at, length, null, done)),
    datasync: () => call<void>((done) => fs.fdatasync(fd, done)),
    sync: () => call<void>((done) => fs.fsync(fd, done)),
    truncate: (bytes: number) => call<void>((done) => fs.ftruncate(fd, bytes, done)),
    async close() {
      if (!isReserving || reserve.length === RESERVED)
        return call<void>((done) => fs.close(fd, done));
      // Both at once, before a connection takes it.
      fs.closeSync(fd);
      reserveDescriptors();
    },
  };
}

function call<T>(start: (done: (error: Error | null, result?: T) => void) => void): Promise<T> {
  return new Promise((resolve, reject) => {
    start((error, result) => (error ? reject(error) : resolve(result as T)));
  });
}

/**
 * Descriptors for the next file of the journal and its directory, held by a process that writes one:
 * connections may have used up all others.
 */
const RESERVED = 2;
const reserve: number[] = [];
let isReserving = false;

function reserveDescriptors(): void {
  isReserving = true;
  try {
    while (reserve.length < RESERVED) reserve.push(fs.openSync("/dev/null", "r"));
  } catch {
    // There is none now: the next time that a file is closed.
  }
}

async function open(path: string, flags: string | number): Promise<Handle> {
  try {
    return handleOf(await call<number>((done) => fs.open(path, flags, done)));
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    const reserved = code === "EMFILE" || code === "ENFILE" ? reserve.pop() : undefined;
    if (reserved === undefined) throw error;
    fs.closeSync(reserved); // and opened at once, before a connection takes it
    return handleOf(fs.openSync(path, flags));
  }
}

function readable(handle: Handle): ReadableFile {
  const { size } = fstatSync(handle.fd);
  return {
    bytes: size,
    async read(from, to) {
      const bytes = Buffer.allocUnsafe(Math.max(0, Math.min(to, size) - from));
      return bytes.subarray(0, await handle.read(bytes, from));
    },
  };
}

/** What `use` returns for the open file; `null` if the file does not exist. */
async function ifExists<T>(path: string, use: (handle: Handle) => T | Promise<T>) {
  try {
    return await withHandle(path, use);
  } catch (error) {
    const { code, path: missing } = error as NodeJS.ErrnoException;
    if (code === "ENOENT" && missing === path) return null;
    throw error;
  }
}

async function withHandle<T>(path: string, use: (handle: Handle) => T | Promise<T>) {
  const handle = await open(path, "r");
  try {
    return await use(handle);
  } finally {
    await handle.close();
  }
}
