/**
 * The writer of the journal. Its promise: when `append` returns, the lines are on the disk, and a
 * start after any kind of death finds them.
 *
 * A frame that would make the file larger than a segment may be begins a new one: see `rotate`.
 *
 * Group commit: while one frame is written and synced, all that arrives waits together and shares
 * the next. The order in `commit` is the promise: write, sync, answer.
 *
 * States: open → full (no room: nothing acknowledged, tries again with each append) → open;
 * open → failed (a sync failed: what is on the disk is unknown from here on, so it never syncs
 * again and takes nothing more until the program starts anew and reads the tail).
 */
import { dirname, join } from "node:path";

import { disk as realDisk, type Disk, type JournalFile } from "./disk.ts";
import {
  encodeFrame,
  encodeJournalHeader,
  findFrame,
  JournalDamage,
  type JournalHeader,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  newJournalId,
  parseFrames,
  parseJournalHeader,
} from "./format.ts";
import { listSegments, segmentPath } from "./segments.ts";
import type { Lock } from "../lock.ts";

export const JOURNAL_FILE = "eventsPost.jsonl";
/** Whoever writes the journal, or mends it, holds this. */
export const JOURNAL_LOCK = "eventsPost.lock";
/** The next file, until it gets its name. */
const NEXT_FILE = "eventsPost.next";

/** Appends that wait are put together up to this size: one write stays well under a second. */
const GROUP_BYTES = 8 * 1024 * 1024;
/** A full disk is believed to be full for so long. */
const FULL_MS = 5_000;
const NO_ROOM = new Set(["ENOSPC", "EDQUOT", "EFBIG"]);

/** There is no room for the lines; none is kept. Room makes it work again, without a restart. */
export class JournalFull extends Error {}
/** The journal takes nothing more until the program is started again. */
export class JournalFailed extends Error {}
/** The journal belongs to another process that lives. */
export class JournalHeld extends Error {}

export interface Journal {
  /** Names this journal among all that post to one ledger. */
  readonly id: string;
  /** Its active file. */
  readonly path: string;
  /** The position behind all that is acknowledged: where its last frame ends. */
  end(): number;
  /** Why nothing can be appended now, or `null`. */
  trouble(): string | null;
  /**
   * Puts whole event lines, each with its newline, on the disk together; returns the position
   * behind them. Rejects with JournalFull or JournalFailed: then none of them is acknowledged.
   */
  append(lines: Uint8Array): Promise<number>;
  /** Calls `listener` after each commit. */
  onCommit(listener: (commit: Commit) => void): void;
  /** Finishes what waits, lets go of the file and of the lock. */
  close(): Promise<void>;
}

/** What a commit was, for whoever counts. */
export interface Commit {
  /** The position at which its frame begins, and when it was written. */
  from: number;
  atMs: number;
  bytes: number;
  /** How many appends shared it. */
  appends: number;
  syncMs: number;
}

interface Waiting {
  lines: Uint8Array;
  resolve(position: number): void;
  reject(error: Error): void;
}

/**
 * Opens the journal in `directory`, making what is missing, cutting off a torn last frame. A file is
 * full at `segmentBytes`, and holds one frame at least. Throws
 * JournalHeld, JournalDamage, JournalFull, or what the disk says.
 */
export async function openJournal(
  directory: string,
  say: (line: string) => void,
  disk: Disk = realDisk,
  segmentBytes = Number.POSITIVE_INFINITY,
): Promise<Journal> {
  await disk.makeDirectory(directory);
  const path = join(directory, JOURNAL_FILE);
  const lock = disk.lock(join(directory, JOURNAL_LOCK));
  if (!lock) throw new JournalHeld(`${path} is being written by another process; stop it first`);
  let file: JournalFile | null = null;
  try {
    file = await disk.openForAppend(path);
    const { id, base, end } = await recover(path, file, disk, say);
    return writer({ path, id, base, end, file, lock, disk, segmentBytes });
  } catch (error) {
    await file?.close();
    lock.release();
    if (!NO_ROOM.has(codeOf(error))) throw error;
    const why = `no room (${codeOf(error)}); free some space and start again`;
    throw new JournalFull(`cannot begin ${path}: ${why}`);
  }
}

