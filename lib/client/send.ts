/**
 * Sending a file, so that each of its events is stored once, whatever crashes and however often it is
 * sent. Only the server knows what is stored: the client asks for the state of the source, makes sure
 * that the file begins with those bytes, and resumes after them. While one chunk is in transit, the
 * next one is sent, and the one after it is read and hashed. If the server does not take what was sent early,
 * it is sent again in its turn.
 */
import {
  createReadStream,
  existsSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";

import { explain } from "../errors.ts";
import { isText, MAX_SOURCE_BYTES } from "../event/event.ts";
import { foreignFormat, HEAD_BYTES } from "../event/formats.ts";
import { explainOther, matchGenerations, REWRITTEN } from "../event/generations.ts";
import {
  DamagedInput,
  explainForeign,
  explainNuls,
  type Input,
  openInput,
  openStreamInput,
} from "../event/input.ts";
import { type Read, readAhead, readHandle } from "../event/lines.ts";
import { type Lock, tryLock } from "../lock.ts";
import { counted, percent, type Progress, say, showProgress } from "../progress.ts";
import { type DirectoryWatch, watchDirectory } from "../watch.ts";
import { type Api, type SourceState, type Stored, UploadFailed } from "./api.ts";
import {
  type Chunk,
  CHUNK_BYTES,
  countLines,
  digestAt,
  lastChunks,
  type Place,
  readChunks,
  splitChunk,
  startOfSource,
} from "./chunks.ts";
import { openRejected, type Rejected } from "./rejected.ts";

/** On a slow link chunks become smaller, down to this. */
const MIN_CHUNK_BYTES = 64 * 1024;
/** A chunk that took less may be followed by a larger one. */
const FAST_MS = 5_000;
/** After one that took less, two are under way at a time: on a slower link the two would share its speed. */
const QUICK_MS = 1_000;
/**
 * Behind a load balancer each request may reach another server, with a journal of its own. One that has
 * less of the source is passed over this often in a row, for the next may be the one that took the last
 * chunk. If none is, the source itself has less than before.
 */
const MAX_PASSED_OVER = 16;
/** A server that says it has every source would be asked for ever. */
const MAX_GENERATIONS = 10_000;
/** How much of what was sent last is compared with the file before more is sent. */
const TAIL_BYTES = 4096;

export interface SendOptions {
  api: Api;
  /** The name of the source. */
  name: string;
  /** Send the whole file once more. */
  again: boolean;
  /** Keep sending as the file grows, until `stop`. */
  follow: boolean;
  stop: AbortSignal;
  /** Adds up what is sent. */
  total: Total;
}

/** What has been sent, for the summary. */
export class Total {
  accepted = 0;
  rejected = 0;
  bytes = 0;
  /** Bytes and lines that the server had stored before. */
  knownBytes = 0;
  knownLines = 0;
  /** Whether bytes remain that are not a whole event yet. */
  hasLeftOver = false;
  /** Whether it was stopped before the end, and how much of the file was sent by then. */
  isStopped = false;
  percent = 0;
  /** The journal position after all of it. */
  position = "";
  /** The source that is being sent, and up to where it is counted here. */
  #source = "";
  #counted = startOfSource();

  add(source: string, { start, end, tooLong }: Chunk, stored: Stored): void {
    const { accepted, rejected, position } = stored;
    this.#count(source, end);
    this.accepted += accepted;
    if (tooLong !== "further part") this.rejected += rejected;
    this.bytes += end.offset - start.offset;
    this.position = position || this.position;
  }

  /** Adds what has been sent of another file. */
  join(other: Total): void {
    this.accepted += other.accepted;
    this.rejected += other.rejected;
    this.bytes += other.bytes;
    this.knownBytes += other.knownBytes;
    this.knownLines += other.knownLines;
    this.hasLeftOver ||= other.hasLeftOver;
  }

  /** Counts what is stored up to `to` and is not counted yet, however often it is found. */
  skip(source: string, to: Place): void {
    const from = source === this.#source ? this.#counted : startOfSource();
    this.#count(source, to);
    if (to.offset <= from.offset) return;
    this.knownBytes += to.offset - from.offset;
    this.knownLines += countLines(from, to);
  }

  /** The summary line. `from` names the input, and `ms` is how long sending took. */
  summarize(from: string, ms: number): string {
    const { accepted, rejected, bytes, knownBytes, knownLines } = this;
    const known = knownBytes
      ? `; already there: ${counted(knownBytes, "byte")} (${counted(knownLines, "line")})`
      : "";
    return (
      `sent ${counted(accepted, "event")} (${rejected} rejected) from ${from}: ` +
      `${counted(bytes, "byte")} in ${(ms / 1000).toFixed(1)} s, ` +
      `${Math.round((1000 * accepted) / ms)} events/s${known}`
    );
  }

  #count(source: string, to: Place): void {
    if (source !== this.#source || to.offset > this.#counted.offset) this.#counted = to;
    this.#source = source;
  }
}

/** Sends what of the file at `path` is not stored yet; with `follow`, also what it grows by. */
export async function sendFile(path: string, options: SendOptions): Promise<Rejected> {
  const lockPath = lockPathOf(path);
  let lock = lockOrNull(lockPath);
  if (!lock) say(`${path}: another client sends it too, and keeps the rejected lines`);
  const tryToOwn = (): boolean => lock === null && (lock = lockOrNull(lockPath)) !== null;
  const { follow, stop } = options;
  const watch = follow ? watchDirectory(dirname(path)) : null;
  stop.addEventListener("abort", () => watch?.close());
  try {
    let isRotated = false;
    for (let { again } = options; ; again = false) {
      // A rotation leaves no file of this name for a moment.
      while (watch && !stop.aborted && !existsSync(path)) await watch.next();
      const isOwner = lock !== null;
      if (stop.aborted && !existsSync(path))
        return openRejected(rejectedPathOf(path), { offset: Infinity, isOwner, say });
      await using file = await open(path).catch((error: Error) => {
        throw new UploadFailed(explain(error));
      });
      const fileOptions: FileOptions = {
        ...options,
        path,
        again,
        watch,
        isOwner,
        tryToOwn,
        isRotated,
      };
      const sent = await sendOpened(file, fileOptions).catch(unreadable(path));
      if (typeof sent === "object") return sent;
      isRotated = sent === "rotated";
    }
  } finally {
    if (lock) rmSync(lockPath, { force: true });
    lock?.release();
  }
}

/** What a stream holds is not lines of events, or not what is stored under its name. */
export class ForeignInput extends Error {}

/** What to do about a pipe that was not sent to its end. */
export function explainRest(canResume: boolean): string {
  return canResume
    ? "send the same input again to continue after the bytes that are stored"
    : "it cannot be resumed: what the summary counts is stored, the rest is not";
}

/**
 * Sends a pipe, `null` for standard input. If it `canResume`, sending continues after what is stored under its name;
 * otherwise it is a source of its own.
 */
export async function sendStream(
  path: string | null,
  { canResume, ...options }: SendOptions & { canResume: boolean },
): Promise<Rejected> {
  const { name, total, stop } = options;
  const shown = path ?? "stdin";
  if (!canResume)
    say(
      `${shown} cannot be resumed if this client stops, because nothing records how much was sent; use --source NAME if it must be`,
    );
  const stream = path === null ? Bun.stdin.stream() : createReadStream(path);
  const opened = untilStopped(openStreamInput(stream as AsyncIterable<Uint8Array>), stop);
  const { compression, read: readOn } = (await opened) ?? NOTHING;
  const read: Read = async (from, to) =>
    (await untilStopped(readOn(from, to), stop)) ?? new Uint8Array();
  const foreign = foreignFormat(await read(0, HEAD_BYTES).catch(unreadable(shown)));
  if (foreign)
    throw new ForeignInput(`${shown}: ${explainForeign(foreign, { path: null, compression })}`);
  const {
    chunks,
    end: start,
    position,
  } = canResume
    ? await skipStoredStream(shown, read, options)
    : { chunks: [], end: startOfSource(), position: "" };
  // Each name has a file of its own: the records of another source would count as this one's.
  const file = canResume ? encodeURIComponent(name) : path === null ? "stdin" : basename(path);
  const record = { offset: start.offset, isOwner: true, say };
  const rejected = await openRejected(rejectedPathOf(file), record);
  const upload = { ...options, source: name, read, rejected, progress: null, ...startOfUpload() };
  for (const chunk of chunks) await recoverRejected(upload, chunk);
  total.skip(name, start);
  total.position = position;
  const leftOver = (line: number) => {
    total.hasLeftOver = true;
    say(`${shown}: line ${line} has no newline and is not a complete event: not sent`);
  };
  const sending = sendChunks(upload, start, { isFinal: true, leftOver });
  const { conflict } = await sending.catch(unreadable(shown));
  if (conflict) throw new UploadFailed(`another client sends the source ${name}`);
  total.isStopped = stop.aborted;
  return rejected;
}

/** Reads over the bytes of a stream that are stored. Throws ForeignInput if it begins with others. */
async function skipStoredStream(shown: string, read: Read, { api, name }: SendOptions) {
  const state = await api.state(name);
  const stored = await lastChunks(read, state?.offset ?? 0).catch(unreadable(shown));
  if (state && digestAt(stored.end) !== state.digest)
    throw new ForeignInput(
      `${shown} does not begin with the ${state.offset} bytes that are already stored as ${name}; use another --source`,
    );
  return { ...stored, position: state?.position ?? "" };
}

const NOTHING = { compression: null, read: async () => new Uint8Array() };

function startOfUpload() {
  const tail = new Uint8Array();
  return { maxBytes: CHUNK_BYTES, isQuick: false, mayHurry: true, tail, early: null };
}

/** What `promise` settles to; `undefined` if it is stopped before: a pipe may be silent for ever. */
function untilStopped<T>(promise: Promise<T>, stop: AbortSignal): Promise<T | undefined> {
  const { promise: stopped, resolve } = Promise.withResolvers<undefined>();
  const abort = () => resolve(undefined);
  if (stop.aborted) abort();
  stop.addEventListener("abort", abort);
  return Promise.race([promise, stopped]).finally(() => stop.removeEventListener("abort", abort));
}

/** What cannot be read is given up, with what was sent of it. */
function unreadable(path: string): (error: unknown) => never {
  return (error) => {
    if (!(error instanceof DamagedInput)) throw error;
    throw new UploadFailed(`${path}: ${error.message}`);
  };
}

interface FileOptions extends SendOptions {
  path: string;
  watch: DirectoryWatch | null;
  /** Whether this client writes the rejected lines. */
  isOwner: boolean;
  /** Takes over the rejected lines if the client that wrote them has ended; returns whether it did. */
  tryToOwn(): boolean;
  /** Whether this file has just taken the name of one that was sent to its end. */
  isRotated: boolean;
}

/** A source that is being sent. */
interface Upload {
  api: Api;
  source: string;
  read: Read;
  rejected: Rejected;
  total: Total;
  progress: Progress | null;
  /** A file, and its size. */
  input?: Input;
  size?: number;
  stop: AbortSignal;
  /** The size of the next chunk at most. */
  maxBytes: number;
  /** Whether the next chunk is sent before the one under way is answered. */
  isQuick: boolean;
  /** False once a chunk that was sent so was not taken, as behind a load balancer. */
  mayHurry: boolean;
  /** The end of what is stored, as it was read. */
  tail: Uint8Array;
  early: EarlyChunk | null;
}

/** A chunk that was sent before the one before it was answered. */
interface EarlyChunk {
  chunk: Chunk;
  answer: Promise<Stored | null>;
}

/**
 * Sends the opened file to its end, even if another file has its name by then. The caller has to open the
 * path again when the file was "rotated" away, or has "changed", or its source has other bytes.
 */
async function sendOpened(
  file: FileHandle,
  options: FileOptions,
): Promise<Rejected | "rotated" | "changed"> {
  const { path, follow, stop, watch, isOwner, total } = options;
  const { size, mtimeMs } = await file.stat();
  const input = await openInput(readHandle(file));
  const { read, readAll } = input;
  const { source, state } = await findSource(options, input);
  const { chunks, end: start } = await lastChunks(readAll, state?.offset ?? 0);
  if (state && start.offset < state.offset) return "changed";
  const rejectedPath = rejectedPathOf(path);
  const rejected = await openRejected(rejectedPath, { offset: start.offset, isOwner, say });
  const progress = showProgress(basename(path), size, input.fileOffset(start.offset));
  const upload = { ...options, source, read, rejected, progress, input, size, ...startOfUpload() };
  try {
    // The client that sent them may have died before it noted what was rejected: only the server knows.
    for (const chunk of chunks) await recoverRejected(upload, chunk);
    total.skip(source, start);
    total.percent = percent(input.fileOffset(start.offset), size);
    total.position ||= state?.position ?? "";
    for (let place = start; ;) {
      // Checked before sending: a file that was replaced by now is sent to its end.
      const isReplaced = await hasOtherFile(path, file);
      // Rewritten in place: it does not begin with what is stored, and so is another file.
      if (!input.compression && !(await endsWith(upload, place))) return "changed";
      const isFinal = !follow || isReplaced;
      const leftOver = (line: number) => {
        if (!isFinal) return;
        total.hasLeftOver = true;
        const what = `line ${line} has no newline and is not a complete event`;
        say(`${path}: ${what}: ${isReplaced ? "not sent" : "left for the next run"}`);
      };
      const { end, conflict } = await sendChunks(upload, place, { isFinal, leftOver });
      if (conflict) {
        const after = await skipStored(upload, end, conflict);
        if (!after) return "changed";
        total.skip(source, after);
        total.position = conflict.position;
        place = after;
        continue;
      }
      if (isFinal && !total.isStopped) await checkNuls(file, end, { path, input, total });
      if (!follow && !total.isStopped && (await file.stat()).mtimeMs !== mtimeMs)
        await checkRewritten(upload, end, path);
      if (!total.isStopped && isNoted(path, source)) rmSync(`${path}.again`);
      if (!follow || stop.aborted) return rejected;
      if (isReplaced) {
        if (rejected.count() > 0 && isOwner) setAside(rejectedPath);
        return "rotated";
      } else {
        place = end;
        await watch?.next();
        if (options.tryToOwn()) return "changed"; // reopens the file as its owner
      }
    }
  } finally {
    progress.stop();
  }
}

/**
 * Sends the chunks from `start` on. Returns where they end, and as `conflict` the state of the source if
 * another client sends it too and it is elsewhere.
 */
async function sendChunks(
  upload: Upload,
  start: Place,
  options: Parameters<typeof readChunks>[2],
): Promise<{ end: Place; conflict: SourceState | null }> {
  const { api, source, read, rejected, total, progress, input, size = 0, stop } = upload;
  const chunks = readAhead(readChunks(read, start, options));
  let end = start;
  let next = chunks.next();
  for (;;) {
    const { value: chunk } = await next;
    const sent = takeEarly(upload);
    const isStopping = stop.aborted && !sent;
    if (chunk && isStopping) total.isStopped = true;
    if (!chunk || isStopping) return { end, conflict: null };
    next = chunks.next();
    let isUnderWay = true;
    next.then(
      ({ value: following }) => {
        if (following && isUnderWay && upload.isQuick && !stop.aborted)
          upload.early = { chunk: following, answer: api.sendEarly(source, following) };
      },
      () => {}, // awaited in the next turn
    );
    for await (const { piece, answer: given } of sendPieces(upload, chunk, sent?.answer)) {
      let answer = given;
      if (!("accepted" in answer)) {
        const { offset, digest, position, lines } = answer;
        const isStored = [piece, upload.early?.chunk].some(
          (last) => last?.end.offset === offset && digestAt(last.end) === digest,
        );
        if (!isStored) {
          await takeEarly(upload)?.answer;
          return { end, conflict: answer };
        }
        // The piece had been stored before; only the answer was lost.
        answer = { accepted: 0, rejected: 0, errors: [], ...lines, position };
      }
      rejected.add(piece, answer.errors);
      total.add(source, piece, answer);
      const fileOffset = input?.fileOffset(piece.end.offset) ?? 0;
      total.percent = percent(fileOffset, size);
      progress?.update(fileOffset, total.accepted);
      upload.tail = tailOf(piece);
      end = piece.end;
    }
    isUnderWay = false;
  }
}

function takeEarly(upload: Upload): EarlyChunk | null {
  const { early } = upload;
  upload.early = null;
  return early;
}

/**
 * Sends a chunk in as many pieces as the link requires: one that fails by time is halved, and after one
 * that is quick the next may be twice as large. On a link of 28 kB/s, 1 MiB takes 37 s.
 */
async function* sendPieces(
  upload: Upload,
  chunk: Chunk,
  early?: Promise<Stored | null>,
): AsyncGenerator<{ piece: Chunk; answer: Stored | SourceState }> {
  const { api, source } = upload;
  const stored = await early;
  if (stored) return void (yield { piece: chunk, answer: stored });
  // A server that did not take it has another connection to a journal of its own, or is busy.
  if (early) upload.mayHurry = false;
  let fits = Infinity;
  for (let rest: Chunk | null = chunk, passedOver = 0; rest;) {
    const maxBytes = Math.min(upload.maxBytes, fits);
    const [piece, next]: [Chunk, Chunk | null] = splitChunk(rest, maxBytes);
    const startedMs = performance.now();
    const canShrink = piece.tooLong === null && piece.bytes.length > MIN_CHUNK_BYTES;
    const answer = await api.send(source, piece, canShrink);
    if (answer === "slow") {
      upload.maxBytes = Math.max(MIN_CHUNK_BYTES, Math.floor(piece.bytes.length / 2));
      continue;
    }
    if ("fits" in answer) {
      ({ fits } = answer);
      continue;
    }
    const hasLess = !("accepted" in answer) && answer.offset < piece.start.offset;
    if (hasLess && passedOver++ < MAX_PASSED_OVER) continue;
    passedOver = 0;
    yield { piece, answer };
    fits = Infinity;
    rest = next;
    const ms = performance.now() - startedMs;
    if (ms < FAST_MS) upload.maxBytes = Math.min(CHUNK_BYTES, 2 * upload.maxBytes);
    upload.isQuick = upload.mayHurry && ms < QUICK_MS && upload.maxBytes === CHUNK_BYTES;
  }
}

function tailOf({ bytes }: Chunk): Uint8Array {
  return bytes.slice(-TAIL_BYTES);
}

/** Whether the file still ends before `offset` with what was sent from there. */
async function endsWith({ read, tail }: Upload, { offset }: Place): Promise<boolean> {
  const found = await read(offset - tail.length, offset);
  return Buffer.compare(found, tail) === 0;
}

/** Reports a file that was changed in what had been sent of it already. */
async function checkRewritten({ input, total }: Upload, end: Place, path: string): Promise<void> {
  if (!input || input.compression) return;
  const sent = { offset: end.offset, digest: digestAt(end) };
  if ((await matchGenerations(input.readAll, [sent])).length > 0) return;
  total.hasLeftOver = true;
  say(`${path} ${REWRITTEN}`);
}

/** The state of one generation of a file. */
interface SourceStateOf {
  source: string;
  state: SourceState;
  offset: number;
  digest: string;
}

/**
 * The source of a file: of the generations `NAME`, `NAME#2`, … the last whose stored bytes the file
 * begins with. If there is none, the first that does not exist; so with `again`, unless a copy was begun
 * and interrupted: that one is continued.
 */
async function findSource(options: FileOptions, input: Input) {
  const { api, name, again, path, isOwner, isRotated } = options;
  const known: SourceStateOf[] = [];
  let source = name;
  for (let generation = 2; ; generation++) {
    const state = await api.state(source);
    if (!state) break;
    known.push({ source, state, offset: state.offset, digest: state.digest });
    if (generation > MAX_GENERATIONS)
      throw new UploadFailed(`the server has more than ${MAX_GENERATIONS} sources named ${name}`);
    source = `${name}#${generation}`;
    if (!isText(source, MAX_SOURCE_BYTES)) break; // a name this long cannot exist
  }
  const matches = await matchGenerations(input.readAll, known);
  const matching = new Set(matches.map(({ generation }) => generation));
  const last = known.findLast((each) => matching.has(each));
  if (!again && !last && !isRotated) sayOther(path, known, source);
  if (!again) return last ?? { source, state: null };
  // A note says that it was begun, or less of it is stored than of the file before it.
  const noted = known.find((each) => matching.has(each) && isNoted(path, each.source));
  const longest = Math.max(...[...matching].map(({ offset }) => offset));
  const begun = noted ?? (last && last.offset < longest ? last : null);
  if (begun) {
    const stored = `after the ${begun.offset} bytes that are stored`;
    say(`${path}: continuing the copy that an interrupted --again had begun, ${stored}`);
    return begun;
  }
  if (isOwner) noteCopy(path, source);
  return { source, state: null };
}

/** Says that a file is another one than those that its name has stood for. */
function sayOther(path: string, known: SourceStateOf[], source: string): void {
  const stored = known.at(-1);
  if (stored && stored.offset > 0)
    say(`${path} ${explainOther(stored.offset, stored.source, source)}`);
}

/**
 * Notes in FILE.again that a copy is begun, until it is complete. Only so is an interrupted one known: if
 * the file has grown since it was sent, the server cannot tell the two apart.
 */
function noteCopy(path: string, source: string): void {
  try {
    writeFileSync(`${path}.again`, `${source}\n`);
  } catch (error) {
    const { message } = error as Error;
    say(
      `cannot note that this copy was begun: ${message}; if it is interrupted, run it without --again`,
    );
  }
}

function isNoted(path: string, source: string): boolean {
  const note = `${path}.again`;
  return existsSync(note) && readFileSync(note, "utf8") === `${source}\n`;
}

/** Reports the NULs at the end of a file, which are not sent. */
async function checkNuls(
  file: FileHandle,
  end: Place,
  { path, input, total }: { path: string; input: Input; total: Total },
): Promise<void> {
  const count = await input.countNuls(end.offset, (await file.stat()).size);
  if (count === 0) return;
  total.hasLeftOver = true;
  say(`${path} ${explainNuls(path, count)}`);
}

/**
 * Reads over what another client has stored of the same source after `from`. Returns the place after
 * it, or `null` if those are not the bytes of this file.
 */
async function skipStored(upload: Upload, from: Place, state: SourceState): Promise<Place | null> {
  const readStored: Read = (from, to) => upload.read(from, Math.min(to, state.offset));
  let place = from;
  for await (const chunk of readChunks(readStored, from, { isFinal: true, leftOver() {} })) {
    await recoverRejected(upload, chunk);
    place = chunk.end;
  }
  return digestAt(place) === state.digest ? place : null;
}

/** Sends a stored chunk again, to learn from the 409 which of its lines were rejected. */
async function recoverRejected(upload: Upload, chunk: Chunk): Promise<void> {
  for await (const { piece, answer } of sendPieces(upload, chunk)) {
    const lines = "accepted" in answer ? answer : answer.lines;
    upload.rejected.add(piece, lines?.errors ?? []);
  }
  upload.tail = tailOf(chunk);
}

/** Whether another file has the name of the opened one. */
async function hasOtherFile(path: string, file: FileHandle): Promise<boolean> {
  const named = statSync(path, { throwIfNoEntry: false });
  const { ino, dev } = await file.stat();
  return named !== undefined && (named.ino !== ino || named.dev !== dev);
}

function rejectedPathOf(path: string): string {
  return `${path}.rejected.jsonl`;
}

/** Keeps the rejected lines of a file that was rotated away, beside those of the file that has its name now. */
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
  return join(tmpdir(), `daybook-${process.getuid?.()}-${digest.slice(0, 16)}.lock`);
}
