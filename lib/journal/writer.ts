/**
 * The writer of the journal. It promises: when `append` resolves, the lines are on the disk, and the
 * next start finds them, however this process dies.
 *
 * A frame that would make the file larger than a segment may be begins a new file: see `rotate`.
 *
 * Group commit: while one frame is written and synced, everything that arrives waits together and
 * shares the next one. So does what arrives in one turn of the event loop. The order in `commit` is the
 * promise: write, sync, answer.
 *
 * States: open → troubled (nothing could be written: nothing is acknowledged, and the next append tries
 * again) → open; open → failed (a sync failed: what is on the disk is unknown from then on, so it never
 * syncs again and accepts nothing more until the program is restarted and reads the tail).
 */
import { dirname, join } from "node:path";

import { freeBytes } from "../buffers.ts";
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
  toFrameTime,
} from "./format.ts";
import { fileJournals, type Journals } from "./reader.ts";
import { listSegments, type Segment, segmentPath } from "./segments.ts";
import type { Lock } from "../lock.ts";

export const JOURNAL_FILE = "eventsPost.jsonl";
/** Held by the process that writes or repairs the journal. */
export const JOURNAL_LOCK = "eventsPost.lock";
/** The next file, until it is renamed to `eventsPost.jsonl`. */
const NEXT_FILE = "eventsPost.next";

/** Waiting appends share a frame of up to this size: one write stays well under a second. */
export const MAX_GROUP_BYTES = 8 * 1024 * 1024;
/** Larger frames are rare. */
const FRAME_BUFFER_BYTES = 2 * 1024 * 1024;
/** Trouble is reported for this long after an append failed. */
const TROUBLE_MS = 5_000;
const NO_ROOM = new Set(["ENOSPC", "EDQUOT", "EFBIG"]);
/** All descriptors of this process, or of the system, are in use. */
const NO_DESCRIPTOR = new Set(["EMFILE", "ENFILE"]);
/** In the middle of a rotation, a descriptor is waited for up to a minute. */
const DESCRIPTOR_PAUSE_MS = 100;
const DESCRIPTOR_TRIES = 600;

/** There is no room for the lines; none of them is stored. It resumes without a restart once there is room. */
export class JournalFull extends Error {}
/** The lines could not be written, for another reason; none of them is stored. The next append tries again. */
export class JournalBusy extends Error {}
/** The journal accepts nothing more until the program is restarted. */
export class JournalFailed extends Error {}
/** What belongs to a source was not stored, because this server writes another journal by now. */
export class JournalMoved extends Error {}

export interface Journal {
  /**
   * Identifies this journal among all that post to one ledger. It changes when a server continues in another
   * journal of the stream; what `append` resolves to is a position in the one of that moment.
   */
  readonly id: string;
  /** This journal, and in a stream those of other servers, for reading. */
  readonly journals: Journals;
  /** Whether `journals` has those of other servers. */
  readonly isShared: boolean;
  /** What is longer may be stored in several commits. */
  readonly maxFrameBytes: number;
  /** The position after everything that is acknowledged: where the last frame ends. */
  end(): number;
  /** Why nothing can be appended now, or `null`. */
  trouble(): string | null;
  /**
   * Stores whole event lines, each with its newline; resolves to the position after them. A part that fits
   * into a frame is stored whole. Rejects with JournalFull, JournalBusy, JournalMoved or JournalFailed: then
   * none of them is acknowledged.
   */
  append(...parts: Uint8Array[]): Promise<number>;
  /** Calls `listener` after each commit. */
  onCommit(listener: (commit: Commit) => void): void;
  /** Finishes the waiting appends, closes the file and releases the lock. */
  close(): Promise<void>;
}

/** What a commit did, for the metrics. */
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
  parts: Uint8Array[];
  bytes: number;
  resolve(position: number): void;
  reject(error: Error): void;
}

/**
 * Opens the journal in `directory`: creates what is missing, and truncates a torn last frame. A file is
 * full at `segmentBytes`, but holds at least one frame. Throws JournalDamage, JournalFull, or an
 * Error: another process writes it, or what the disk says.
 */
export async function openJournal(options: {
  directory: string;
  say?: (line: string) => void;
  disk?: Disk;
  segmentBytes?: number;
}): Promise<Journal> {
  const { directory, say = () => {}, disk = realDisk, segmentBytes = Infinity } = options;
  await disk.makeDirectory(directory);
  const path = join(directory, JOURNAL_FILE);
  const lock = disk.lock(join(directory, JOURNAL_LOCK));
  if (!lock) throw new Error(`${path} is being written by another process; stop it first`);
  let file: JournalFile | null = null;
  try {
    file = await disk.openForAppend(path);
    const last = (await listSegments(path, disk)).at(-1);
    const { header, end, tornBytes } = await recover(path, file, last);
    // Also what a killed process wrote but did not sync is about to be built upon.
    await file.sync();
    await disk.syncDirectory(directory);
    if (tornBytes > 0)
      say(`${path}: cut off ${tornBytes} bytes of a frame that was never acknowledged`);
    return writer({ path, file, header, end, lock, disk, segmentBytes });
  } catch (error) {
    await file?.close();
    lock.release();
    if (!NO_ROOM.has(codeOf(error))) throw error;
    const why = `no room (${codeOf(error)}); free some space and start again`;
    throw new JournalFull(`cannot begin ${path}: ${why}`);
  }
}

