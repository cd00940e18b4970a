/**
 * The client: sends the events of a file to the server, so that each is there once, whatever is
 * killed and however often it is run. What is taken, only the server knows: the client asks where
 * the source stands, makes sure that the file begins with those bytes, and goes on from there.
 * While one chunk is under way the next is read and hashed.
 */
import "./lib/install.ts";

import {
  accessSync,
  constants,
  existsSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
} from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { tmpdir, userInfo } from "node:os";
import { basename, dirname, join } from "node:path";

import { parseDuration, readCommand } from "./lib/config.ts";
import { isText, MAX_SOURCE_BYTES, setEventTypes } from "./lib/event/event.ts";
import { type Lock, tryLock } from "./lib/lock.ts";
import { type Read, readHandle, readStream } from "./lib/event/lines.ts";
import {
  advance,
  begin,
  lastChunk,
  type Chunk,
  readChunks,
  type Start,
} from "./lib/client/chunks.ts";
import { showProgress } from "./lib/progress.ts";
import { openRejected, type Rejected } from "./lib/client/rejected.ts";
import {
  type Answer,
  UploadFailed,
  openRemote,
  type Remote,
  type SourceState,
} from "./lib/client/api.ts";
import { watchDirectory } from "./lib/watch.ts";

async function main(): Promise<number> {
  const { settings, options, files } = readCommand({
    program: "client",
    usage: "bun run client.ts [--again] [--follow] [--wait] [FILE]",
    about:
      "Sends the events of FILE (default: events.jsonl; -: standard input), one a line, to the\n" +
      "server. Run again, it goes on where the server has it: every event counts once. Lines that\n" +
      "the server rejects are in FILE.rejected.jsonl, each with the reason.",
    options: {
      again: { type: "boolean", meaning: "send the whole file once more, on purpose" },
      follow: { type: "boolean", meaning: "go on as the file grows, until SIGTERM" },
      wait: { type: "boolean", meaning: "return only when everything is in the ledger" },
      source: { type: "string", meaning: "NAME of the source, instead of the file's name" },
      token: {
        type: "string",
        meaning: "presented instead of AUTH_SECRET; AUTH_TOKEN does the same",
      },
      "retry-for": { type: "string", meaning: "how long to try when the server is away (5m)" },
    },
    maxFiles: 1,
    exits: {
      0: "every event is on the server's disk",
      1: "the same, but some lines were rejected: see FILE.rejected.jsonl",
      2: "wrong use, a wrong setting, no such file, or a wrong secret or token",
      3: "the server cannot be reached, or did not take the events",
    },
  });
  const [path = "events.jsonl"] = files;
  const retryMs = parseDuration(String(options["retry-for"] ?? "5m"));
  if (retryMs === undefined) return wrong(`--retry-for: wanted a time like 90s, 5m or 2h`);
  const problem = path === "-" ? null : cannotRead(path);
  if (problem) return wrong(`${path}: ${problem}`);

  const name = String(
    options["source"] ?? (path === "-" ? `stdin-${crypto.randomUUID()}` : basename(path)),
  );
  // A path of one or two dots is taken out of a URL before it is sent.
  if (!isText(name, MAX_SOURCE_BYTES) || /^\.\.?$/.test(name))
    return wrong(`--source: wanted a name of 1 to ${MAX_SOURCE_BYTES} bytes`);

  setEventTypes(settings.EVENT_TYPES); // for a last line without newline: is it an event?
  const [first = ""] = settings.AUTH_SECRET;
  const secret = String(options["token"] ?? settings.AUTH_TOKEN ?? first);
  const stop = new AbortController();
  const remote = openRemote(settings.SERVER_URL, secret, retryMs, say, stop.signal);
  if (options["follow"])
    for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort());
  return send(remote, path, {
    again: options["again"] === true,
    follow: options["follow"] === true && path !== "-",
    wait: options["wait"] === true,
    name,
    stop: stop.signal,
  });
}

