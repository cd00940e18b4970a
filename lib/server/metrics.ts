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

/** A batch that this process has posted; its transaction took `ms`. */
interface Posting {
  events: number;
  quarantined: number;
  duplicates: number;
  users: number;
  ms: number;
}

export interface Metrics {
  answered(method: string, route: string, status: number): void;
  accepted(events: number): void;
  /** The journal could not store an event. */
  failed(): void;
  rejected(invalid: InvalidEvent): void;
  posted(posting: Posting): void;
  scrape(): Promise<{ type: string; text: string }>;
}

/** Metrics of a server with this journal. They hear of each of its commits. */
export function openMetrics(journal: Journal, posted: PostedWatch): Metrics {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: 100 });
  for (const { name } of registry.getMetricsAsArray())
    if (OMITTED.test(name)) registry.removeSingleMetric(name);

  const requests = new Map<string, { method: string; route: string; status: string; n: number }>();
  const rejections = new Map<string, number>();
  let accepted = 0;
  let failedMs = Number.NEGATIVE_INFINITY;

  new Counter({
    name: "daybook_http_requests_total",
    help: "Requests answered, by route and status.",
    labelNames: ["method", "route", "status"],
    registers,
    collect() {
      this.reset();
      for (const { n, ...labels } of requests.values()) this.inc(labels, n);
    },
  });
  new Counter({
    name: "daybook_events_accepted_total",
    help: "Events synced to disk and acknowledged.",
    registers,
    collect() {
      this.reset();
      this.inc(accepted);
    },
  });
  new Counter({
    name: "daybook_events_rejected_total",
    help: "Lines rejected, by the first thing that is wrong with them.",
    labelNames: ["reason"],
    registers,
    collect() {
      this.reset();
      for (const [reason, n] of rejections) this.inc({ reason }, n);
    },
  });
  const quarantined = new Counter({
    name: "daybook_events_quarantined_total",
    help: "Lines that this process quarantined while posting.",
    registers,
  });
  const duplicates = new Counter({
    name: "daybook_events_duplicate_total",
    help: "Events that this process did not count, because they had been posted before.",
    registers,
  });
  const postedEvents = new Counter({
    name: "daybook_events_posted_total",
    help: "Events that this process posted to the ledger, duplicates included.",
    registers,
  });
  const users = new Counter({
    name: "daybook_posting_users_total",
    help: "Balances that postings of this process changed.",
    registers,
  });
  const postingSeconds = new Histogram({
    name: "daybook_posting_duration_seconds",
    help: "Duration of a posting transaction.",
    buckets: [0.005, 0.02, 0.1, 0.5, 2, 10],
    registers,
  });
  const syncSeconds = new Histogram({
    name: "daybook_journal_sync_duration_seconds",
    help: "Duration of the sync of a journal frame.",
    buckets: [0.0001, 0.0005, 0.002, 0.01, 0.05, 0.25, 1],
    registers,
  });
  const frameBytes = new Histogram({
    name: "daybook_journal_frame_bytes",
    help: "Bytes of a journal frame, written and synced together.",
    buckets: [256, 4_096, 65_536, 1_048_576, 16_777_216],
    registers,
  });
  const frameAppends = new Histogram({
    name: "daybook_journal_frame_requests",
    help: "Requests that shared one sync of the journal.",
    buckets: [1, 4, 16, 64, 256],
    registers,
  });
  gauge("daybook_journal_bytes", "Bytes ever written to the journal.", journal.end);
  gauge(
    "daybook_journal_writable",
    "0 after an event could not be stored, until one is, or 10 minutes passed.",
    () => Number(journal.trouble() === null && performance.now() - failedMs > NOT_WRITABLE_MS),
  );
  gauge("daybook_database_up", "1 if the database answered the last query, else 0.", () =>
    Number(posted.isAnswering()),
  );
  gauge(
    "daybook_posting_lag_bytes",
    "Bytes of the journal that are not posted.",
    () => posted.lag().bytes,
  );
  gauge(
    "daybook_posting_lag_seconds",
    "Age of the oldest event that is not posted.",
    () => posted.lag().seconds,
  );

  journal.onCommit(({ syncMs, bytes, appends }) => {
    failedMs = Number.NEGATIVE_INFINITY;
    syncSeconds.observe(syncMs / 1000);
    frameBytes.observe(bytes);
    frameAppends.observe(appends);
  });

  return {
    answered(method, route, status) {
      const key = `${method} ${route} ${status}`;
      const known = requests.get(key);
      if (known) known.n++;
      else if (METHODS.has(method)) requests.set(key, { method, route, status: `${status}`, n: 1 });
      else this.answered(OTHER, route, status);
    },
    accepted(events) {
      accepted += events;
    },
    failed() {
      failedMs = performance.now();
    },
    rejected({ kind, faults }) {
      const path = faults[0]?.path ?? "";
      // Any other path holds a sender's or a schema's words.
      const reason = path === "" ? kind : FIELDS.has(path) ? path.slice(1) : "schema";
      rejections.set(reason, (rejections.get(reason) ?? 0) + 1);
    },
    posted(posting) {
      postedEvents.inc(posting.events);
      quarantined.inc(posting.quarantined);
      duplicates.inc(posting.duplicates);
      users.inc(posting.users);
      postingSeconds.observe(posting.ms / 1000);
    },
    async scrape() {
      posted.refresh().catch(() => {}); // for the next one: no scrape waits for the database
      return { type: registry.contentType, text: await registry.metrics() };
    },
  };

  function gauge(name: string, help: string, read: () => number): void {
    new Gauge({
      name,
      help,
      registers,
      collect() {
        this.set(read());
      },
    });
  }
}
