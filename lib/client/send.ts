/**
 * Sending a file, so that each of its events is stored once, whatever crashes and however often it is
 * sent. Only the server knows what is stored: the client asks for the state of the source, makes sure
 * that the file begins with those bytes, and resumes behind them. While one chunk is in transit, the
 * next one is read and hashed.
 */
import { existsSync, realpathSync, renameSync, rmSync, statSync } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { tmpdir, userInfo } from "node:os";
import { basename, dirname, join } from "node:path";

import { isText, MAX_SOURCE_BYTES } from "../event/event.ts";
import { matchGenerations } from "../event/generations.ts";
import { type Read, readHandle, readStream } from "../event/lines.ts";
import { type Lock, tryLock } from "../lock.ts";
import { say, showProgress } from "../progress.ts";
import { type DirectoryWatch, watchDirectory } from "../watch.ts";
import { type Api, type LineCounts, type SourceState, type Stored, UploadFailed } from "./api.ts";
import { type Chunk, lastChunk, type Place, readChunks, startOfSource } from "./chunks.ts";
import { openRejected, type Rejected } from "./rejected.ts";

export interface SendOptions {
  /** The name of the source. */
  name: string;
  /** Send the whole file once more. */
  again: boolean;
  /** Keep sending as the file grows, until `stop`. */
  follow: boolean;
  stop: AbortSignal;
}

/** What has been sent, for the summary. */
export class Total {
  accepted = 0;
  rejected = 0;
  bytes = 0;
  /** Bytes and lines that the server had stored before. */
  knownBytes = 0;
  knownLines = 0;
  /** The journal position before which everything is. */
  position = "";

  add(chunk: Chunk, { accepted, rejected, position }: Omit<Stored, "errors">): void {
    this.accepted += accepted;
    if (chunk.tooLong !== "further part") this.rejected += rejected;
    this.bytes += chunk.to - chunk.from;
    this.position = position || this.position;
  }

  skip(from: Place, to: Place): void {
    this.knownBytes += to.offset - from.offset;
    this.knownLines += to.line - from.line + (to.lineFrom < to.offset ? 1 : 0);
  }
}

/** Sends what of the file at `path` is not stored yet; with `follow`, also what it grows by. */
export async function sendFile(
  api: Api,
  path: string,
  options: SendOptions,
  total: Total,
): Promise<Rejected> {
  const lockPath = lockPathOf(path);
  const lock = lockOrNull(lockPath);
  if (!lock) say(`${path}: another client sends it too, and keeps the rejected lines`);
  const { follow, stop } = options;
  const watch = follow ? watchDirectory(dirname(path)) : null;
  stop.addEventListener("abort", () => watch?.close());
  const upload: Upload = { api, path, options, total, watch, isOwner: lock !== null };
  try {
    for (let again = options.again; ; again = false) {
      // A rotation takes the file away for a moment.
      while (watch && !stop.aborted && !existsSync(path)) await watch.next();
      await using file = await openFile(path);
      const rejected = await sendOpened(upload, file, again);
      if (rejected) return rejected;
    }
  } finally {
    if (lock) rmSync(lockPath, { force: true });
    lock?.release();
  }
}

/** Sends standard input: a source of its own, which nobody can resume later. */
export async function sendStream(
  api: Api,
  { name, stop }: SendOptions,
  total: Total,
): Promise<Rejected> {
  say("stdin cannot be resumed after a crash: there is no record of how much was sent");
  const rejected = await openRejected("stdin.rejected.jsonl", { offset: 0, isOwner: true, say });
  const start = startOfSource();
  const leftOver = (line: number) =>
    say(`stdin: line ${line} has no newline and is not a complete event: not sent`);
  const chunks = readChunks(readStream(Bun.stdin.stream()), start, { isFinal: true, leftOver });
  const { conflict } = await sendChunks(api, name, {
    ...{ chunks, start, stop },
    stored(chunk, answer) {
      rejected.add(chunk, answer.errors);
      total.add(chunk, answer);
    },
  });
  if (conflict) throw new UploadFailed(`another client sends the source ${name}`);
  return rejected;
}

/** A file that is being sent. */
interface Upload {
  api: Api;
  path: string;
  options: SendOptions;
  total: Total;
  watch: DirectoryWatch | null;
  /** Whether this client writes the rejected lines. */
  isOwner: boolean;
}

/**
 * Sends the opened file to its end, even if another file has its name by then. Returns `null` when it
 * has to be found out what the file is now: it was replaced, cut short, or stored otherwise.
 */
async function sendOpened(
  { api, path, options, total, watch, isOwner }: Upload,
  file: FileHandle,
  again: boolean,
): Promise<Rejected | null> {
  const { name, follow, stop } = options;
  const read = readHandle(file);
  const { size } = await file.stat();
  const { source, state } = await findSource(api, { name, again, read, size });
  const { chunk, end: start } = await lastChunk(read, state?.offset ?? 0);
  const rejectedPath = `${path}.rejected.jsonl`;
  const rejected = await openRejected(rejectedPath, { offset: start.offset, isOwner, say });
  // The client that sent it may have died before it noted what was rejected: only the server knows.
  if (chunk && state) await recoverRejected(api, source, chunk, rejected);
  total.skip(startOfSource(), start);
  total.position ||= state?.position ?? "";
  const progress = showProgress(basename(path), size, start.offset);
  const stored = (chunk: Chunk, answer: Stored) => {
    rejected.add(chunk, answer.errors);
    total.add(chunk, answer);
    progress.update(chunk.to, total.accepted);
  };
  const leftOver = (line: number) => {
    if (!follow)
      say(`${path}: line ${line} has no newline and is no event yet: left for the next run`);
  };
  try {
    for (let place: Place | null = start; place;) {
      // Checked first: what is open is then sent to its end, whatever has its name by now.
      const isReplaced = await hasOtherFile(path, file);
      if ((await file.stat()).size < place.offset) return null;
      const chunks = readChunks(read, place, { isFinal: !follow || isReplaced, leftOver });
      const sending = { chunks, start: place, stop, stored };
      const { end, conflict } = await sendChunks(api, source, sending);
      if (conflict) {
        place = await skipStored(api, { source, read, from: end, state: conflict, rejected });
        if (!place) return null;
        total.skip(end, place);
        total.position = conflict.position;
      } else if (!follow || stop.aborted) return rejected;
      else if (isReplaced) {
        if (rejected.count() > 0 && isOwner) setAside(rejectedPath);
        return null;
      } else {
        place = end;
        await watch?.next();
      }
    }
    return null;
  } finally {
    progress.stop();
  }
}

