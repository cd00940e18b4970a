/**
 * Reads journals that lie in a stream. What a direct get returns comes from any replica, which may be behind
 * or damaged. So each message must be whole and begin where the one before it ends; otherwise it is read
 * again from the leader and from each server, and if none of them has it, that is damage. Nothing is
 * skipped. Only the leader can say that a journal has ended.
 */
import { JournalDamage } from "./format.ts";
import type { Frame, JournalReader, Journals } from "./reader.ts";
import { parseMessage, type StoredMessage, type Stream } from "./stream.ts";

/** A wake-up may be lost. */
const LOOK_MS = 200;
/** How often all journals are read again: a stale leader may have told a reader that nothing was new. */
const READ_ALL_MS = 60_000;
/** A leader that hears of no other node steps down after 10 s. */
const STALE_MS = 20_000;
const ADVICE =
  "compare the nodes of the stream, and restore the files of the damaged one (deploy/README.md)";

type Message = Frame & { base: number; seq: number };

/** All journals of the stream. */
export function streamJournals(stream: Stream): Journals {
  let known = { lastSeq: -1, ends: new Map<string, number>() };
  return {
    name: stream.name,
    open: (id) => openStreamReader(stream, id),
    async ends() {
      const ends = new Map<string, number>();
      const { counts, lastSeq } = await stream.list();
      if (lastSeq === known.lastSeq) return known.ends;
      for (const id of counts.keys()) {
        const last = await stream.last(id);
        const end = last && (await whole(stream, last).catch(nullIfDamaged));
        if (end) ends.set(id, end.to);
      }
      known = { lastSeq, ends };
      return ends;
    },
  };
}

/**
 * Opens a journal of the stream; `null` if it has no message. Where it was found to end, it is read again only
 * if `hasNews` says so. Throws JournalDamage or JournalUnavailable.
 */
export async function openStreamReader(
  stream: Stream,
  id: string,
  hasNews: () => boolean = () => true,
): Promise<JournalReader | null> {
  const first = await stream.next(id, 1);
  if (!first) return null;
  const { base: start } = await whole(stream, first);
  /** The sequence from which on the message at `position` is found. */
  let place = { position: start, seq: first.seq };
  let endedAt = -1;

  return {
    id,
    start,
    sync: async () => {}, // what can be read is stored on most of the replicas
    remedy: () =>
      `abandon this journal: run ${stream.purgeCommand(id)}, then bun run processor.ts --retire journal:${id} --yes; ` +
      "first copy the events accepted since the restore, which are only in the stream",
    async end(expected = 0) {
      for (const startedMs = performance.now(); ; await Bun.sleep(LOOK_MS)) {
        const last = await stream.last(id);
        const end = last ? (await whole(stream, last)).to : 0;
        if (end >= expected || performance.now() - startedMs > STALE_MS) return end;
      }
    },
    async read(position) {
      if (position === endedAt && !hasNews()) return [];
      const seq =
        place.position === position ? place.seq : (await findMessage(stream, id, position))?.seq;
      if (seq === undefined) throw damage(stream, id, position, "no message begins here");
      const frames: Frame[] = [];
      let expected = position;
      // A damaged replica may not answer at all.
      const messages = await stream.read(id, seq).catch(() => []);
      for (const message of messages) {
        const parsed = parse(message);
        if (!parsed || !begins(parsed, expected)) break;
        frames.push(parsed);
        expected = parsed.to;
        place = { position: parsed.to, seq: parsed.seq + 1 };
      }
      if (frames.length > 0) return frames;
      const found = await readAnywhere(stream, id, { seq, position });
      if (found) place = { position: found.to, seq: found.seq + 1 };
      else endedAt = position;
      return found ? [found] : [];
    },
  };
}

/**
 * The journals that got new frames, as far as wake-ups and a look every 200 ms show. A damaged or late wake-up
 * does no harm.
 */
