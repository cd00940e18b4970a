/**
 * `GET /live`: what happens, once a second, as Server-Sent Events. Each second's figures are computed and
 * encoded once for all viewers, and kept for ten minutes, which a new viewer gets first.
 *
 * What is accepted and rejected is this server's. What is posted is the ledger's, whichever processes post.
 */
import type { Journal } from "../journal/writer.ts";
import type { Database } from "../ledger/database.ts";
import { type PostedTotal, readPostedTotal } from "../ledger/points.ts";
import { countQuarantine } from "../ledger/quarantine.ts";
import type { Metrics } from "./metrics.ts";
import type { PostedWatch } from "./posted.ts";
import { unavailable } from "./problem.ts";

const KEPT_SECONDS = 600;
const SECOND_MS = 1_000;
const MAX_VIEWERS = 1_000;
/** A viewer with this many bytes waiting is dropped. What is kept takes 25 kB of them. */
const MAX_WAITING_BYTES = 65_536;
/** Then a viewer must connect again, with a credential that is still valid. */
const MAX_VIEW_MS = 3_600_000;
/** The syncs of one second of which percentiles are computed. */
const MAX_SYNCS = 4_096;
/** A ledger that follows at once lags by less. */
const LAGGING_S = 5;
/** A second does not wait longer than this for the ledger. */
const READ_MS = 500;
/** The ledger's totals are read at most a quarter of the time: of a large table the sum takes a while. */
const READ_SHARE = 0.25;
/** More lines in quarantine are counted as this many. */
const MAX_QUARANTINED = 10_000;

/** The figures of one second; `null` where one is not known. */
export interface Second {
  /** Seconds since 1970. */
  at: number;
  accepted: number;
  posted: number | null;
  /** By reason. */
  rejected: Record<string, number>;
  lag: number;
  syncP50: number | null;
  syncP99: number | null;
}

/** One message: some seconds, by column, and how things are now. A second may come again, corrected. */
export interface Message {
  seconds: Record<Exclude<keyof Second, "rejected">, (number | null)[]> & {
    /** By reason, only those of these seconds. */
    rejected: Record<string, number[]>;
  };
  /** `sentence` is for people. */
  health: { isHealthy: boolean; sentence: string };
  /** Since this server started. */
  accepted: number;
  rejected: Record<string, number>;
  startedAt: string;
  /** Of the ledger. `postedSince` is not null where it is older than its points. */
  posted: number | null;
  postedSince: string | null;
  quarantined: number | null;
}

export type Live = ReturnType<typeof openLive>;

interface Parts {
  journal: Journal;
  database: Database;
  posted: PostedWatch;
  metrics: Metrics;
}