interface Sending {
  chunks: AsyncGenerator<Chunk>;
  start: Place;
  stop: AbortSignal;
  /** Called with each chunk that is on the server's disk. */
  stored(chunk: Chunk, answer: Stored): void;
}

/**
 * Sends the chunks, and returns where they end; with `conflict` the state of the source, when another
 * client sends it too and it turned out to be elsewhere.
 */
async function sendChunks(
  api: Api,
  source: string,
  { chunks, start, stop, stored }: Sending,
): Promise<{ end: Place; conflict: SourceState | null }> {
  let end = start;
  let next = chunks.next();
  for (;;) {
    const { value: chunk } = await next;
    if (!chunk || stop.aborted) return { end, conflict: null };
    next = chunks.next();
    next.catch(() => {}); // awaited in the next turn
    const answer = await api.send(source, chunk);
    if ("accepted" in answer) stored(chunk, answer);
    else if (answer.offset === chunk.to && answer.digest === chunk.digest) {
      // It had been stored before; only the answer was lost.
      const { lines, position } = answer;
      stored(chunk, { ...(lines ?? { accepted: 0, rejected: 0, errors: [] }), position });
    } else return { end, conflict: answer };
    end = chunk.end;
  }
}

/**
 * The source of a file: of the generations `NAME`, `NAME#2`, … the last whose stored bytes the file
 * begins with. If there is none, or with `again`, the first that does not exist.
 */
async function findSource(
  api: Api,
  { name, again, read, size }: { name: string; again: boolean; read: Read; size: number },
): Promise<{ source: string; state: SourceState | null }> {
  const known: { source: string; state: SourceState; offset: number; digest: string }[] = [];
  let source = name;
  for (let generation = 2; ; generation++) {
    const state = await api.state(source);
    if (!state) break;
    known.push({ source, state, offset: state.offset, digest: state.digest });
    source = `${name}#${generation}`;
    if (!isText(source, MAX_SOURCE_BYTES)) break; // a name this long cannot exist
  }
  const matches = again ? [] : await matchGenerations(read, size, known);
  const matching = new Set(matches.map(({ generation }) => generation));
  return known.findLast((each) => matching.has(each)) ?? { source, state: null };
}

/**
 * Goes over what another client has stored of the same source, and returns the place behind it; `null`
 * where those are not the bytes of this file.
 */
async function skipStored(
  api: Api,
  {
    source,
    read,
    from,
    state,
    rejected,
  }: { source: string; read: Read; from: Place; state: SourceState; rejected: Rejected },
): Promise<Place | null> {
  const readStored: Read = (from, to) => read(from, Math.min(to, state.offset));
  let place = from;
  const options = { isFinal: true, leftOver: () => {} };
  for await (const chunk of readChunks(readStored, from, options)) {
    await recoverRejected(api, source, chunk, rejected);
    place = chunk.end;
  }
  return place.hash.copy().digest("hex") === state.digest ? place : null;
}

/** Sends a stored chunk again, to learn from the 409 which of its lines were rejected. */
async function recoverRejected(
  api: Api,
  source: string,
  chunk: Chunk,
  rejected: Rejected,
): Promise<void> {
  if (chunk.bytes.length === 0) return;
  const answer = await api.send(source, chunk);
  const lines: LineCounts | null = "accepted" in answer ? answer : answer.lines;
  rejected.add(chunk, lines?.errors ?? []);
}

/** Whether another file has taken the name of the opened one. */
async function hasOtherFile(path: string, file: FileHandle): Promise<boolean> {
  const named = statSync(path, { throwIfNoEntry: false });
  const { ino, dev } = await file.stat();
  return named !== undefined && (named.ino !== ino || named.dev !== dev);
}

/** Keeps the rejected lines of a file that was rotated away beside those of the file that has its name now. */
function setAside(path: string): void {
  let aside = "";
  for (let n = 1; aside === "" || existsSync(aside); n++)
    aside = path.replace(/\.jsonl$/, `.${n}.jsonl`);
  renameSync(path, aside);
  say(`the rejected lines of the rotated file are in ${aside}`);
}

function lockOrNull(path: string): Lock | null {
  try {
    return tryLock(path);
  } catch {
    return null; // no folder for it, or another user's file
  }
}

/** One client at a time writes FILE.rejected.jsonl. The lock is elsewhere, so nothing else lies beside FILE. */
function lockPathOf(path: string): string {
  const digest = new Bun.CryptoHasher("sha256").update(realpathSync(path)).digest("hex");
  return join(tmpdir(), `daybook-${userInfo().uid}-${digest.slice(0, 16)}.lock`);
}

async function openFile(path: string): Promise<FileHandle> {
  try {
    return await open(path);
  } catch (error) {
    throw new UploadFailed(`cannot read ${path}: ${(error as Error).message}`);
  }
}