/** Makes the file begin where the last segment ends, and end after its last whole frame. */
async function recover(path: string, file: JournalFile, last: Segment | undefined) {
  const head = await file.read(0, MAX_HEADER_BYTES);
  const header = parseJournalHeader(head);
  if (!header) {
    // A start that died while it wrote the header leaves a piece of it, or zeros; a rotation that
    // died leaves no file at all.
    if (file.bytes >= MAX_HEADER_BYTES || head.includes("\n"))
      throw new JournalDamage(path, 0, "it does not begin with the header of a journal");
    const begun = await begin(file, last?.id ?? newJournalId(), last?.to ?? 0);
    return { header: begun, end: begun.bytes, tornBytes: 0 };
  }
  if (last && (last.id !== header.id || last.to !== header.base)) {
    const required = `the next file begins at ${last.to} of journal ${last.id}`;
    throw new JournalDamage(last.path, last.to - last.base, `${required}, and ${path} does not`);
  }
  const end = await findEnd(path, file, header.bytes);
  if (end < file.bytes) await file.truncate(end);
  return { header, end, tornBytes: file.bytes - end };
}

/** Makes a file the empty one that begins at `base` of the journal. */
async function begin(file: JournalFile, id: string, base: number): Promise<JournalHeader> {
  const header = encodeJournalHeader(id, base);
  await file.truncate(0);
  await file.append(header);
  return { id, base, bytes: header.length };
}

/** The offset after the last whole frame, found in the last bytes of the file. */
async function findEnd(path: string, file: JournalFile, headerBytes: number): Promise<number> {
  // Two of the largest frames: wherever they lie, the header of a whole frame is among these bytes.
  const windowBytes = 2 * (MAX_FRAME_BYTES + MAX_HEADER_BYTES);
  let from = Math.max(headerBytes, file.bytes - windowBytes);
  let bytes = await file.read(from, file.bytes);
  if (from > headerBytes) {
    const skip = findFrame(bytes);
    if (skip < 0) throw new JournalDamage(path, from, "no frame begins in what follows");
    bytes = bytes.subarray(skip);
    from += skip;
  }
  const { endIndex, rest } = parseFrames(bytes);
  if (typeof rest === "object" && rest.hasMore)
    throw new JournalDamage(path, from + endIndex, rest.fault);
  return from + endIndex;
}

