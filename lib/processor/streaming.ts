/**
 * Posts the journals of a stream, those of all servers. Any number of processors may do so, on any machines,
 * without a lock: the checkpoint of a journal decides which batch is posted. To waste little, a processor
 * posts the journal of its own server, and any other whose checkpoint has stood still for 2 s, and is not
 * locked, although it holds frames; it leaves a journal alone once another processor has moved its checkpoint. A journal without
 * new frames costs nothing.
 */
import {
  findKept,
  journalName,
  openStreamReader,
  streamJournals,
  watchStream,
} from "../journal/stream-reader.ts";
import { openStream, type Stream } from "../journal/stream.ts";
import { JournalDamage, JournalUnavailable } from "../journal/format.ts";
import { journalKey, listLocked, readCheckpoints } from "../ledger/checkpoints.ts";
import { type Database, openDatabase } from "../ledger/database.ts";
import { ledgerUrl } from "../postgres/cluster.ts";
import { reportLag } from "./lag.ts";
import { type Context, followJournal, openUpkeep } from "./posting.ts";
import type { Job, Report } from "./supervisor.ts";

type Waiting = Extract<Report, { type: "waiting" }>;

const STILL_MS = 2_000;
/** The checkpoints of journals that others post are looked at so often, while they hold frames. */
const LOOK_MS = 500;
const RETRY_MS = 500;

/** Posts all journals of the stream until it is stopped. Throws InvalidSetting. */
export async function followStream(job: Job, context: Context): Promise<void> {
  const { stop, report } = context;
  const stream = await openPatiently(job, context);
  if (!stream) return;
  if (job.own === undefined) report({ type: "say", line: `following ${stream.name}` });
  const upkeep = openUpkeep(context, job.settings.ID_DAYS);
  const isStill = watchStanding(stream, context.database);
  const news = watchStream(stream);
  stop.addEventListener("abort", news.close);
  /** The journals that this processor posts. */
  const held = new Map<string, { wake(): void; ended: Promise<void> }>();
  /** Those that others post, or nobody. */
  const watched = new Set<string>();
  const waits = new Map<string, Waiting>();
  const purging = purgeOld(job, stream, context);
  const lag = job.isMonitored ? reportLag(streamJournals(stream), context) : null;
  let trouble = "";
  let said = "";
  while (!stop.aborted) {
    try {
      for (const id of await news.next()) {
        held.get(id)?.wake();
        if (!held.has(id)) watched.add(id);
      }
      if (job.own !== undefined && watched.has(job.own)) hold(job.own);
      for (const { id, isPosted } of await isStill(watched)) {
        if (isPosted) watched.delete(id);
        else hold(id);
      }
      if (trouble) pass("", { type: "waiting", why: null, isPaused: false });
      trouble = "";
    } catch (error) {
      const { message } = error as Error;
      if (message !== trouble) {
        report({ type: "say", level: "warn", line: `processor: waiting; ${message}` });
        pass("", { type: "waiting", why: message, isPaused: false });
      }
      trouble = message;
      await Bun.sleep(RETRY_MS);
    }
  }
  for (const { wake } of held.values()) wake();
  await Promise.all([purging, lag, ...[...held.values()].map(({ ended }) => ended)]);
  await stream.close();

  function hold(id: string): void {
    watched.delete(id);
    /** For the reader, and for a posting that waits at the end. */
    let news = { read: true, next: true };
    let wake = () => {};
    const take = (who: keyof typeof news) => {
      const hadNews = news[who];
      news[who] = false;
      return hadNews;
    };
    const followed = {
      path: journalName(stream as Stream, id),
      open: () => openStreamReader(stream as Stream, id, () => take("read")),
      async next() {
        if (take("next") || stop.aborted) return;
        await new Promise<void>((resolve) => (wake = resolve));
        take("next");
      },
      upkeep,
      isShared: true,
    };
    const mine = { ...context, report: (each: Report) => pass(id, each) };
    const ended = followJournal(followed, mine).then(() => {
      held.delete(id);
      waits.delete(id);
      watched.add(id);
    });
    const woken = () => {
      news = { read: true, next: true };
      wake();
    };
    held.set(id, { ended, wake: woken });
  }

  /** Posting waits as long as any journal cannot be posted. */
  function pass(id: string, each: Report): void {
    if (each.type === "say" && each.line === said) return; // of another journal
    if (each.type === "say") said = each.line;
    if (each.type !== "waiting") return report(each);
    if (each.why === null) waits.delete(id);
    else waits.set(id, each);
    const all = [...waits.values()];
    report(all.find(({ isPaused }) => isPaused) ?? all[0] ?? each);
  }
}

