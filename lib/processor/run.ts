/** A run of the processor as a command sees it: its signals, progress, summary and exit code. */
import { basename } from "node:path";

import type { SettingsOf } from "../config.ts";
import { counted, percent, print, type Progress, showProgress, STOPPED } from "../progress.ts";
import { acquireProcessorLock, type Job, QUARANTINE_REASONS, supervise } from "./supervisor.ts";

/** Tells the person who waits, or the log. */
export type Tell = (line: string, level?: "info" | "warn" | "error") => void;

/**
 * Runs the job in its Worker until `stop`, whose reason is the signal; shows its progress, and returns the
 * exit code.
 */
export async function runJob(
  job: Job & { settings: SettingsOf<"processor"> },
  stop: AbortSignal,
  tell: Tell,
): Promise<number> {
  const { DATA_DIR: dataDir, METRICS_PORT, JOURNAL_URL } = job.settings;
  const isFollowing = job.files.length === 0;
  await using monitor =
    isFollowing && METRICS_PORT !== undefined
      ? (await import("./monitor.ts")).openMonitor(job.settings)
      : null;
  if (monitor) tell(`metrics on ${monitor.url}/metrics`);
  // Any number follows a stream.
  if (isFollowing && !JOURNAL_URL && !(await acquireProcessorLock(dataDir, stop, tell))) return 0;

  const startedMs = performance.now();
  const total = { events: 0, quarantined: 0, duplicates: 0, bytes: 0 };
  let progress: Progress | undefined;
  let current = { file: job.files[0] ?? "", bytes: 0, offset: 0, folded: 0 };
  /** How many bytes of the file are posted, and are to be; `null` until its end is seen. */
  let [postedBytes, allBytes] = [0, null as number | null];
  let isDone = false;
  let eventsBefore = 0;
  let hasFailed = false;
  let isRefused = false;
  let hasLeftOver = false;
  const isMonitored = monitor !== null;
  const processor = supervise({ ...job, isMonitored }, (report) => {
    monitor?.report(report);
    if (report.type === "say") tell(report.line, report.level);
    if (report.type === "opened") {
      progress?.stop();
      progress = showProgress(basename(report.file), report.bytes, report.from);
      current = { ...report, offset: report.from, folded: report.from };
      eventsBefore = total.events;
      [postedBytes, allBytes] = [0, null];
    }
    if (report.type === "end") allBytes = report.bytes;
    if (report.type === "folded") {
      current.folded = report.fileOffset;
      showFolded();
    }
    if (report.type === "posted") {
      total.events += report.events;
      for (const reason of QUARANTINE_REASONS) total.quarantined += report.quarantined[reason];
      total.duplicates += report.duplicates;
      total.bytes += report.bytes;
      postedBytes += report.bytes;
      current.offset = report.fileOffset ?? current.offset + report.bytes;
      showFolded();
    }
    if (report.type === "leftOver") {
      tell(report.line, "warn");
      hasLeftOver = true;
    }
    if (report.type === "failed") {
      progress?.stop();
      tell(report.line, "error");
      hasFailed = true;
      ({ isRefused } = report);
    }
    isDone ||= report.type === "done";
  });
  /** A first batch may be the whole file, so what is folded is half done. */
  function showFolded() {
    const { offset, folded } = current;
    progress?.update((offset + Math.max(offset, folded)) / 2, total.events - eventsBefore);
  }

  stop.addEventListener("abort", () => processor.stop());
  if (stop.aborted) await processor.stop();
  await processor.ended;
  progress?.stop();
  // The signal may come while the last batch is being posted.
  isDone ||= current.file === job.files.at(-1) && postedBytes === allBytes;
  const isStopped = !isFollowing && !isDone && !hasFailed && stop.aborted;
  if (isStopped) {
    const { file, bytes, offset } = current;
    tell(`${file}: stopped at ${percent(offset, bytes)} %; run it again to continue`);
  }
  if (!isFollowing) printSummary(job.files.length, total, performance.now() - startedMs);
  if (isStopped) return STOPPED[stop.reason as keyof typeof STOPPED];
  if (hasFailed) return isRefused ? 2 : 3;
  return !isFollowing && (total.quarantined > 0 || hasLeftOver) ? 1 : 0;
}

function printSummary(
  files: number,
  total: { events: number; quarantined: number; duplicates: number; bytes: number },
  ms: number,
): void {
  const { events, quarantined, duplicates, bytes } = total;
  const repeated = duplicates > 0 ? `, ${counted(duplicates, "event")} had come before` : "";
  print(
    `posted ${counted(events, "event")} (${counted(quarantined, "line")} quarantined${repeated}) from ` +
      `${counted(files, "file")}: ${counted(bytes, "byte")} in ` +
      `${(ms / 1000).toFixed(1)} s, ${Math.round((1000 * events) / ms)} events/s`,
  );
}
