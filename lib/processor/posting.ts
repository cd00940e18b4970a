/**
 * Posting: batch after batch, from the journal as it grows or from a file to its end, through every
 * passing failure. Whatever crashes, the next processor resumes at the checkpoint.
 */
import { join } from "node:path";

import type { SettingsOf } from "../config.ts";
import { getEventTypes } from "../event/event.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import {
  type Batch,
  countQuarantined,
  noteEventTypes,
  type Outcome,
  post,
  pruneIds,
} from "../ledger/ledger.ts";
import { type DirectoryWatch, watchDirectory } from "../watch.ts";
import { type BatchReader, openFileBatches, openJournalBatches } from "./batches.ts";
import { BatchLimit } from "./fold.ts";
import type { Report } from "./supervisor.ts";

/** A file is given up when the database has been unavailable for this long; the journal never is. */
const FILE_PATIENCE_MS = 60_000;
/** Force a collection after every 16 MiB read: buffers look small to the collector, which then waits too long. */
const GARBAGE_BYTES = 16 * 1024 * 1024;
const PRUNE_INTERVAL_MS = 60_000;
const TRANSIENT_PAUSE_MS = 200;
const PAUSE_MS = 2_000;

/** How a run of postings ended. `elsewhere`: another processor moved the checkpoint. `ahead`: as in Outcome. */
type Ending =
  | { state: "done" | "elsewhere" }
  | { state: "ahead"; posted: Map<string, number> }
  | { state: "failed"; error: unknown };

interface Run {
  database: Database;
  limit: BatchLimit;
  stop: AbortSignal;
  open(): Promise<BatchReader>;
  posted(report: Report): void;
  /** Hears of a batch before it is known what becomes of it. */
  sent?(batch: Batch): void;
  /** Runs between two batches. */
  between?(): Promise<void>;
  /** Waits at the end for more; without it, the end is the end. */
  more?(): Promise<void>;
}

/** Posts the journal as it grows until `stop`, and waits out every failure. */
export async function follow(
  database: Database,
  { DATA_DIR, ID_DAYS }: Pick<SettingsOf<"processor">, "DATA_DIR" | "ID_DAYS">,
  stop: AbortSignal,
  report: (report: Report) => void,
): Promise<void> {
  const watch = watchDirectory(DATA_DIR);
  stop.addEventListener("abort", watch.close);
  const path = join(DATA_DIR, JOURNAL_FILE);
  const limit = new BatchLimit();
  let ahead = new Map<string, number>();
  let trouble = "";
  const run: Run = {
    ...{ database, limit, stop },
    async open() {
      const journal = await waitForJournal(path, watch, stop);
      return journal ? openJournalBatches({ database, path, limit, ahead }, journal) : NO_BATCHES;
    },
    posted(posted) {
      if (trouble) report({ type: "say", line: "processor: posting again" });
      trouble = "";
      report(posted);
    },
    between: idPruner(database, ID_DAYS),
    more: watch.next,
  };
  while (!stop.aborted) {
    const ending = await attempt(run);
    ahead = ending.state === "ahead" ? ending.posted : new Map();
    if (ending.state !== "failed") continue;
    const { message } = ending.error as Error;
    if (message !== trouble)
      report({ type: "say", level: "warn", line: `processor: waiting; ${message}` });
    trouble = message;
    await Bun.sleep(isTransient(ending.error) ? TRANSIENT_PAUSE_MS : PAUSE_MS);
  }
}

