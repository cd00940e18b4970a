/**
 * The sources that come over HTTP: how much of each is stored. Requests of one source are stored in the order
 * of its bytes; while one is being synced, the next is hashed and sorted. It is stored only if the one before
 * it is.
 *
 * The ledger's checkpoints say what is posted. What this server has stored since is in the marks of
 * its journal, and in memory. How much of the journal's marks has been read is a state:
 *
 *     unread     nothing yet: the first request reads
 *     tail       the marks after the ledger's checkpoint; the ledger knows the rest
 *     whole      all marks: a source that is not in memory was never stored by this server
 *     partial    all that can be read, but some sources were evicted from memory, or deleted with
 *                their segments: only the ledger knows whether it has seen an unknown source
 *
 * `tail` becomes `whole` or `partial` when a source is unknown and the database is down, because events
 * are accepted without it. Only an unknown source in state `partial` gets a 503 then.
 *
 * A digest is checked where this server has seen all bytes of a source: from offset 0 on, and as long as it
 * remembers the source. After a restart it knows only the digest that is stored, from which the next one
 * cannot be computed: then the sender's stands.
 *
 * In a stream, bytes of a source are accepted only after bytes that are posted, or that this server's own
 * journal holds: those that another journal holds may be posted later than what follows them, and would then
 * not count. So unless it has itself stored what precedes them, a server waits until all that the stream holds
 * is posted; and when its journal becomes another one, it forgets all sources.
 *
 * Stale knowledge here never causes double counting: another server may have stored more of a source,
 * but bytes that are stored twice are posted once, because the ledger decides.
 */
import { isText, MAX_SOURCE_BYTES } from "../event/event.ts";
import type { JournalReader } from "../journal/reader.ts";
import { eachSourceMark, encodeSourceMark } from "../journal/source-mark.ts";
import { type Journal, JournalMoved } from "../journal/writer.ts";
import {
  earlierDigest,
  parseSent,
  readCheckpoint,
  readPosted,
  sentKey,
} from "../ledger/checkpoints.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import type { Lines } from "./body.ts";
import type { PostedWatch } from "./posted.ts";
import { Problem } from "./problem.ts";
import { nextTurn } from "./turns.ts";

/** Sources kept in memory; the one that was stored to longest ago is evicted first. */
const MAX_KNOWN_SOURCES = 10_000;

/** Hashed between two turns of the event loop: 4 ms where the processor does not help. */
const HASH_SLICE_BYTES = 1024 * 1024;

/** It is waited for this long until all that the stream holds is posted. */
const SETTLE_MS = 5_000;
/** For the bytes before those that have come. A client sends two chunks at a time only where each takes less than a second. */
const MAX_WAIT_MS = 5_000;
const LF = 10;

/** How much of a source is stored; `digest` is the SHA-256 (hex) of its bytes before `offset`. */
export interface SourceState {
  offset: number;
  digest: string;
}

const NOTHING_STORED: Known = {
  offset: 0,
  digest: new Bun.CryptoHasher("sha256").digest("hex"),
};

/** The next bytes of a source: where they begin, and the digest of all bytes up to their end. */
interface NextBytes {
  name: string;
  from: number;
  digest: string;
}

/** A piece of a body that is stored whole: where it ends in the body, and the digest up to there. */
interface Piece {
  to: number;
  digest: string;
}

/** The source is elsewhere, or `digest` is not that of its bytes. */
export interface NotStored {
  why: "offset" | "digest";
  state: SourceState;
}

/** `hash` has seen the bytes before `offset`; `undefined` where another process has. */
type Known = SourceState & { hash?: Bun.CryptoHasher | undefined };

/** Bytes of a source that are arriving: where they end, and when they have come, or never will. */
interface Arriving {
  to: number;
  promise: Promise<void>;
}

/** A body that is being stored. */
interface Upload {
  /** What the source will be once it is stored; `null` if it is not accepted. */
  accepted: Promise<Known | null>;
  /** Settles last, after those of all bodies before it. */
  isStored: Promise<boolean>;
}

