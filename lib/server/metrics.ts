/**
 * Figures for Prometheus. Each label has few values, whatever is sent: routes by their pattern,
 * reasons and methods from lists. What each request counts is a number in a Map, which becomes a
 * metric when it is scraped.
 */
import { collectDefaultMetrics, Counter, Gauge, Histogram, Registry } from "prom-client";

import type { InvalidEvent } from "../event/event.ts";
import type { Commit } from "../journal/writer.ts";
import type { LagWatch } from "./lag.ts";
import type { Report } from "../processor/supervisor.ts";

/** Who writes may wait long before trying again: a disk that was full counts as full for so long. */
const BELIEVED_MS = 600_000;
const OTHER = "other";
const METHODS = new Set(["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", OTHER]);
const FIELDS = new Set(["/userId", "/name", "/value", "/id"]);
/** What Bun has no figures for, and names that Prometheus would not give. */
const UNTOLD = /^nodejs_(?!eventloop_lag_seconds)|^process_heap_bytes/;

export interface Metrics {
  answered(method: string, route: string, status: number): void;
  accepted(events: number): void;
  /** The journal did not take what it should. */
  failed(): void;
  rejected(refusal: InvalidEvent): void;
  committed(commit: Commit): void;
  posted(report: Extract<Report, { type: "posted" }>): void;
  scrape(): Promise<{ type: string; text: string }>;
}

export function openMetrics(state: {
  journalBytes(): number;
  /** Whether the journal takes events. */
  isWritable(): boolean;
  lag: LagWatch;
}): Metrics {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: 100 });
  for (const { name } of registry.getMetricsAsArray())
    if (UNTOLD.test(name)) registry.removeSingleMetric(name);

  const requests = new Map<string, { method: string; route: string; status: string; n: number }>();
  const refusals = new Map<string, number>();
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
    help: "Events that were put on the disk and acknowledged.",
    registers,
    collect() {
      this.reset();
      this.inc(accepted);
    },
  });
  new Counter({
    name: "daybook_events_rejected_total",
    help: "Lines refused at the door, by what is wrong with them first.",
    labelNames: ["reason"],
    registers,
    collect() {
      this.reset();
      for (const [reason, n] of refusals) this.inc({ reason }, n);
    },
  });
  const quarantined = new Counter({
    name: "daybook_events_quarantined_total",
    help: "Lines that this process could not post and set aside.",
    registers,
  });
  const duplicates = new Counter({
    name: "daybook_events_duplicate_total",
    help: "Events that this process did not count because they came before.",
    registers,
  });
  const posted = new Counter({
    name: "daybook_events_posted_total",
    help: "Events that this process has posted to the ledger, duplicates among them.",
    registers,
  });
  const users = new Counter({
    name: "daybook_posting_users_total",
    help: "Balances that postings of this process have touched.",
    registers,
  });
  const postingSeconds = new Histogram({
    name: "daybook_posting_duration_seconds",
    help: "How long a transaction that posts took.",
    buckets: [0.005, 0.02, 0.1, 0.5, 2, 10],
    registers,
  });
  const syncSeconds = new Histogram({
    name: "daybook_journal_sync_duration_seconds",
    help: "How long the disk took to sync a frame of the journal.",
    buckets: [0.0001, 0.0005, 0.002, 0.01, 0.05, 0.25, 1],
    registers,
  });
  const frameBytes = new Histogram({
    name: "daybook_journal_frame_bytes",
    help: "Bytes that one sync of the journal put on the disk.",
    buckets: [256, 4_096, 65_536, 1_048_576, 16_777_216],
    registers,
  });
  const frameAppends = new Histogram({
    name: "daybook_journal_frame_requests",
    help: "Requests that shared one sync of the journal.",
    buckets: [1, 4, 16, 64, 256],
    registers,
  });
  gauge("daybook_journal_bytes", "Bytes ever written to the journal.", state.journalBytes);
  gauge(
    "daybook_journal_writable",
    "0 once an event could not be put on the disk, until one is or nobody has tried for long.",
    () => Number(state.isWritable() && performance.now() - failedMs > BELIEVED_MS),
  );
  gauge("daybook_database_up", "1 when the database answered last, 0 when not.", () =>
    Number(state.lag.isAnswered()),
  );
  gauge(
    "daybook_posting_lag_bytes",
    "Bytes of the journal that are not posted.",
    () => state.lag.now().bytes,
  );
  gauge(
    "daybook_posting_lag_seconds",
    "Age of the oldest event that is not posted.",
    () => state.lag.now().seconds,
  );

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
      // Below or beside an event's own fields a path is a sender's or a schema's word.
      const reason = path === "" ? kind : FIELDS.has(path) ? path.slice(1) : "schema";
      refusals.set(reason, (refusals.get(reason) ?? 0) + 1);
    },
    committed({ syncMs, bytes, appends }) {
      failedMs = Number.NEGATIVE_INFINITY;
      syncSeconds.observe(syncMs / 1000);
      frameBytes.observe(bytes);
      frameAppends.observe(appends);
    },
    posted(report) {
      posted.inc(report.events);
      quarantined.inc(report.quarantined);
      duplicates.inc(report.duplicates);
      users.inc(report.users);
      postingSeconds.observe(report.ms / 1000);
    },
    async scrape() {
      state.lag.look().catch(() => {}); // for the next one: no scrape waits for the database
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