/** Posts what is in a file and not posted yet. Throws when it gives up. */
export async function postFile(
  database: Database,
  path: string,
  stop: AbortSignal,
  report: (report: Report) => void,
): Promise<void> {
  const say = (line: string) => report({ type: "say", line: `${path}: ${line}` });
  const leftOver = (bytes: number) =>
    say(`the last line (${bytes} bytes) has no newline and is no event yet: left for the next run`);
  const limit = new BatchLimit();
  let deadlineMs = performance.now() + FILE_PATIENCE_MS;
  let pauseMs = 100;
  let ahead = new Map<string, number>();
  let sent = null as Batch | null;
  const run: Run = {
    ...{ database, limit, stop },
    async open() {
      const openedMs = performance.now();
      const source = { database, path, limit, ahead };
      const journal = await openJournalReader(path);
      const batches = journal
        ? await openJournalBatches(source, journal)
        : await openFileBatches(source, leftOver);
      // The posted part of a large file is hashed first; that does not use up the patience.
      deadlineMs += performance.now() - openedMs;
      // The answer to its COMMIT was lost, but not the COMMIT.
      if (sent && batches.from === sent.to) {
        const quarantined = await countQuarantined(database, sent);
        report(reportOf(sent, { ...sent, quarantined }, 0));
      }
      sent = null;
      report({ type: "opened", file: path, bytes: batches.bytes, from: batches.from });
      return batches;
    },
    sent: (batch) => (sent = batch),
    posted(posted) {
      sent = null;
      deadlineMs = performance.now() + FILE_PATIENCE_MS;
      pauseMs = 100;
      report(posted);
    },
  };
  while (!stop.aborted) {
    const ending = await attempt(run);
    if (ending.state === "done") return;
    if (ending.state === "failed") {
      if (!isTransient(ending.error) || performance.now() > deadlineMs) throw ending.error;
      if (pauseMs > 1_000) say(`waiting; ${(ending.error as Error).message}`);
    } else {
      sent = null; // refused, because another processor had posted it
      ahead = ending.state === "ahead" ? ending.posted : new Map();
    }
    // Another processor posts the same file: let it, and look again in case it dies.
    if (ending.state === "elsewhere") deadlineMs = performance.now() + FILE_PATIENCE_MS;
    if (ending.state !== "ahead") await Bun.sleep(pauseMs);
    pauseMs = Math.min(pauseMs * 2, PAUSE_MS);
  }
}

/** Opens the batches and posts them until something ends the run. */
async function attempt(run: Run): Promise<Ending> {
  try {
    await noteEventTypes(run.database, getEventTypes());
    await using batches = await run.open();
    return await postBatches(batches, run);
  } catch (error) {
    return { state: "failed", error };
  }
}

/** Posts batch after batch, and folds one while the one before is in progress. */
async function postBatches(batches: BatchReader, run: Run): Promise<Ending> {
  const { database, limit, stop } = run;
  let posting: Promise<Outcome | null> = Promise.resolve(null);
  let garbageBytes = 0;
  for (;;) {
    const batch = stop.aborted ? null : await batches.next(posting);
    const outcome = await posting;
    if (outcome && outcome.state !== "posted") return outcome;
    await run.between?.();
    if (batch) {
      garbageBytes += batch.to - batch.from;
      if (garbageBytes > GARBAGE_BYTES) {
        Bun.gc(true);
        garbageBytes = 0;
      }
      run.sent?.(batch);
      const startedMs = performance.now();
      const elapsedMs = () => performance.now() - startedMs;
      posting = post(database, batch, limit.timeoutMs).then((outcome) => {
        if (outcome.state !== "posted") return outcome;
        limit.succeeded();
        run.posted(reportOf(batch, outcome, elapsedMs()));
        return outcome;
      });
      // Awaited in the next turn.
      posting.catch(() => limit.failed(elapsedMs()));
    } else if (stop.aborted || !run.more) return { state: "done" };
    else {
      posting = Promise.resolve(null);
      await run.more();
    }
  }
}

const NO_BATCHES: BatchReader = {
  from: 0,
  bytes: 0,
  next: async () => null,
  async [Symbol.asyncDispose]() {},
};

/** The journal, once there is one; `null` when `stop` is aborted first. */
async function waitForJournal(
  path: string,
  watch: DirectoryWatch,
  stop: AbortSignal,
): Promise<JournalReader | null> {
  while (!stop.aborted) {
    const journal = await openJournalReader(path);
    if (journal) return journal;
    await watch.next();
  }
  return null;
}

/** Deletes old ids, a few at a time, so that nobody waits for it. */
function idPruner(database: Database, idDays: number): () => Promise<void> {
  let dueMs = 0;
  return async () => {
    if (performance.now() < dueMs) return;
    const hasMore = await pruneIds(database, idDays);
    dueMs = performance.now() + (hasMore ? 0 : PRUNE_INTERVAL_MS);
  };
}

function isTransient(error: unknown): boolean {
  return error instanceof Unavailable && error.isTransient;
}

function reportOf(
  { events, from, to, changes, claims }: Batch,
  { quarantined, duplicates }: { quarantined: number; duplicates: number },
  ms: number,
): Report {
  const users = changes.size + new Set(claims.values().map(({ userId }) => userId)).size;
  return { type: "posted", events, quarantined, duplicates, bytes: to - from, users, ms };
}