/** Runs beside the posting, with a connection of its own. */
async function purgeOld({ settings }: Job, stream: Stream, { stop, report }: Context) {
  const { JOURNAL_KEEP_DAYS: keepDays } = settings;
  if (keepDays === undefined) return;
  const { openPurging, retain } = await import("./retention.ts");
  const database = openDatabase(ledgerUrl(settings), "processor", 1);
  const purged = {
    ids: async () => (await stream.list()).counts.keys(),
    open: (id: string) => openStreamReader(stream, id),
    kept: (id: string, position: number) => findKept(stream, id, position),
    purge: stream.purge,
  };
  const say = (line: string) => report({ type: "say", line: `processor: ${line}` });
  await retain(openPurging({ database, stream: purged, keepDays }), { keepDays, stop, say });
  await database.close();
}

/** Waits for the stream for as long as it takes; `null` if it is stopped before. */
async function openPatiently({ settings, own }: Job, { stop, report }: Context) {
  const say = (line: string) => report({ type: "say", line });
  while (!stop.aborted)
    try {
      // The server beside it has said the same.
      return await openStream(settings.JOURNAL_URL as string, own === undefined ? say : undefined);
    } catch (error) {
      if (!(error instanceof JournalUnavailable)) throw error;
      say(`processor: waiting; ${error.message}`);
    }
  return null;
}

/**
 * Returns a function that returns those of the journals whose checkpoint has stood still and is not locked, and
 * whether they are posted to their end. Throws Unavailable and JournalUnavailable.
 */
function watchStanding(stream: Stream, database: Database) {
  const standing = new Map<string, { position: number; sinceMs: number }>();
  let lookMs = Number.NEGATIVE_INFINITY;
  return async (ids: ReadonlySet<string>): Promise<{ id: string; isPosted: boolean }[]> => {
    for (const id of standing.keys()) if (!ids.has(id)) standing.delete(id);
    if (ids.size === 0 || performance.now() - lookMs < LOOK_MS) return [];
    lookMs = performance.now();
    const rows = await readCheckpoints(database, Array.from(ids, journalKey));
    const positions = new Map(rows.map(({ key, position }) => [key, position]));
    const still: string[] = [];
    for (const id of ids) {
      const position = positions.get(journalKey(id)) ?? 0;
      const before = standing.get(id);
      if (before?.position !== position) standing.set(id, { position, sinceMs: lookMs });
      else if (lookMs - before.sinceMs >= STILL_MS) still.push(id);
    }
    if (still.length === 0) return [];
    // A batch of 200,000 users may take longer than that, and folding it for nothing takes as long again.
    const locked = new Set(await listLocked(database, still.map(journalKey)));
    const free = still.filter((id) => !locked.has(journalKey(id)));
    const found = free.map(async (id) => {
      const position = positions.get(journalKey(id)) ?? 0;
      return { id, isPosted: position >= (await endOf(stream, id)) };
    });
    return Promise.all(found);
  };
}

/** A damaged journal does not count as posted: the posting of it says what is wrong. */
async function endOf(stream: Stream, id: string): Promise<number> {
  try {
    return (await (await openStreamReader(stream, id))?.end()) ?? 0;
  } catch (error) {
    if (error instanceof JournalDamage) return Number.POSITIVE_INFINITY;
    throw error;
  }
}