/** Why there is no file to be read at `path`, or `null`. */
function cannotRead(path: string): string | null {
  try {
    if (!statSync(path).isFile()) return "not a regular file";
    accessSync(path, constants.R_OK);
    return null;
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    return code === "ENOENT" || code === "ENOTDIR" ? "no such file" : message;
  }
}

interface Wish {
  again: boolean;
  follow: boolean;
  wait: boolean;
  name: string;
  stop: AbortSignal;
}

/** What a run has done, for the summary. */
interface Total {
  accepted: number;
  rejected: number;
  bytes: number;
  /** Lines and bytes that the server had before. */
  thereLines: number;
  thereBytes: number;
  /** The journal position before which everything is. */
  position: string;
}

/** Sends the file, tells how it goes, and returns the exit code. */
async function send(remote: Remote, path: string, wish: Wish): Promise<number> {
  const startedMs = performance.now();
  const total: Total = {
    accepted: 0,
    rejected: 0,
    bytes: 0,
    thereLines: 0,
    thereBytes: 0,
    position: "",
  };
  const shown = path === "-" ? "standard input" : path;
  let failure: UploadFailed | null = null;
  let rejected: Rejected | null = null;
  try {
    rejected = await (path === "-"
      ? sendStream(remote, wish, total)
      : sendFile(remote, path, wish, total));
    if (wish.wait && total.position) await remote.posted(total.position);
  } catch (error) {
    if (!(error instanceof UploadFailed)) throw error;
    failure = error;
  }

  if (failure) say(failure.message);
  if (failure && path === "-")
    say("standard input cannot be resumed: what the summary counts is taken, the rest is not");
  if (rejected && rejected.count() > 0)
    say(`${rejected.count()} lines were rejected: see ${rejected.path}`);
  const seconds = (performance.now() - startedMs) / 1000;
  const there = total.thereBytes
    ? `; already there: ${total.thereBytes} bytes (${total.thereLines} lines)`
    : "";
  const waited = wish.wait && !failure ? "; all of it is in the ledger" : "";
  process.stdout.write(
    `${failure ? "stopped: " : ""}sent ${total.accepted} events (${total.rejected} rejected) from ` +
      `${shown}: ${total.bytes} bytes in ${seconds.toFixed(1)} s, ` +
      `${Math.round(total.accepted / seconds)} events/s${there}${waited}\n`,
  );
  if (failure) return failure.wrongSecret ? 2 : 3;
  return total.rejected > 0 || (rejected && rejected.count() > 0) ? 1 : 0;
}

/** Sends what of the file is not taken yet; with `follow`, also what it grows by. */
async function sendFile(remote: Remote, path: string, wish: Wish, total: Total): Promise<Rejected> {
  const lockPath = lockPathOf(path);
  const lock = lockOrNot(lockPath);
  if (!lock) say(`${path}: another client sends it too, and keeps the lines that are rejected`);
  try {
    return await sendUntilEnd(remote, path, wish, total, lock !== null);
  } finally {
    if (lock) rmSync(lockPath, { force: true });
    lock?.release();
  }
}

function lockOrNot(path: string): Lock | null {
  try {
    return tryLock(path);
  } catch {
    return null; // no folder for it, or a file of somebody else's
  }
}

/** One client at a time writes FILE.rejected.jsonl, beside which nothing else is to lie. */
function lockPathOf(path: string): string {
  const which = new Bun.CryptoHasher("sha256").update(realpathSync(path)).digest("hex");
  return join(tmpdir(), `daybook-${userInfo().uid}-${which.slice(0, 16)}.lock`);
}