/** What a body does in its turn, after the one `before` it. */
interface Turn {
  sort(): Promise<Lines>;
  before: Upload | undefined;
  accept(state: Known): void;
}

export function openSources(journal: Journal, database: Database, settle: PostedWatch["settle"]) {
  const { journals, isShared } = journal;
  const openJournal = () => journals.open(journal.id);
  let knownIn = journal.id;
  const known = new Map<string, Known>();
  /** The last upload of each source that is not over. */
  const uploads = new Map<string, Upload>();
  const arriving = new Map<string, Set<Arriving>>();
  let marks: "unread" | "tail" | "whole" | "partial" = "unread";
  const readTailOnce = sharedAttempt(readTail);
  const readAllOnce = sharedAttempt(readAll);

  return {
    /** How much of `name` is stored, as far as this server and the ledger know; `null`: never seen. */
    state: stateOf,
    /**
     * Notes that bytes `from` to `to` of a source are arriving. `before` settles once those that end at `from`
     * have come, if they are arriving too: then `store` is called in the order of the bytes. It waits for some
     * seconds at most, because a body that waits holds memory, and the one before it may take hours.
     */
    expect(name: string, from: number, to: number) {
      const here = arriving.get(name) ?? new Set();
      arriving.set(name, here);
      const { promise, resolve } = Promise.withResolvers<void>();
      const previous = here.values().find((other) => other.to === from)?.promise;
      const before = previous && Promise.race([previous, Bun.sleep(MAX_WAIT_MS)]);
      const own = { to, promise };
      here.add(own);
      return {
        before,
        arrived,
        [Symbol.dispose]: arrived,
      };

      function arrived(): void {
        resolve();
        here.delete(own);
        if (here.size === 0 && arriving.get(name) === here) arriving.delete(name);
      }
    },
    /**
     * Stores the good lines of `body`, the next bytes of a source, and returns the position once they are
     * synced. `sort` finds these lines, after the digest has been computed, because it moves bytes. While one
     * body is being synced, the next one is hashed and sorted.
     */
    store(
      piece: NextBytes,
      body: Uint8Array,
      sort: () => Promise<Lines>,
    ): Promise<{ position: number } | NotStored> {
      const { name } = piece;
      const { promise: accepted, resolve: accept } = Promise.withResolvers<Known | null>();
      const before = uploads.get(name);
      const storing = store(piece, body, { sort, before, accept });
      const stored = storing.then(
        (result) => "position" in result,
        () => false,
      );
      const isStored = Promise.all([stored, before?.isStored]).then(([isStored]) => isStored);
      const upload = { accepted, isStored };
      uploads.set(name, upload);
      isStored.then(() => {
        accept(null);
        if (uploads.get(name) === upload) uploads.delete(name);
      });
      return storing;
    },
  };

  async function stateOf(name: string): Promise<Known | null> {
    if (isShared) {
      forgetOthers();
      await settle(SETTLE_MS).catch((error) => {
        if (!known.has(name)) throw error;
      });
    } else if (marks === "unread") await readTailOnce();
    const inLedger = await readPostedState(name);
    const here = known.get(name) ?? null;
    return inLedger && inLedger.offset > (here?.offset ?? -1) ? inLedger : here;
  }

  /** Forgets what another journal holds. */
  function forgetOthers(): void {
    if (knownIn === journal.id) return;
    knownIn = journal.id;
    known.clear();
  }

  async function store(
    { name, from, digest }: NextBytes,
    body: Uint8Array,
    { sort, before, accept }: Turn,
  ) {
    const pending = await before?.accepted;
    const follows = pending?.offset === from;
    if (!follows) await before?.isStored;
    if (isShared) forgetOthers();
    let acceptedIn = journal.id;
    const state = follows ? pending : await currentState(name, from);
    if (state.offset !== from) return { why: "offset", state } as const;
    const hash = from === 0 ? new Bun.CryptoHasher("sha256") : state.hash?.copy();
    const pieces: Piece[] = [];
    for (let at = 0; at < body.length && (hash || isShared);) {
      if (at > 0) await nextTurn();
      const end = isShared ? sliceEnd(body, at, journal.maxFrameBytes) : at + HASH_SLICE_BYTES;
      hash?.update(body.subarray(at, end));
      at = end;
      // Without all bytes before it, nobody can compute the digest of a piece in the middle.
      if (isShared && at < body.length)
        pieces.push({
          to: at,
          digest: hash?.copy().digest("hex") ?? earlierDigest(from, state.digest),
        });
    }
    pieces.push({ to: body.length, digest });
    if (!isDigest(digest, { hash, state, body })) {
      if (!follows || (await before?.isStored)) return { why: "digest", state } as const;
      return { why: "offset", state: await currentState(name, from) } as const;
    }
    const to = from + body.length;
    const encoded = encodePieces(name, from, await sort(), pieces);
    // A file holds them all in one frame: there is no need to copy them together before.
    const parts = isShared ? encoded.map((piece) => Buffer.concat(piece)) : encoded.flat();
    accept({ offset: to, digest, hash });
    // Where those before it are not stored, it is as if they were in another journal.
    if (follows && !(await before?.isStored)) acceptedIn = "";
    for (;;) {
      try {
        if (journal.id !== acceptedIn) throw new JournalMoved();
        const position = await journal.append(...parts);
        forgetOthers();
        if (knownIn === acceptedIn) remember(name, { offset: to, digest, hash });
        return { position };
      } catch (error) {
        if (!(error instanceof JournalMoved)) throw error;
        acceptedIn = journal.id;
        const now = (await stateOf(name)) ?? NOTHING_STORED;
        if (now.offset !== from) return { why: "offset", state: now } as const;
      }
    }
  }

  async function currentState(name: string, from: number): Promise<Known> {
    const here = marks === "unread" && !isShared ? undefined : known.get(name);
    return here?.offset === from ? here : ((await stateOf(name)) ?? NOTHING_STORED);
  }

  function remember(name: string, state: Known): void {
    known.delete(name); // moves it to the end of the Map, so it is evicted last
    known.set(name, state);
    const [oldest] = known.keys();
    if (known.size <= MAX_KNOWN_SOURCES || oldest === undefined) return;
    known.delete(oldest);
    marks = "partial";
  }

  /** What the ledger has posted. While it is down, `null` where memory is enough; else throws Unavailable. */
  async function readPostedState(name: string): Promise<SourceState | null> {
    try {
      const checkpoint = await readCheckpoint(database, sentKey(name));
      return checkpoint && parseSent(checkpoint);
    } catch (error) {
      if (!(error instanceof Unavailable)) throw error;
      if (!known.has(name) && marks === "tail") await readAllOnce();
      if (known.has(name) || marks === "whole") return null;
      throw error;
    }
  }

  async function readTail(): Promise<void> {
    const reader = await openJournal();
    const posted = await readPosted(database, journal.id).catch(nullIfUnavailable);
    const from = Math.max(posted ?? 0, reader?.start ?? 0);
    try {
      if (reader) await readMarks(reader, from);
    } catch (error) {
      // Its segment may have been posted and deleted since the ledger was asked.
      const start = (await openJournal())?.start ?? 0;
      if (from < start) return readTail();
      throw error;
    }
    if (marks === "unread") marks = reader?.start === 0 && !posted ? "whole" : "tail";
  }

  async function readAll(): Promise<void> {
    const reader = await openJournal();
    if (!reader) return;
    await readMarks(reader, reader.start);
    if (marks === "tail") marks = reader.start === 0 ? "whole" : "partial";
  }

  async function readMarks(reader: JournalReader, from: number) {
    // Not what is on its way to the disk: it may never get there.
    const end = journal.end();
    for (let position = from; position < end;) {
      const frames = (await reader.read(position)).filter(({ to }) => to <= end);
      for (const { payload, to } of frames) {
        eachSourceMark(payload, ({ name, to: offset, digest }) => {
          const here = known.get(name);
          // What is in memory with its hash is not replaced by the mark of the same bytes.
          if (here?.hash ? offset > here.offset : offset >= (here?.offset ?? 0))
            remember(name, { offset, digest });
        });
        position = to;
      }
      if (frames.length === 0) return;
    }
  }
}

