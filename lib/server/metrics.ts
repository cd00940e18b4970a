/**
 * Metrics for Prometheus. Every label has few values, whatever is sent: routes by their pattern,
 * reasons and methods from lists. Requests are counted in a Map, which becomes a metric when it is
 * scraped.
 */
import { collectDefaultMetrics, Counter, Gauge, Histogram, Registry } from "prom-client";

import type { InvalidEvent } from "../event/event.ts";
import type { Journal } from "../journal/writer.ts";
import type { PostedWatch } from "./posted.ts";

/** After a failure the journal counts as not writable for so long: senders may retry only seldom. */
const NOT_WRITABLE_MS = 600_000;
const OTHER = "other";
const METHODS = new Set(["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", OTHER]);
const FIELDS = new Set(["/userId", "/name", "/value", "/id"]);
/** Default metrics that Bun has no values for, or that break Prometheus' naming rules. */
const OMITTED = /^nodejs_(?!eventloop_lag_seconds)|^process_heap_bytes/;

/** The upper bounds of the buckets of each histogram. */
const BUCKETS = {
  posting_duration_seconds: [0.005, 0.02, 0.1, 0.5, 2, 10],
  journal_sync_duration_seconds: [0.0001, 0.0005, 0.002, 0.01, 0.05, 0.25, 1],
  journal_frame_bytes: [256, 4_096, 65_536, 1_048_576, 16_777_216],
  journal_frame_requests: [1, 4, 16, 64, 256],
};

/** A batch that this process has posted; its transaction took `ms`. */
type Posting = Record<"events" | "duplicates" | "users" | "ms", number> & {
  /** By reason. */
  quarantined: Record<string, number>;
};

export type Metrics = ReturnType<typeof openMetrics>;

/** Metrics of a server with this journal. They hear of each of its commits. */
export function openMetrics(journal: Journal, posted: PostedWatch) {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: 100 });
  for (const { name } of registry.getMetricsAsArray())
    if (OMITTED.test(name)) registry.removeSingleMetric(name);

  const counter = (name: string, help: string) =>
    new Counter({ name: `daybook_${name}_total`, help, registers });
  const histogram = (name: keyof typeof BUCKETS, help: string) =>
    new Histogram({ name: `daybook_${name}`, help, buckets: BUCKETS[name], registers });

  const accepted = counter("events_accepted", "Events synced to disk and acknowledged.");
  const quarantined = new Counter({
    name: "daybook_events_quarantined_total",
    help: "Lines quarantined by this process, by reason.",
    labelNames: ["reason"],
    registers,
  });
  for (const reason of ["invalid", "refused", "conflict"]) quarantined.inc({ reason }, 0);
  const duplicates = counter("events_duplicate", "Events not counted: they came before.");
  const postedEvents = counter("events_posted", "Events posted by this process.");
  const users = counter("posting_users", "Balances changed by postings of this process.");
  const postingSeconds = histogram("posting_duration_seconds", "Duration of a posting.");
  const syncSeconds = histogram("journal_sync_duration_seconds", "Duration of a journal sync.");
  const frameBytes = histogram("journal_frame_bytes", "Bytes written by a journal sync.");
  const frameAppends = histogram("journal_frame_requests", "Requests that shared a journal sync.");
  const rejected = counted("events_rejected", "Lines rejected, by their first fault.", ["reason"]);
  const labels = ["method", "route", "status"];
  const requests = counted("http_requests", "Requests answered, by route and status.", labels);
  /** The same numbers for `GET /live`. */
  const totals = { accepted: 0, rejected: {} as Record<string, number> };
  let failedMs = Number.NEGATIVE_INFINITY;
  const isWritable = () =>
    journal.trouble() === null && performance.now() - failedMs > NOT_WRITABLE_MS;
  const { lag, isAnswering, paused } = posted;
  const isPaused = () => paused() !== null;
  gauge("journal_bytes", "Bytes ever written to the journal.", journal.end);
  gauge("journal_writable", "0 for 10 minutes after an event could not be stored.", isWritable);
  gauge("database_up", "1 if the database answered the last query, else 0.", isAnswering);
  gauge("posting_paused", "1 while posting waits for a person; the log says why.", isPaused);
  gauge("posting_lag_bytes", "Bytes of the journal that are not posted.", () => lag().bytes);
  gauge("posting_lag_seconds", "Age of the oldest event that is not posted.", () => lag().seconds);

  journal.onCommit(({ syncMs, bytes, appends }) => {
    failedMs = Number.NEGATIVE_INFINITY;
    syncSeconds.observe(syncMs / 1000);
    frameBytes.observe(bytes);
    frameAppends.observe(appends);
  });

  return {
    answered: (method: string, route: string, status: number) =>
      requests(METHODS.has(method) ? method : OTHER, route, `${status}`),
    accepted(events: number) {
      totals.accepted += events;
      accepted.inc(events);
    },
    /** What this process has accepted, and rejected by reason. */
    totals: () => structuredClone(totals),
    /** The journal could not store an event. */
    failed() {
      failedMs = performance.now();
    },
    rejected({ kind, faults }: InvalidEvent) {
      const path = faults[0]?.path ?? "";
      // Any other path holds a sender's or a schema's words.
      const reason = path === "" ? kind : FIELDS.has(path) ? path.slice(1) : "schema";
      totals.rejected[reason] = (totals.rejected[reason] ?? 0) + 1;
      rejected(reason);
    },
    posted(posting: Posting) {
      postedEvents.inc(posting.events);
      for (const [reason, lines] of Object.entries(posting.quarantined))
        quarantined.inc({ reason }, lines);
      duplicates.inc(posting.duplicates);
      users.inc(posting.users);
      postingSeconds.observe(posting.ms / 1000);
    },
    contentType: registry.contentType,
    scrape(): Promise<string> {
      posted.refresh().catch(() => {}); // for the next one: no scrape waits for the database
      return registry.metrics();
    },
  };

  function gauge(name: string, help: string, read: () => number | boolean): void {
    const collect = function (this: Gauge) {
      this.set(Number(read()));
    };
    new Gauge({ name: `daybook_${name}`, help, registers, collect });
  }

  /** A counter with labels that costs a request no more than a number in a Map. */
  function counted(name: string, help: string, labelNames: string[]) {
    const counts = new Map<string, number>();
    new Counter({
      name: `daybook_${name}_total`,
      help,
      labelNames,
      registers,
      collect() {
        this.reset();
        for (const [key, count] of counts) this.labels(...key.split(" ")).inc(count);
      },
    });
    return (...labels: string[]) => {
      const key = labels.join(" ");
      counts.set(key, (counts.get(key) ?? 0) + 1);
    };
  }
}
