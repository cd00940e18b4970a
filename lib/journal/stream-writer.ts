/**
 * The writer of a journal in a stream. It promises what the writer of files does: when `append` resolves, the
 * lines are stored, and are found however this process or a node of the stream dies.
 *
 * Group commit: one publish is in flight, and everything that arrives meanwhile shares the next one.
 *
 * A journal has one writer at a time, without a lock: every publish expects the message that this writer
 * knows as the last one. A server that starts adopts a journal whose server does not answer, by publishing
 * an empty frame; only if there is none, a new journal begins. So there are about as many journals as servers.
 * A former owner that is still alive finds out with its next publish, which is refused and therefore not
 * stored. It adopts another journal, publishes the same frame there, and nobody who waits notices.
 *
 * A publish without an answer may have been stored, or be stored later. It is repeated until there is an
 * answer: a message that was refused is compared with what is stored in its place, which is read through the
 * leader. Those who have waited for 5 s are told that their events may or may not be kept. Once nobody waits
 * for a frame any more it is given up: the next one takes its place, unless it turns out to be there already.
 *
 * What belongs to a source never moves to another journal: there it could be posted before the bytes that
 * precede it, and these would then count as posted.
 */
import { newJournalId, toFrameTime } from "./format.ts";
import { parseSourceMark } from "./source-mark.ts";
import { journalName, streamJournals } from "./stream-reader.ts";
import {
  encodeMessage,
  openStream,
  parseMessage,
  type Published,
  RECONNECT_MS,
  type Stream,
} from "./stream.ts";
import {
  type Commit,
  type Journal,
  JournalBusy,
  JournalFailed,
  JournalFull,
  JournalMoved,
} from "./writer.ts";

/** Who waits for longer gets an error. */
const PATIENCE_MS = 5_000;
/** The pause before a publish of unknown outcome is repeated. */
const PAUSE_MS = 50;
const MAX_PAUSE_MS = 500;
/** Trouble is reported for this long after an append failed. */
const TROUBLE_MS = 5_000;
/**
 * For this long the leader must say that what was acknowledged is not there, before that is believed: a leader
 * that is cut off from the others takes 10 to 20 s to find that out.
 */
const LOST_MS = 30_000;
const LF = 10;

interface Append {
  dueMs: number;
  resolve(position: number): void;
  reject(error: Error): void;
  isRejected: boolean;
}

/** Lines that are stored together; the last part of an append resolves it. */
interface Part {
  lines: Uint8Array;
  append: Append;
  isLast: boolean;
}

/** Where the next message of the journal belongs: at `end`, after the message with sequence `seq`. */
interface Place {
  id: string;
  end: number;
  seq: number;
}