/**
 * Where the slice of `body` from `at` on ends: it is hashed in one turn. Where only frames of `maxBytes` are
 * stored whole, its lines, with their mark, fit into one: a mark states where each line ends, which is less
 * than a quarter of the line's own length.
 */
function sliceEnd(body: Uint8Array, at: number, maxBytes: number): number {
  const bytes = Math.min(HASH_SLICE_BYTES, Math.floor(maxBytes * 0.75));
  if (body.length - at <= bytes) return body.length;
  const end = body.lastIndexOf(LF, at + bytes - 1) + 1;
  if (end > at) return end;
  return body.indexOf(LF, at) + 1 || body.length; // a line that is too long to be an event
}

/** The good lines of each piece, after the mark that says where they come from. */
function encodePieces(name: string, from: number, lines: Lines, pieces: Piece[]): Uint8Array[][] {
  const { good, counts, ends } = lines;
  const encoded: Uint8Array[][] = [];
  let line = 0;
  let index = 0; // in `good`
  let begin = 0; // of the piece, in the body
  for (const { to, digest } of pieces) {
    const isLast = encoded.length === pieces.length - 1;
    const first = line;
    const firstIndex = index;
    for (; line < counts.accepted && !isLast; line++) {
      const newline = good.indexOf(LF, index);
      if ((ends?.[line] ?? newline) >= to) break;
      index = newline + 1;
    }
    if (isLast) [line, index] = [counts.accepted, good.length];
    const own = ends && { ends: ends.slice(first, line).map((end) => end - begin) };
    const mark = { name, from: from + begin, to: from + to, digest, events: line - first, ...own };
    encoded.push([encodeSourceMark(mark), good.subarray(firstIndex, index)]);
    begin = to;
  }
  return encoded;
}