export function openLive({ journal, database, posted, metrics }: Parts) {
  /** Until when each may look. */
  const viewers = new Map<ReadableStreamDefaultController<Uint8Array>, number>();
  const seconds: Second[] = [];
  const ledger = watchLedger(database);
  const startedAt = new Date().toISOString();
  let totals = metrics.totals();
  let syncs: number[] = [];
  let lastMs = performance.now();
  /** The end of the journal up to which the ledger's total is known to hold what is posted of it. */
  let settledEnd = -1;
  let isTicking = false;
  journal.onCommit(({ syncMs }) => {
    if (syncs.length < MAX_SYNCS) syncs.push(syncMs);
  });
  void ledger.read(null); // the total that the first second begins with
  const timer = setInterval(() => void tick(), SECOND_MS);

  return {
    /** The stream of a viewer. Throws a Problem when too many look. */
    async view({ method }: Request): Promise<Response> {
      const headers = { "content-type": "text/event-stream" };
      if (method === "HEAD") return new Response(null, { headers });
      if (viewers.size >= MAX_VIEWERS) throw unavailable("too many watch; retry later");
      await ledger.read(null); // fills what nobody has asked for until now
      let own: ReadableStreamDefaultController<Uint8Array>;
      const source: UnderlyingDefaultSource<Uint8Array> = {
        start(controller) {
          own = controller;
          viewers.set(controller, performance.now() + MAX_VIEW_MS);
          controller.enqueue(encode(seconds));
        },
        cancel: () => void viewers.delete(own),
      };
      const limit = new ByteLengthQueuingStrategy({ highWaterMark: MAX_WAITING_BYTES });
      return new Response(new ReadableStream(source, limit), { headers });
    },
    tick,
    viewers: () => viewers.size,
    /** Ends all streams. */
    close() {
      clearInterval(timer);
      for (const viewer of viewers.keys()) end(viewer);
    },
  };

  async function tick() {
    if (isTicking) return; // a busy process may be late
    isTicking = true;
    const second = measure();
    const end = journal.end();
    const isPosted = posted.lag().bytes === 0;
    const isNeeded = viewers.size > 0 || !isPosted || settledEnd !== end;
    if (!isNeeded) ledger.skip(second);
    else if ((await ledger.read(second)) && isPosted) settledEnd = end;
    seconds.push(second);
    if (seconds.length > KEPT_SECONDS) seconds.shift();
    if (viewers.size > 0) send(encode(ledger.changed(second)));
    isTicking = false;
  }

  /** What happened since the last second, as rates. */
  function measure(): Second {
    const nowMs = performance.now();
    const passed = Math.max(1, Math.round((nowMs - lastMs) / SECOND_MS));
    lastMs = nowMs;
    const previous = totals;
    totals = metrics.totals();
    const rate = (now: number, before = 0) => round((now - before) / passed);
    const rejected = Object.entries(totals.rejected)
      .map(([reason, count]) => [reason, rate(count, previous.rejected[reason])] as const)
      .filter(([, count]) => count > 0);
    const sorted = Float64Array.from(syncs).sort();
    syncs = [];
    return {
      at: Math.max((seconds.at(-1)?.at ?? 0) + 1, Math.floor(Date.now() / SECOND_MS)),
      accepted: rate(totals.accepted, previous.accepted),
      posted: null,
      rejected: Object.fromEntries(rejected),
      lag: round(posted.lag().seconds),
      syncP50: percentile(sorted, 0.5),
      syncP99: percentile(sorted, 0.99),
    };
  }

  function encode(some: readonly Second[]): Uint8Array {
    const { total, quarantined } = ledger.known();
    const message: Message = {
      seconds: columns(some),
      health: health(),
      ...totals,
      startedAt,
      posted: total?.events ?? null,
      postedSince: total?.since ?? null,
      quarantined,
    };
    return Buffer.from(`data: ${JSON.stringify(message)}\n\n`);
  }

  function health(): Message["health"] {
    const ill = (sentence: string) => ({ isHealthy: false, sentence });
    const trouble = journal.trouble();
    if (trouble !== null) return ill(`Rejects events because ${trouble}.`);
    const since = ledger.silentSince();
    if (since) return ill(`The database has not answered since ${formatTime(since)}.`);
    const paused = posted.paused();
    if (paused !== null) return ill(`Posting is paused because ${paused}.`);
    const lag = Math.round(posted.lag().seconds);
    if (lag >= LAGGING_S) return ill(`Posting lags by ${lag} s.`);
    return { isHealthy: true, sentence: "Healthy." };
  }

  function send(message: Uint8Array) {
    const nowMs = performance.now();
    for (const [viewer, untilMs] of viewers) {
      if (nowMs > untilMs) end(viewer);
      else if ((viewer.desiredSize ?? 0) > 0) viewer.enqueue(message);
      else {
        viewers.delete(viewer);
        viewer.error(new Error("the viewer reads too slowly"));
      }
    }
  }

  function end(viewer: ReadableStreamDefaultController<Uint8Array>) {
    viewers.delete(viewer);
    viewer.close();
  }
}