/** Opens the stream of JOURNAL_URL, and a journal in it. Throws InvalidSetting and JournalUnavailable. */
export async function openStreamJournal(
  url: string,
  say: (line: string) => void = () => {},
): Promise<Journal> {
  const stream = await openStream(url, say);
  const writer = crypto.randomUUID();
  let { opened: place, endLive } = await openPlace(stream, writer, new Set());
  /** Journals that were adopted by another server, or have lost messages. */
  const left = new Set<string>();
  const waiting: Part[] = [];
  const listeners: ((commit: Commit) => void)[] = [];
  let committing: Promise<void> | null = null;
  let trouble: Error | null = null;
  let troubleAtMs = 0;
  /** Since when the stream refuses frames although it holds nothing in their place. */
  let missingMs: number | null = null;
  let isClosed = false;

  return {
    get id() {
      return place.id;
    },
    journals: streamJournals(stream),
    isShared: true,
    maxFrameBytes: stream.maxFrameBytes,
    end: () => place.end,
    trouble() {
      if (!stream.isConnected()) return `cannot reach ${stream.name}`;
      if (performance.now() - troubleAtMs > TROUBLE_MS) trouble = null;
      return trouble?.message ?? null;
    },
    append(...parts) {
      if (isClosed) return Promise.reject(new JournalFailed(`${stream.name} is closed`));
      const pieces = parts.flatMap((part) => cut(part, stream.maxFrameBytes));
      if (pieces.length === 0) return Promise.resolve(place.end);
      return new Promise((resolve, reject) => {
        const dueMs = performance.now() + PATIENCE_MS;
        const append = { dueMs, resolve, reject, isRejected: false };
        for (const [i, lines] of pieces.entries())
          waiting.push({ lines, append, isLast: i === pieces.length - 1 });
        committing ??= commitAll();
      });
    },
    onCommit: (listener) => void listeners.push(listener),
    async close() {
      while (committing !== null) await committing;
      isClosed = true;
      await stream.close();
    },
  };

  async function commitAll() {
    while (waiting.length > 0) await commit(takeGroup());
    committing = null;
  }

  /** At least one part, and as many as fit into a frame. */
  function takeGroup(): Part[] {
    let bytes = 0;
    const isOver = ({ lines }: Part) => (bytes += lines.length) > stream.maxFrameBytes;
    const count = waiting.findIndex(isOver);
    const group = waiting.splice(0, count < 0 ? waiting.length : Math.max(count, 1));
    return group.filter(({ append }) => !append.isRejected);
  }

  /** Stores a group in one message, or rejects its appends. */
  async function commit(group: Part[]): Promise<void> {
    const atMs = toFrameTime(Date.now());
    const startedMs = performance.now();
    const expiring = setInterval(expire, 100);
    let reconnectMs = startedMs + RECONNECT_MS;
    let why = "";
    /** Whether an attempt to store this group may have succeeded, or still may. */
    let isUncertain = false;
    try {
      for (let pauseMs = PAUSE_MS; group.length > 0;) {
        const { id, end, seq } = place;
        const message = encodeMessage(
          id,
          end,
          group.map(({ lines }) => lines),
          atMs,
        );
        const sentMs = performance.now();
        const published = await stream.publish(id, message, { expected: seq, writer });
        if (published.state === "stored")
          return stored(group, message, {
            seq: published.seq,
            atMs,
            syncMs: performance.now() - sentMs,
          });
        if (published.state === "full") {
          const what = `cannot append to ${stream.name}: ${published.why}; raise its max_bytes, or free some space, and it resumes by itself`;
          return reject(group, note(new JournalFull(what)));
        }
        isUncertain ||= published.state === "unknown";
        const found = published.state === "refused" ? await findInPlace(message) : published;
        if (found.state === "stored")
          return stored(group, message, {
            seq: found.seq,
            atMs,
            syncMs: performance.now() - sentMs,
          });
        if (found.state === "other") continue; // an earlier frame of ours was there; this one follows it
        const isLost =
          found.state === "lost" && performance.now() - (missingMs ??= sentMs) > LOST_MS;
        if (found.state === "adopted" || found.state === "purged" || isLost) {
          const name = journalName(stream, id);
          if (isLost)
            say(
              `${name} has lost acknowledged frames before position ${end}: the files of its nodes are damaged`,
            );
          if (found.state === "purged" || (isLost && isUncertain))
            reject(
              group,
              note(new JournalBusy(`${name}: it is not known whether the events were stored`)),
            );
          group = await move(
            group,
            isLost ? "it has lost frames" : "another server has adopted it",
          );
          continue;
        }
        why = "why" in found ? found.why : "it refuses what follows its last frame";
        note(new JournalBusy(`cannot append to ${stream.name}: ${why}; it resumes by itself`));
        if (performance.now() > reconnectMs) {
          stream.reconnect();
          reconnectMs = performance.now() + RECONNECT_MS;
        }
        await Bun.sleep(pauseMs);
        pauseMs = Math.min(2 * pauseMs, MAX_PAUSE_MS);
        group = group.some(({ append }) => !append.isRejected) ? group : [];
      }
    } finally {
      clearInterval(expiring);
    }

    /** Rejects those who have waited long enough, in the group and behind it. */
    function expire(): void {
      const now = performance.now();
      const due = [...group, ...waiting].filter(({ append }) => append.dueMs < now);
      if (due.length === 0) return;
      const what = why || "no answer in time";
      reject(
        due,
        new JournalBusy(
          `${stream.name}: ${what}; the events may or may not be kept: send them again with the same id, or as a source`,
        ),
      );
      for (let i = waiting.length; i-- > 0;)
        if (waiting[i]?.append.isRejected) waiting.splice(i, 1);
    }
  }

  function stored(
    group: Part[],
    message: Buffer,
    { seq, atMs, syncMs }: { seq: number; atMs: number; syncMs: number },
  ): void {
    const from = place.end;
    place = { ...place, seq, end: from + message.length };
    trouble = null;
    missingMs = null;
    stream.wake(place.id);
    const commit = { from, atMs, bytes: message.length, appends: group.length, syncMs };
    for (const listener of listeners) listener(commit);
    for (const { append, isLast } of group) if (isLast) append.resolve(place.end);
  }

  /**
   * What is stored in the place of `message`, which was refused. `other`: an earlier message of ours; the place
   * is now after it. `purged`: what was there, which may have been `message`, is deleted. `lost`: not even the
   * message before it is there.
   */
  async function findInPlace(
    message: Buffer,
  ): Promise<
    | { state: "stored"; seq: number }
    | { state: "other" | "adopted" | "purged" | "lost" }
    | Extract<Published, { state: "unknown" }>
  > {
    try {
      const next = await stream.next(place.id, place.seq + 1);
      if (!next) {
        const last = await stream.last(place.id);
        if ((last?.seq ?? 0) < place.seq) return { state: "lost" };
        return { state: "unknown", why: "an earlier frame is still on its way" };
      }
      const parsed = parseMessage(next);
      if (!parsed) return { state: "unknown", why: "what is stored there is damaged" };
      if (parsed.base !== place.end) return { state: "purged" };
      if (next.writer !== writer) return { state: "adopted" };
      if (next.data.equals(message)) return { state: "stored", seq: next.seq };
      place = { ...place, seq: next.seq, end: parsed.to };
      return { state: "other" };
    } catch (error) {
      return { state: "unknown", why: (error as Error).message };
    }
  }

  /** Continues in another journal. Returns the part of the group that may be stored there. */
  async function move(group: Part[], why: string): Promise<Part[]> {
    const { id } = place;
    left.add(id);
    missingMs = null;
    const next = await openPlace(stream, writer, left).catch((error: Error) => {
      note(new JournalBusy(`cannot open a journal in ${stream.name}: ${error.message}`));
      return null;
    });
    if (!next) {
      await Bun.sleep(MAX_PAUSE_MS);
      return group.filter(({ append }) => !append.isRejected);
    }
    endLive();
    ({ opened: place, endLive } = next);
    say(`${journalName(stream, id)}: ${why}; continuing in journal ${place.id}`);
    const isSource = ({ lines }: Part) =>
      parseSourceMark(lines.subarray(0, lines.indexOf(LF))) !== null;
    const moved = [...group, ...waiting].filter(isSource);
    reject(moved, new JournalMoved(`${stream.name}: a source does not move to another journal`));
    for (let i = waiting.length; i-- > 0;) if (waiting[i]?.append.isRejected) waiting.splice(i, 1);
    return group.filter(({ append }) => !append.isRejected);
  }

  function reject(parts: Part[], error: Error): void {
    for (const { append } of parts) {
      append.isRejected = true;
      append.reject(error);
    }
  }

  function note<E extends Error>(error: E): E {
    trouble = error;
    troubleAtMs = performance.now();
    return error;
  }
}