export function watchStream(stream: Stream) {
  const changed = new Set<string>();
  let counts = new Map<string, number>();
  let lastSeq = -1;
  let lookMs = Number.NEGATIVE_INFINITY;
  let allMs = performance.now();
  let wake = () => {};
  const ignoreWakes = stream.onWake((id) => {
    changed.add(id);
    wake();
  });

  return {
    /** Returns once there is news, after 200 ms at the latest, the ids of journals that may have new frames. */
    async next(): Promise<string[]> {
      if (changed.size === 0) {
        const { promise, resolve } = Promise.withResolvers<void>();
        wake = resolve;
        const timer = setTimeout(resolve, Math.max(0, lookMs + LOOK_MS - performance.now()));
        await promise;
        clearTimeout(timer);
      }
      if (performance.now() >= lookMs + LOOK_MS) await look();
      const ids = [...changed];
      changed.clear();
      return ids;
    },
    close() {
      ignoreWakes();
      wake();
    },
  };

  async function look(): Promise<void> {
    lookMs = performance.now();
    const found = await stream.list();
    if (lookMs - allMs >= READ_ALL_MS) {
      for (const id of found.counts.keys()) changed.add(id);
      allMs = lookMs;
    }
    if (found.lastSeq === lastSeq) return;
    let added = 0;
    for (const [id, count] of found.counts) {
      const more = count - (counts.get(id) ?? 0);
      if (more !== 0) changed.add(id);
      added += Math.max(0, more);
    }
    // As many messages of a journal may have been purged as were added.
    if (added < found.lastSeq - lastSeq) for (const id of found.counts.keys()) changed.add(id);
    ({ counts, lastSeq } = found);
  }
}

/**
 * The message with which a journal begins after a purge of what is before `position`: never behind its last one,
 * because an empty subject would accept a first message again. `null` if the journal is not there.
 */
export async function findKept(stream: Stream, id: string, position: number) {
  const last = await stream.last(id);
  if (!last) return null;
  const end = await whole(stream, last);
  const kept = end.base <= position ? end : await findMessage(stream, id, position);
  if (!kept) throw damage(stream, id, position, "no message begins here");
  return { position: kept.base, seq: kept.seq };
}

/**
 * The message that begins at `position`, by halving: positions and sequences grow together. After the last one,
 * the sequence that follows it. `null` if none begins there.
 */
export async function findMessage(stream: Stream, id: string, position: number) {
  const [first, last] = [await stream.next(id, 1), await stream.last(id)];
  if (!first || !last) return null;
  let low = await whole(stream, first);
  const end = await whole(stream, last);
  if (position === end.to) return { ...end, base: end.to, seq: end.seq + 1 };
  if (position < low.base || position > end.to) return null;
  for (let high = end.seq; low.seq < high;) {
    const middle = Math.ceil((low.seq + high) / 2);
    const message = await stream.next(id, middle);
    const found = message && (await whole(stream, message));
    if (found && found.base <= position) low = found;
    else high = middle - 1;
  }
  return begins(low, position) ? low : null;
}

/** The message at `position` from whichever server has it whole; `null` if the journal ends there. */
async function readAnywhere(
  stream: Stream,
  id: string,
  { seq, position }: { seq: number; position: number },
): Promise<Message | null> {
  let failure: unknown;
  const next = await stream.next(id, seq).catch((error: unknown) => {
    failure = error;
    return undefined;
  });
  if (next === null) return null;
  for await (const message of stream.readElsewhere(id, seq)) {
    const parsed = parse(message);
    if (parsed && begins(parsed, position)) return parsed;
  }
  if (!next) throw failure;
  const found = parse(next);
  const what = found
    ? `the next message begins at position ${found.base}, and no server has what is before it`
    : `no server has a whole message with sequence ${next.seq}`;
  throw damage(stream, id, position, what);
}

/** The message, parsed; if it is damaged, as another server has it. Throws JournalDamage. */
async function whole(stream: Stream, message: StoredMessage): Promise<Message> {
  const parsed = parse(message);
  if (parsed) return parsed;
  const { journalId: id, seq } = message;
  for await (const other of stream.readElsewhere(id, seq)) {
    const parsed = other.seq === seq ? parse(other) : null;
    if (parsed) return parsed;
  }
  throw damage(stream, id, 0, `no server has a whole message with sequence ${seq}`);
}

/** Damage to one journal is reported where that is posted, and concerns no other. */
function nullIfDamaged(error: unknown): null {
  if (error instanceof JournalDamage) return null;
  throw error;
}

function parse(message: StoredMessage): Message | null {
  const parsed = parseMessage(message);
  if (!parsed) return null;
  const { base, to, frame } = parsed;
  const { header, payload, atMs } = frame;
  const from = to - payload.length - header.length - 1;
  return { base, from, to, header, payload, atMs, seq: message.seq };
}

/** A position is that of the message, or of its frame. */
function begins({ base, from }: Message, position: number): boolean {
  return position === base || position === from;
}

function damage(stream: Stream, id: string, position: number, what: string): JournalDamage {
  return new JournalDamage(journalName(stream, id), position, what, ADVICE);
}

/** A journal of a stream, for messages. */
export function journalName({ name }: Pick<Stream, "name">, id: string): string {
  return `journal ${id} of ${name}`;
}