/** Makes the file begin where the last segment ends, and end behind its last whole frame; synced. */
async function recover(path: string, file: JournalFile, disk: Disk, say: (line: string) => void) {
  const last = (await listSegments(path, disk)).at(-1);
  const size = await disk.size(path);
  const head = await disk.read(path, 0, MAX_HEADER_BYTES);
  let header = parseJournalHeader(head);
  let end = size;
  if (!header) {
    // A start that died while it wrote the header leaves a piece of it, or zeros; a rotation that
    // died leaves no file at all.
    const begun = size < MAX_HEADER_BYTES && !head.includes("\n");
    if (size > 0 && !begun)
      throw new JournalDamage(path, 0, "it does not begin with the header of a journal");
    header = await begin(file, last?.id ?? newJournalId(), last?.to ?? 0);
    end = header.bytes;
  } else if (last && (last.id !== header.id || last.to !== header.base)) {
    const wanted = `the next file begins at ${last.to} of journal ${last.id}`;
    throw new JournalDamage(last.path, last.to - last.base, `${wanted}, and ${path} does not`);
  } else {
    end = await findEnd(path, header.bytes, size, disk);
    if (end < size) {
      say(`${path}: cut off ${size - end} bytes of a frame that was never acknowledged`);
      await file.truncate(end);
    }
  }
  // Also what a killed process wrote but did not sync is about to be built upon.
  await file.sync();
  await disk.syncDirectory(dirname(path));
  return { id: header.id, base: header.base, end };
}

/** Makes an empty file the one that begins at `base` of the journal. */
async function begin(file: JournalFile, id: string, base: number): Promise<JournalHeader> {
  const header = encodeJournalHeader(id, base);
  await file.truncate(0);
  await file.append(header);
  return { id, base, bytes: header.length };
}

/** Reads the frames at the end of the file and returns where the last whole one ends. */
async function findEnd(path: string, first: number, size: number, disk: Disk): Promise<number> {
  // Two of the largest frames: however they lie, a whole frame's header is in here.
  const window = 2 * (MAX_FRAME_BYTES + MAX_HEADER_BYTES);
  let from = Math.max(first, size - window);
  let bytes = await disk.read(path, from, size);
  if (from > first) {
    const skip = findFrame(bytes);
    if (skip < 0) throw new JournalDamage(path, from, "no frame begins in what follows");
    bytes = bytes.subarray(skip);
    from += skip;
  }
  const { end, rest } = parseFrames(bytes);
  if (typeof rest === "object" && rest.behind)
    throw new JournalDamage(path, from + end, rest.fault);
  return from + end;
}