async function sendUntilEnd(
  remote: Remote,
  path: string,
  wish: Wish,
  total: Total,
  keepsRejected: boolean,
): Promise<Rejected> {
  const wake = wish.follow ? watchDirectory(dirname(path)) : null;
  wish.stop.addEventListener("abort", () => wake?.close());
  for (let again = wish.again; ; again = false) {
    // A rotation takes the file away for a moment.
    while (wake && !wish.stop.aborted && !existsSync(path)) await wake.next();
    await using file = await openFile(path);
    const { ino, dev, size } = await file.stat();
    const read = readHandle(file);
    const { source, taken } = await locate(remote, wish.name, read, size, again);
    const { chunk, start } = await lastChunk(read, begin(), taken?.offset ?? 0);
    const rejectedPath = `${path}.rejected.jsonl`;
    const rejected = await openRejected(rejectedPath, start.offset, keepsRejected, say);
    // Whoever sent it may have died before it noted what was rejected: only the server knows.
    if (chunk && taken) await judge(remote, source, chunk, rejected);
    skip(total, begin(), start);
    total.position ||= taken?.position ?? "";
    const progress = showProgress(basename(path), size, start.offset);
    const on: Listener = {
      leftOver(line) {
        if (!wish.follow)
          say(`${path}: line ${line} has no newline and is no event yet: left for the next run`);
      },
      taken(chunk, counts) {
        count(total, chunk, counts);
        progress.update(chunk.to, total.accepted);
      },
      rejected,
      stop: wish.stop,
    };
    try {
      for (let at: Start | null = start; at;) {
        // Looked at first: what is open is then sent to its end, whatever has its name by now.
        const named = statSync(path, { throwIfNoEntry: false });
        const isReplaced = named !== undefined && (named.ino !== ino || named.dev !== dev);
        if ((await file.stat()).size < at.offset) break;
        const final = !wish.follow || isReplaced;
        const { end, stand } = await sendPieces(remote, source, read, at, final, on);
        at = stand ? await goOn(remote, source, read, end, stand, rejected) : end;
        if (at && stand) {
          skip(total, end, at);
          total.position = stand.position;
        }
        if (stand) continue;
        if (!wish.follow || wish.stop.aborted) return rejected;
        if (isReplaced) {
          if (rejected.count() > 0 && keepsRejected) setAside(rejectedPath);
          break;
        }
        await wake?.next();
      }
      // The file is not any more what was sent: find out what it is now.
    } finally {
      progress.stop();
    }
  }
}

/** The rejected lines of a file that was rotated away stay, beside those of the one that has its name. */
function setAside(path: string): void {
  let aside = "";
  for (let n = 1; aside === "" || existsSync(aside); n++)
    aside = path.replace(/\.jsonl$/, `.${n}.jsonl`);
  renameSync(path, aside);
  say(`rejected lines of the file that was rotated away are in ${aside}`);
}

/** Another client sends the same source: goes on where it stands, if that is this file. */
async function goOn(
  remote: Remote,
  source: string,
  read: Read,
  from: Start,
  stand: SourceState,
  rejected: Rejected,
): Promise<Start | null> {
  const taken: Read = (from, to) => read(from, Math.min(to, stand.offset));
  let at = from;
  for await (const chunk of readChunks(taken, from, true, () => {})) {
    await judge(remote, source, chunk, rejected);
    at = chunk.end;
  }
  return at.hash.copy().digest("hex") === stand.digest ? at : null;
}

/** Notes what the server has rejected of a chunk that it took without our hearing of it. */
async function judge(remote: Remote, source: string, chunk: Chunk, rejected: Rejected) {
  if (chunk.bytes.length === 0) return;
  const said = await remote.take(source, chunk);
  rejected.add(chunk, ("accepted" in said ? said : said.lines)?.errors ?? []);
}

