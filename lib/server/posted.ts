/**
 * How far the ledger has posted this server's journal, and others. One poller of the checkpoints
 * serves three askers: the lag, `?after=POSITION`, and the comparison when the server starts. In a stream the
 * lag is that of the journals of all servers.
 *
 * It polls only while somebody waits or something is unposted. So the lag holds whichever process
 * posts, and keeps growing while the database is down.
 */
import { JournalBehind } from "../journal/format.ts";
import type { Journal } from "../journal/writer.ts";
import { journalKey, readCheckpoints } from "../ledger/checkpoints.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import { unavailable } from "./problem.ts";

const WAITING_POLL_MS = 10;
const POLL_MS = 1_000;
/** Until the database has answered once, it is asked this often. */
const FIRST_POLL_MS = 500;
const MAX_WAITERS = 10_000;
/** Of the ends of a journal that are seen within this time, the first one's is kept. */
const SEEN_EVERY_MS = 50;
/** As long as nothing is posted, the list of ends grows. At this length, every second one is dropped. */
const MAX_SEEN = 1_000;

export type PostedWatch = ReturnType<typeof watchPosted>;

export function watchPosted(journal: Journal, database: Database) {
  const { journals, isShared } = journal;
  const all = isShared ? watchAll(journal) : null;
  const comparison = Promise.withResolvers<void>();
  const startEnd = journal.end();
  // Until the ledger has answered, all that was in the journal counts as posted.
  let posted = startEnd;
  /** The oldest frame that is not posted, or one near it: it is read again at most once a second. */
  let oldest: { position: number; atMs: number } | null = null;
  let readMs = Number.NEGATIVE_INFINITY;
  /** When the ledger has moved, or had nothing left to post. */
  let movedMs = performance.now();
  let isAnswering = true;
  let hasAnswered = false;
  let isClosed = false;
  /** Why this process's processor pauses. */
  let paused: string | null = null;
  /** The journals that somebody waits for, one entry for each. */
  const waiting = new Set<{ key: string }>();
  /** Where the journals that are waited for stand, once the database has answered the next time. */
  let next = nextAnswer();
  let wake = () => {};
  const asked = Promise.allSettled([refresh()]);
  poll();
  journal.onCommit(({ from, atMs }) => {
    oldest ??= { position: from, atMs };
    if (posted >= from) movedMs = performance.now(); // until now, nothing was left to post
  });

  return {
    /** Settles once the database has been asked for the first time: it has not answered, or `compared` is settled. */
    asked,
    /**
     * Settles once the database has answered, or after `close`. Rejects with JournalBehind when the
     * journal ends before what the ledger has posted of it.
     */
    compared: comparison.promise,
    /** What is known now, without asking the database. */
    lag,
    /** Whether the database answered the last time it was asked. */
    isAnswering: () => isAnswering,
    /** Notes why posting pauses until a person changes something, or with `null` that it does not. */
    pause(why: string | null) {
      paused = why;
    },
    /** Why the processor of this process pauses; `null` if it does not, or if another process posts. */
    paused: () => paused,
    /** Asks the ledger. Throws Unavailable. */
    refresh,
    wait,
    /**
     * Returns once everything is posted that the stream held when this was called. Throws Unavailable, and a
     * 503 if the stream does not answer, or not all is posted within `withinMs`.
     */
    async settle(withinMs: number): Promise<void> {
      const untilMs = performance.now() + withinMs;
      const ends = await journals.ends().catch((error: Error) => {
        throw unavailable(`${journals.name}: ${error.message}`);
      });
      for (const [id, end] of ends)
        if (!(await wait(id, end, Math.max(0, untilMs - performance.now()))))
          throw unavailable("what other servers have stored is not posted yet; retry shortly");
    },
    close() {
      isClosed = true;
      wake();
      comparison.resolve();
    },
  };

  /**
   * Returns `true` once `journalId` is posted up to `position`, `false` after `withinMs`. Throws
   * Unavailable when the database does not answer or too many wait.
   */
  async function wait(journalId: string, position: number, withinMs: number): Promise<boolean> {
    if (waiting.size >= MAX_WAITERS) throw new Unavailable("too many requests wait", true);
    const waiter = { key: journalKey(journalId) };
    const untilMs = performance.now() + withinMs;
    waiting.add(waiter);
    wake();
    try {
      do {
        const positions = await next.promise;
        if ((positions.get(waiter.key) ?? 0) >= position) return true;
      } while (performance.now() <= untilMs);
      return false;
    } finally {
      waiting.delete(waiter);
    }
  }

  function lag() {
    if (all) return all.lag();
    const bytes = Math.max(0, journal.end() - posted);
    if (bytes === 0) return { bytes, seconds: 0 };
    // A frame may be unreadable, or dated in the future: as long as nothing is posted, the lag grows.
    const ageMs = oldest ? Date.now() - oldest.atMs : 0;
    return { bytes, seconds: Math.max(ageMs, performance.now() - movedMs, 1) / 1000 };
  }

  async function poll() {
    await asked;
    while (!isClosed) {
      const pauseMs = waiting.size > 0 ? WAITING_POLL_MS : hasAnswered ? POLL_MS : FIRST_POLL_MS;
      const pause = Promise.withResolvers<void>();
      const timer = setTimeout(pause.resolve, pauseMs);
      wake = pause.resolve;
      await pause.promise;
      clearTimeout(timer);
      const isBehind = (await all?.look()) || posted < journal.end();
      const isNeeded = !hasAnswered || waiting.size > 0 || isBehind;
      if (isNeeded && !isClosed) await refresh().catch(() => {});
    }
  }

  /** Reads the checkpoints that anybody waits for, and passes them on. */
  async function refresh() {
    try {
      const ownKey = journalKey(journal.id);
      const keys = new Set([ownKey, ...(all?.keys() ?? []), ...[...waiting].map(({ key }) => key)]);
      const rows = await readCheckpoints(database, [...keys]);
      const positions = new Map(rows.map(({ key, position }) => [key, position]));
      const position = positions.get(ownKey) ?? 0;
      if (position !== posted || position >= journal.end()) movedMs = performance.now();
      posted = position;
      all?.posted(positions);
      isAnswering = true;
      next.resolve(positions);
    } catch (error) {
      isAnswering &&= !(error instanceof Unavailable);
      next.reject(error);
      throw error;
    } finally {
      next = nextAnswer();
    }
    const isFirst = !hasAnswered;
    hasAnswered = true;
    if (isFirst) await compare(posted).then(comparison.resolve, comparison.reject);
    await findOldest();
    return lag();
  }

  /**
   * What a journal accepts that is behind its ledger would never be posted. Its end is read after the
   * checkpoint: what is posted was in the file before. Of a stream, a server knows the end without asking, until
   * it has published something of which it does not know whether it is stored.
   */
  async function compare(posted: number) {
    if (isShared && posted <= journal.end()) return;
    const reader = await journals.open(journal.id);
    if (!reader) return; // nothing was ever stored in it
    const isUntouched = isShared && journal.end() === startEnd;
    const end = isUntouched ? startEnd : await reader.end(posted);
    if (posted <= end) return;
    const accepted =
      end > startEnd
        ? `; events after position ${startEnd} were accepted since this server started and will not be posted: copy them now, and send them again later`
        : "";
    const what = `it ends at position ${end}, but the ledger has posted it up to ${posted}${accepted}`;
    throw new JournalBehind(journals.name, what, reader.remedy(false));
  }

  async function findOldest() {
    if (posted >= journal.end() || all) oldest = null;
    else if (oldest?.position !== posted && performance.now() - readMs > POLL_MS) {
      readMs = performance.now();
      const atMs = await writtenAt(journal, posted).catch(() => null);
      if (atMs !== null) oldest = { position: posted, atMs };
    }
  }
}