function writer(opened: {
  path: string;
  id: string;
  base: number;
  end: number;
  file: JournalFile;
  lock: Lock;
  disk: Disk;
  segmentBytes: number;
}): Journal {
  const { path, id, lock, disk, segmentBytes } = opened;
  let { file, base, end } = opened;
  /** Whether the active file has a frame: before the first one nothing is full. */
  const hasFrames = () => end > encodeJournalHeader(id, base).length;
  /** Not behind a header that no frame follows yet: nobody would ever post that, and many would wait. */
  const position = () => (hasFrames() ? base + end : base);
  let waiting: Waiting[] = [];
  let committing: Promise<void> | null = null;
  let failed: JournalFailed | null = null;
  let full: JournalFull | null = null;
  let fullAtMs = 0;
  const listeners: ((commit: Commit) => void)[] = [];

  return {
    id,
    path,
    end: position,
    trouble() {
      // Whoever asks before it sends would never send again, and so never learn that there is room.
      if (disk.now() - fullAtMs > FULL_MS) full = null;
      return (failed ?? full)?.message ?? null;
    },
    append(lines) {
      if (failed) return Promise.reject(failed);
      if (lines.length === 0) return Promise.resolve(position());
      if (lines.length > MAX_FRAME_BYTES) return Promise.reject(new RangeError("too much at once"));
      return new Promise((resolve, reject) => {
        waiting.push({ lines, resolve, reject });
        committing ??= commitAll();
      });
    },
    onCommit: (listener) => void listeners.push(listener),
    async close() {
      // A request that was waiting may append again before this goes on: the file must not be
      // closed under a commit.
      while (committing) await committing;
      failed ??= new JournalFailed(`${path} is closed`);
      await file.close();
      lock.release();
    },
  };

  async function commitAll() {
    while (waiting.length > 0) await commit(takeGroup());
    committing = null;
  }

  function takeGroup(): Waiting[] {
    let bytes = 0;
    let count = 0;
    for (const { lines } of waiting) {
      if (count > 0 && bytes + lines.length > GROUP_BYTES) break;
      bytes += lines.length;
      count++;
    }
    const group = waiting.slice(0, count);
    waiting = waiting.slice(count);
    return group;
  }

  async function commit(group: Waiting[]) {
    try {
      if (failed) throw failed;
      const payloads = group.map(({ lines }) => lines);
      const payloadBytes = payloads.reduce((sum, { length }) => sum + length, 0);
      const atMs = disk.now();
      const frame = encodeFrame(payloads, payloadBytes, atMs);
      if (hasFrames() && end + frame.length > segmentBytes) await rotate();
      await write(frame);
      const writtenMs = performance.now();
      await sync();
      const syncMs = performance.now() - writtenMs;
      // Removed, replaced or cut by somebody, it has taken events that nobody finds again.
      if (!file.is(path, end + frame.length)) throw fail("go on with", "somebody changed the file");
      const from = base + end;
      end += frame.length;
      full = null;
      const commit = { from, atMs, bytes: frame.length, appends: group.length, syncMs };
      for (const listener of listeners) listener(commit);
      for (const { resolve } of group) resolve(base + end);
    } catch (error) {
      for (const { reject } of group) reject(error as Error);
    }
  }

  /**
   * The next file is whole and on the disk before the full one gives its name away, and that before
   * the next one takes it. So a crash leaves both files, or the full one alone, never neither.
   */
  async function rotate() {
    const nextPath = join(dirname(path), NEXT_FILE);
    // Until the full file gives its name away nothing has changed, and the next append tries again.
    const next = await disk.openForAppend(nextPath).catch((error) => {
      const code = codeOf(error);
      throw NO_ROOM.has(code)
        ? noRoom(error)
        : new JournalFailed(`cannot make ${nextPath} (${code})`);
    });
    const unlessFull = (error: unknown) => {
      throw NO_ROOM.has(codeOf(error)) ? noRoom(error) : error;
    };
    let header: JournalHeader;
    try {
      header = await begin(next, id, base + end).catch(unlessFull);
      await next.sync();
      await disk.rename(path, segmentPath(path, base)).catch(unlessFull);
      await disk.syncDirectory(dirname(path));
      await disk.rename(nextPath, path);
      await disk.syncDirectory(dirname(path));
      await file.close();
    } catch (error) {
      // A handle that is collected as garbage ends the process.
      await next.close().catch(() => {});
      if (error instanceof JournalFull) throw error;
      throw fail("begin another file after", codeOf(error));
    }
    file = next;
    base = header.base;
    end = header.bytes;
  }

  async function write(frame: Buffer) {
    try {
      await file.append(frame);
    } catch (error) {
      const failure = noRoom(error);
      if (failure === failed) throw failed;
      // Take back the piece that found room: the next frame must begin where the last one ended.
      await file.truncate(end).catch((error) => {
        throw fail("truncate", String(error));
      });
      throw failure;
    }
  }

  /** What it means that bytes could not be written. */
  function noRoom(error: unknown): JournalFull | JournalFailed {
    const code = codeOf(error);
    if (!NO_ROOM.has(code)) return fail("append to", code);
    fullAtMs = disk.now();
    full = new JournalFull(
      `cannot append to ${path}: no room (${code}); free some space and it goes on by itself`,
    );
    return full;
  }

  async function sync() {
    // After a failed sync the kernel may have dropped the dirty pages and answer the next one with
    // success (the fsync trouble that databases met in 2018): there is no second try.
    await file.sync().catch(async (error) => {
      const failure = fail("sync", codeOf(error));
      // A reader whose own sync of the same bytes is answered with success must not find them.
      await file.truncate(end).catch(() => {});
      throw failure;
    });
  }

  function fail(what: string, code: string): JournalFailed {
    failed = new JournalFailed(
      `cannot ${what} ${path} (${code}); nothing more is taken: check the disk, then start again`,
    );
    return failed;
  }
}

function codeOf(error: unknown): string {
  return (error as { code?: string }).code ?? String(error);
}