/** Standard input: a source of its own, which nobody can go on with later. */
async function sendStream(remote: Remote, wish: Wish, total: Total): Promise<Rejected> {
  say("standard input cannot be resumed: if this is killed, nobody knows how far it came");
  const read = readStream(Bun.stdin.stream());
  const rejected = await openRejected("stdin.rejected.jsonl", 0, true, say);
  const { stand } = await sendPieces(remote, wish.name, read, begin(), true, {
    leftOver: (line) =>
      say(`standard input: line ${line} has no newline and is no event: left out`),
    taken: (chunk, counts) => count(total, chunk, counts),
    rejected,
    stop: wish.stop,
  });
  if (stand) throw new UploadFailed(`somebody else sends the source ${wish.name}`);
  return rejected;
}

function count(total: Total, chunk: Chunk, counts: Omit<Answer, "errors">): void {
  total.accepted += counts.accepted;
  if (chunk.tooLong !== "further part") total.rejected += counts.rejected;
  total.bytes += chunk.to - chunk.from;
  total.position = counts.position || total.position;
}

function skip(total: Total, from: Start, to: Start): void {
  total.thereBytes += to.offset - from.offset;
  total.thereLines += to.line - from.line + (to.lineFrom < to.offset ? 1 : 0);
}

interface Listener {
  leftOver(line: number): void;
  taken(chunk: Chunk, counts: Omit<Answer, "errors">): void;
  rejected: Rejected;
  stop: AbortSignal;
}

/**
 * Sends the chunks from `start` to the end, and returns where that is; with `stand`, where the
 * source turned out to be, because another client sends it too.
 */
async function sendPieces(
  remote: Remote,
  source: string,
  read: Read,
  start: Start,
  final: boolean,
  on: Listener,
): Promise<{ end: Start; stand: SourceState | null }> {
  const chunks = readChunks(read, start, final, on.leftOver);
  let end = start;
  let next = chunks.next();
  for (;;) {
    const { value: chunk } = await next;
    if (!chunk || on.stop.aborted) return { end, stand: null };
    next = chunks.next();
    next.catch(() => {}); // awaited in the next turn
    const answer = await remote.take(source, chunk);
    if ("accepted" in answer) {
      on.rejected.add(chunk, answer.errors);
      on.taken(chunk, answer);
    } else if (answer.offset === chunk.to && answer.digest === chunk.digest) {
      // It was taken before; only the answer was lost.
      const { lines, position } = answer;
      on.rejected.add(chunk, lines?.errors ?? []);
      on.taken(chunk, { accepted: lines?.accepted ?? 0, rejected: lines?.rejected ?? 0, position });
    } else return { end, stand: answer };
    end = chunk.end;
  }
}

/**
 * Finds the source of a file: of the generations `NAME`, `NAME#2`, … the last whose taken bytes the
 * file begins with; if there is none, or `again` is wished, the first that does not exist.
 */
async function locate(remote: Remote, name: string, read: Read, size: number, again: boolean) {
  const known: { generation: number; source: string; taken: SourceState }[] = [];
  let next = "";
  for (let generation = 1; ; generation++) {
    next = generation === 1 ? name : `${name}#${generation}`;
    if (generation > 1 && !isText(next, MAX_SOURCE_BYTES)) break; // there can be none of that name
    const taken = await remote.look(next);
    if (!taken) break;
    if (taken.offset <= size) known.push({ generation, source: next, taken });
  }
  let found: (typeof known)[number] | null = null;
  let passed = begin();
  // In one pass, however many there are.
  for (const one of again ? [] : known.toSorted((a, b) => a.taken.offset - b.taken.offset)) {
    passed = await advance(read, passed, one.taken.offset);
    if (passed.hash.copy().digest("hex") !== one.taken.digest) continue;
    if (!found || one.generation > found.generation) found = one;
  }
  return found ?? { source: next, taken: null };
}

async function openFile(path: string): Promise<FileHandle> {
  try {
    return await open(path);
  } catch (error) {
    throw new UploadFailed(`${path} cannot be read any more: ${(error as Error).message}`);
  }
}

function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

function wrong(line: string): number {
  say(line);
  return 2;
}

if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    say((error as Error).message);
    return 3;
  });
  process.exit();
}