/** Callers share an attempt in progress; the next call after it tries again. */
function sharedAttempt(attempt: () => Promise<void>): () => Promise<void> {
  let current: Promise<void> | null = null;
  return () => {
    current ??= attempt().finally(() => void (current = null));
    return current;
  };
}

function nullIfUnavailable(error: unknown): null {
  if (error instanceof Unavailable) return null;
  throw error;
}

/** Whether `digest` can be that of the bytes before `state.offset` and `body`, all of which `hash` has seen. */
function isDigest(
  digest: string,
  {
    hash,
    state,
    body,
  }: { hash: Bun.CryptoHasher | undefined; state: SourceState; body: Uint8Array },
): boolean {
  if (hash) return hash.copy().digest("hex") === digest;
  return body.length > 0 || digest === state.digest;
}

/** The name of a source as it stands in the path, decoded. Throws the 422. */
export function requireSourceName(name: string): string {
  // The router replaces invalid UTF-8 with U+FFFD, which could make two names one.
  if (isText(name, MAX_SOURCE_BYTES) && !name.includes("\ufffd")) return name;
  throw new Problem(
    422,
    `the name of a source must have 1 to ${MAX_SOURCE_BYTES} bytes of valid UTF-8 without NUL`,
  );
}

/** `Upload-Offset` and `Source-Digest` of a request. Throws the 422. */
export function readSourceHeaders(headers: Headers): SourceState {
  const offset = headers.get("upload-offset") ?? "";
  const digest = headers.get("source-digest") ?? "";
  const errors = [];
  if (!/^\d{1,15}$/.test(offset))
    errors.push({ path: "Upload-Offset", message: "must be a number of bytes" });
  if (!/^[0-9a-f]{64}$/i.test(digest))
    errors.push({ path: "Source-Digest", message: "must be a SHA-256 in hexadecimal" });
  if (errors.length > 0)
    throw new Problem(422, "a source needs Upload-Offset and Source-Digest", { errors });
  return { offset: Number(offset), digest: digest.toLowerCase() };
}

/** The same headers for an answer. */
export function sourceHeaders({ offset, digest }: SourceState): Record<string, string> {
  return { "upload-offset": `${offset}`, "source-digest": digest };
}