/**
 * What the ledger has posted and quarantined. Seconds in which nobody asked share what was posted meanwhile,
 * without what the second of the next answer has accepted.
 */
function watchLedger(database: Database) {
  let total: PostedTotal | null = null;
  let quarantined: number | null = null;
  /** The part of the total that seconds have shared. */
  let shared: number | null = null;
  let skipped: Second[] = [];
  let changed: Second[] = [];
  let answeredAt = new Date();
  let isAnswering = true;
  let dueMs = 0;
  let reading: Promise<boolean> | null = null;

  return {
    known: () => ({ total, quarantined }),
    /** When the database answered the last time; `null` if it answers. */
    silentSince: () => (isAnswering ? null : answeredAt),
    /** Nobody asks in this second. */
    skip,
    /** The seconds that the last answer has changed, and `second`. */
    changed: (second: Second) => (changed.includes(second) ? changed : [second]),
    /** Asks. Notes what was posted in `second`, and returns `true`, if there is an answer in time. */
    async read(second: Second | null): Promise<boolean> {
      if (performance.now() < dueMs) {
        if (second) skip(second);
        return false;
      }
      const asking = (reading ??= ask().finally(() => (reading = null)));
      const isThere = await Promise.race([asking, Bun.sleep(READ_MS).then(() => false)]);
      if (isThere) share(second);
      return isThere;
    },
  };

  function skip(second: Second) {
    skipped.push(second);
    if (skipped.length > KEPT_SECONDS) skipped.shift();
  }

  async function ask(): Promise<boolean> {
    const fromMs = performance.now();
    try {
      const read = await Promise.all([
        readPostedTotal(database),
        countQuarantine(database, MAX_QUARANTINED),
      ]);
      [total, quarantined] = read;
      answeredAt = new Date();
      isAnswering = true;
    } catch {
      isAnswering = false;
      skipped = []; // what was posted before the outage, and what after, is not known
    }
    const tookMs = performance.now() - fromMs;
    if (tookMs > SECOND_MS * READ_SHARE) dueMs = performance.now() + tookMs * (1 / READ_SHARE - 1);
    return isAnswering;
  }

  function share(second: Second | null) {
    const events = total?.events ?? 0;
    const all = second ? [...skipped, second] : skipped;
    if (shared !== null && all.length === 0) return; // the next second gets it
    const posted = Math.max(0, events - (shared ?? events)); // a rebuild may take some away
    const own = second ? Math.min(posted, second.accepted) : 0;
    for (const each of all) each.posted = round((posted - own) / all.length);
    if (second) second.posted = round((second.posted ?? 0) + own);
    shared = events;
    skipped = [];
    changed = all;
  }
}

function columns(some: readonly Second[]): Message["seconds"] {
  const of = (name: Exclude<keyof Second, "rejected">) => some.map((second) => second[name]);
  const reasons = new Set(some.flatMap(({ rejected }) => Object.keys(rejected)));
  const rejected = Array.from(reasons, (reason) => [
    reason,
    some.map((second) => second.rejected[reason] ?? 0),
  ]);
  return {
    at: of("at"),
    accepted: of("accepted"),
    posted: of("posted"),
    lag: of("lag"),
    syncP50: of("syncP50"),
    syncP99: of("syncP99"),
    rejected: Object.fromEntries(rejected),
  };
}

/** Of sorted values; `null` if there are none. */
function percentile(sorted: Float64Array, part: number): number | null {
  const value = sorted[Math.ceil(sorted.length * part) - 1];
  return value === undefined ? null : round(value);
}

/** To two decimals: what is kept is sent to each viewer. */
function round(value: number): number {
  return Math.round(value * 100) / 100;
}

/** `2026-11-26 16:20:11 UTC` */
function formatTime(time: Date): string {
  return `${time.toISOString().slice(0, 19).replace("T", " ")} UTC`;
}