/** A place, and what ends that this process answers for its journal. */
interface OpenedPlace {
  opened: Place;
  endLive(): void;
}

/**
 * Adopts a journal that nobody writes, or else begins one. Throws JournalUnavailable. The order matters: a server
 * answers for a journal before it claims it, and the claim expects a message that it read before it asked others.
 */
async function openPlace(stream: Stream, writer: string, left: Set<string>): Promise<OpenedPlace> {
  const { counts } = await stream.list();
  for (const id of counts.keys()) {
    const last = left.has(id) ? null : await stream.last(id);
    const parsed = last && parseMessage(last);
    if (!last || !parsed || (await stream.isLive(id))) continue; // to a damaged one nothing is added
    const endLive = stream.live(id);
    const claim = encodeMessage(id, parsed.to, [], toFrameTime(Date.now()));
    const published = await stream.publish(id, claim, { expected: last.seq, writer });
    if (published.state === "stored") {
      stream.wake(id);
      return { opened: { id, end: parsed.to + claim.length, seq: published.seq }, endLive };
    }
    endLive();
  }
  const id = newJournalId();
  return { opened: { id, end: 0, seq: 0 }, endLive: stream.live(id) };
}

/** Cuts lines that are longer than `maxBytes` at line ends. */
function cut(lines: Uint8Array, maxBytes: number): Uint8Array[] {
  const pieces: Uint8Array[] = [];
  for (let from = 0; from < lines.length;) {
    const rest = lines.length - from;
    const to = rest <= maxBytes ? lines.length : lines.lastIndexOf(LF, from + maxBytes - 1) + 1;
    if (to <= from) throw new RangeError(`a line is longer than ${maxBytes} bytes`);
    pieces.push(lines.subarray(from, to));
    from = to;
  }
  return pieces;
}