function nextAnswer() {
  const answer = Promise.withResolvers<Map<string, number>>();
  answer.promise.catch(() => {}); // nobody may be waiting
  return answer;
}

/** When the frame that begins at `position` was written. */
async function writtenAt({ journals, id }: Journal, position: number): Promise<number | null> {
  const [frame] = (await (await journals.open(id))?.read(position)) ?? [];
  return frame?.atMs ?? null;
}

/**
 * The lag of all journals of a stream: where each ends, from a look once a second, and for this server's own
 * from its commits. An end that is not posted is as old as the moment in which it was first seen.
 */
function watchAll(journal: Journal) {
  const known = new Map<
    string,
    { end: number; posted: number; seen: { end: number; ms: number }[] }
  >();
  let lookMs = Number.NEGATIVE_INFINITY;
  journal.onCommit(({ from, bytes }) => saw(journal.id, from + bytes));

  return {
    /** Looks, once a second; returns whether a journal holds more than is known to be posted. */
    async look(): Promise<boolean> {
      if (performance.now() - lookMs >= POLL_MS) {
        lookMs = performance.now();
        const ends = await journal.journals.ends().catch(() => new Map<string, number>());
        for (const [id, end] of ends) saw(id, end);
      }
      return [...known.values()].some(({ end, posted }) => posted < end);
    },
    keys: () => Array.from(known.keys(), journalKey),
    posted(positions: ReadonlyMap<string, number>) {
      for (const [id, one] of known) {
        one.posted = positions.get(journalKey(id)) ?? one.posted;
        one.seen = one.seen.filter(({ end }) => end > one.posted);
      }
    },
    lag() {
      const behind = [...known.values()].filter(({ end, posted }) => posted < end);
      const bytes = behind.reduce((sum, { end, posted }) => sum + end - posted, 0);
      const sinceMs = Math.min(...behind.map(({ seen }) => seen[0]?.ms ?? Infinity));
      return { bytes, seconds: Math.max(0, performance.now() - sinceMs) / 1000 };
    },
  };

  function saw(id: string, end: number): void {
    const one = known.get(id) ?? { end: 0, posted: 0, seen: [] };
    known.set(id, one);
    if (end <= one.end) return;
    one.end = end;
    const now = performance.now();
    if (now - (one.seen.at(-1)?.ms ?? 0) > SEEN_EVERY_MS) one.seen.push({ end, ms: now });
    else one.seen.at(-1)!.end = end;
    if (one.seen.length > MAX_SEEN) one.seen = one.seen.filter((_, i) => i % 2 === 0);
  }
}