function writer(opened: {
  path: string;
  file: JournalFile;
  header: JournalHeader;
  end: number;
  lock: Lock;
  disk: Disk;
  segmentBytes: number;
}): Journal {
  const { path, lock, disk, segmentBytes } = opened;
  let { file, header, end } = opened;
  /** Whether the active file has a frame: without one it is not full. */
  const hasFrames = () => end > header.bytes;
  /** Not after a header without a frame: that is never posted, and requests would wait for it. */
  const position = () => (hasFrames() ? header.base + end : header.base);
  const waiting: Waiting[] = [];
  /** For one frame at a time. */
  const buffer = Buffer.allocUnsafe(FRAME_BUFFER_BYTES);
  let committing: Promise<void> | null = null;
  let failed: JournalFailed | null = null;
  let trouble: JournalFull | JournalBusy | null = null;
  let troubleAtMs = 0;
  const listeners: ((commit: Commit) => void)[] = [];

  return {
    id: header.id,
    journals: fileJournals(path),
    isShared: false,
    maxFrameBytes: MAX_FRAME_BYTES,
    end: position,
    trouble() {
      // A caller that asks before it appends would otherwise never append again, nor find the room.
      // Nor may a clock that jumps back prolong it.
      if (!(Math.abs(disk.now() - troubleAtMs) <= TROUBLE_MS)) trouble = null;
      return (failed ?? trouble)?.message ?? null;
    },
    append(...parts) {
      let bytes = 0;
      for (const { length } of parts) bytes += length;
      if (failed) return Promise.reject(failed);
      if (bytes === 0) return Promise.resolve(position());
      if (bytes > MAX_FRAME_BYTES)
        return Promise.reject(new RangeError(`more than ${MAX_FRAME_BYTES} bytes in one append`));
      return new Promise((resolve, reject) => {
        waiting.push({ parts, bytes, resolve, reject });
        committing ??= commitAll();
      });
    },
    onCommit: (listener) => void listeners.push(listener),
    async close() {
      // A request that was waiting may append again before this resumes: the file must not be
      // closed during a commit.
      while (committing) await committing;
      failed ??= new JournalFailed(`${path} is closed`);
      await file.close();
      lock.release();
    },
  };

  async function commitAll() {
    while (waiting.length > 0) {
      await disk.turn();
      await commit(takeGroup());
    }
    committing = null;
  }

  function takeGroup(): Waiting[] {
    let groupBytes = 0;
    const isOver = ({ bytes }: Waiting) => (groupBytes += bytes) > MAX_GROUP_BYTES;
    const count = waiting.findIndex(isOver);
    return waiting.splice(0, count < 0 ? waiting.length : Math.max(count, 1));
  }

  async function commit(group: Waiting[]) {
    try {
      if (failed) throw failed;
      const payloads = group.flatMap(({ parts }) => parts);
      const payloadBytes = group.reduce((sum, { bytes }) => sum + bytes, 0);
      const atMs = toFrameTime(disk.now());
      const frame = encodeFrame(payloads, payloadBytes, atMs, buffer);
      if (hasFrames() && end + frame.length > segmentBytes) await rotate();
      await write(frame);
      const writtenMs = performance.now();
      await sync();
      const syncMs = performance.now() - writtenMs;
      // In a file that was removed, replaced or truncated, nobody would find these events again.
      if (!file.is(path, end + frame.length)) throw fail("continue", "another program changed it");
      const from = header.base + end;
      end += frame.length;
      trouble = null;
      const commit = { from, atMs, bytes: frame.length, appends: group.length, syncMs };
      if (frame.buffer !== buffer.buffer) freeBytes(frame);
      for (const listener of listeners) listener(commit);
      for (const { resolve } of group) resolve(header.base + end);
    } catch (error) {
      for (const { reject } of group) reject(error as Error);
    }
  }

  /**
   * The next file is whole and synced before the full one gives up its name, and that is synced before
   * the next one gets it. So a crash leaves both files, or the full one alone, never neither.
   */
  async function rotate() {
    const nextPath = join(dirname(path), NEXT_FILE);
    // Until the full file gives up its name nothing has changed, and the next append tries again.
    const troubled = (what: string) => (error: unknown) => {
      throw passing(what, error);
    };
    const next = await disk.openForAppend(nextPath).catch(troubled("create the file after"));
    try {
      const base = header.base + end;
      const begun = await begin(next, header.id, base).catch(troubled("begin the file after"));
      await next.sync();
      await disk.rename(path, segmentPath(path, header.base)).catch(troubled("rename"));
      await syncDirectory();
      await disk.rename(nextPath, path);
      await syncDirectory();
      await file.close();
      file = next;
      header = begun;
      end = header.bytes;
    } catch (error) {
      // A handle that is collected as garbage ends the process.
      await next.close().catch(() => {});
      if (error === trouble) throw error;
      throw fail("begin the file after", codeOf(error));
    }
  }

  /** Opening the directory needs a descriptor. To find none is not a failed sync, so it tries again. */
  async function syncDirectory() {
    for (let tries = DESCRIPTOR_TRIES; ; tries--) {
      const error = await disk.syncDirectory(dirname(path)).catch((error: unknown) => error);
      if (!error) return;
      if (!NO_DESCRIPTOR.has(codeOf(error)) || tries === 0) throw error;
      await Bun.sleep(DESCRIPTOR_PAUSE_MS);
    }
  }

  async function write(frame: Buffer) {
    await file.append(frame).catch(async (error) => {
      // Remove the piece that was written: the next frame must begin where the last one ended.
      await file.truncate(end).catch((error) => {
        throw fail("truncate", String(error));
      });
      throw passing("append to", error);
    });
  }

  /** A failure that passes: nothing was written, or it is removed again, and nothing has been synced. */
  function passing(what: string, error: unknown): JournalFull | JournalBusy {
    const code = codeOf(error);
    troubleAtMs = disk.now();
    trouble = NO_ROOM.has(code)
      ? new JournalFull(
          `cannot append to ${path}: no room (${code}); free some space and it resumes by itself`,
        )
      : new JournalBusy(`cannot ${what} ${path}: ${code}; it resumes by itself once this passes`);
    return trouble;
  }

  async function sync() {
    // After a failed sync the kernel may have dropped the dirty pages, and the next sync succeeds
    // without them (the fsync problem that databases met in 2018): there is no second attempt.
    await file.sync().catch(async (error) => {
      const failure = fail("sync", codeOf(error));
      // A reader whose own sync of these bytes succeeds must not find them.
      await file.truncate(end).catch(() => {});
      throw failure;
    });
  }

  function fail(what: string, why: string): JournalFailed {
    failed = new JournalFailed(
      `cannot ${what} ${path}: ${why}; no more events are accepted: check the disk, then restart`,
    );
    return failed;
  }
}

function codeOf(error: unknown): string {
  return (error as { code?: string }).code ?? String(error);
}
