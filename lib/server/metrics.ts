/**
 * The server's metrics: routes by their pattern, methods and reasons from lists. No scrape waits for the
 * database.
 */
import type { SettingsOf } from "../config.ts";
import type { InvalidEvent } from "../event/event.ts";
import { diskSpace } from "../journal/disk.ts";
import type { Journal } from "../journal/writer.ts";
import type { Database } from "../ledger/database.ts";
import { countQuarantine } from "../ledger/quarantine.ts";
import { countPostings, openMeters } from "../metrics.ts";
import type { PostedWatch } from "./posted.ts";

/** After a failure the journal counts as not writable for this long: senders may retry only seldom. */
const NOT_WRITABLE_MS = 600_000;
/** The lines in quarantine are counted at most this often, and no more of them. */
const QUARANTINE_EVERY_MS = 10_000;
const MAX_QUARANTINED = 100_000;
const OTHER = "other";
const METHODS = new Set(["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE", "OPTIONS", OTHER]);
const FIELDS = new Set(["/userId", "/name", "/value", "/id"]);
/** The upper bounds of buckets. */
const REQUEST_SECONDS = [0.005, 0.025, 0.1, 0.5, 2.5, 10];
const SYNC_SECONDS = [0.0001, 0.0005, 0.002, 0.01, 0.05, 0.25, 1];
const FRAME_BYTES = [256, 4_096, 65_536, 1_048_576, 16_777_216];
const FRAME_REQUESTS = [1, 4, 16, 64, 256];

export type Metrics = ReturnType<typeof openMetrics>;

interface Parts {
  journal: Journal;
  database: Database;
  posted: PostedWatch;
  settings: Pick<SettingsOf<"app">, "DATA_DIR" | "JOURNAL_URL">;
}

/** Metrics of a server with this journal. They hear of each of its commits. */
export function openMetrics({ journal, database, posted, settings }: Parts) {
  const meters = openMeters();
  const { counter, counted, gauge, histogram, timed } = meters;
  const accepted = counter("events_accepted", "Events synced to disk and acknowledged.");
  const rejected = counted("events_rejected", "Lines rejected, by their first fault.", ["reason"]);
  const labels = ["method", "route", "status"];
  const requests = counted("http_requests", "Requests answered, by route and status.", labels);
  const took = "Time until an answer begins, by route.";
  const requestSeconds = timed("http_request_duration_seconds", took, "route", REQUEST_SECONDS);
  const sync = "Duration of a journal sync.";
  const syncSeconds = histogram("journal_sync_duration_seconds", sync, SYNC_SECONDS);
  const bytes = "Bytes written by a journal sync.";
  const frameBytes = histogram("journal_frame_bytes", bytes, FRAME_BYTES);
  const shared = "Requests that shared a journal sync.";
  const frameAppends = histogram("journal_frame_requests", shared, FRAME_REQUESTS);
  /** The same numbers for `GET /live`. */
  const totals = { accepted: 0, rejected: {} as Record<string, number> };
  let failedMs = Number.NEGATIVE_INFINITY;
  let quarantined: number | null = null;
  let countedMs = Number.NEGATIVE_INFINITY;
  const isWritable = () =>
    journal.trouble() === null && performance.now() - failedMs > NOT_WRITABLE_MS;
  const { lag, isAnswering, paused } = posted;
  const isPaused = () => paused() !== null;
  const { DATA_DIR, JOURNAL_URL } = settings;
  gauge("journal_bytes", "Bytes ever written to the journal.", journal.end);
  gauge("journal_writable", "0 for 10 minutes after an event could not be stored.", isWritable);
  if (!JOURNAL_URL)
    gauge("disk_free_bytes", "Free space on the disk of DATA_DIR.", () => diskSpace(DATA_DIR).free);
  gauge("database_up", "1 if the database answered the last query, else 0.", isAnswering);
  gauge("posting_paused", "1 while posting waits for a person; the log says why.", isPaused);
  gauge("posting_lag_bytes", "Bytes of the journal that are not posted.", () => lag().bytes);
  gauge("posting_lag_seconds", "Age of the oldest event that is not posted.", () => lag().seconds);
  gauge("quarantine_lines", "Lines in quarantine now, up to 100,000.", () => quarantined);

  journal.onCommit(({ syncMs, bytes, appends }) => {
    failedMs = Number.NEGATIVE_INFINITY;
    syncSeconds.observe(syncMs / 1000);
    frameBytes.observe(bytes);
    frameAppends.observe(appends);
  });

  return {
    gauge,
    answered(method: string, route: string, status: number, seconds: number) {
      requests(1, METHODS.has(method) ? method : OTHER, route, `${status}`);
      requestSeconds(route, seconds);
    },
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
      rejected(1, reason);
    },
    posted: countPostings(meters),
    contentType: meters.contentType,
    scrape(): Promise<string> {
      posted.refresh().catch(() => {}); // for the next one
      void recountQuarantine();
      return meters.scrape();
    },
  };

  async function recountQuarantine(): Promise<void> {
    if (performance.now() - countedMs < QUARANTINE_EVERY_MS) return;
    countedMs = performance.now();
    quarantined = await countQuarantine(database, MAX_QUARANTINED).catch(() => null);
  }
}
