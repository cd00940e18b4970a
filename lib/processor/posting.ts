/**
 * Posting: batch after batch from the journal as it grows, or from a file to its end, waiting out
 * what passes. Whatever dies, the next one goes on from the checkpoint.
 */
import { open } from "node:fs/promises";
import { join } from "node:path";

import { type Database, Unavailable } from "../ledger/database.ts";
import { BatchLimit } from "./batch-limit.ts";
import { getEventTypes } from "../event/event.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import { openJournalSource } from "./batches.ts";
import {
  type Batch,
  countQuarantined,
  noteEventTypes,
  type Outcome,
  post,
  pruneIds,
} from "../ledger/ledger.ts";
import { type BatchReader, openFileSource } from "./file-batches.ts";
import type { Job, Report } from "./supervisor.ts";
import { watchDirectory } from "../watch.ts";

/** A file is given up when the database has been away for this long; the journal never is. */
const FILE_PATIENCE_MS = 60_000;
/** After so much was read it is collected: left to itself that comes late, for buffers look small. */
const GARBAGE_BYTES = 16 * 1024 * 1024;
/** How often old ids are looked for. */
const PRUNE_EVERY_MS = 60_000;

/** Posts the journal as it grows, until told to stop. Waits out whatever is wrong. */
export async function follow(
  database: Database,
  { dataDir, idDays }: Pick<Job, "dataDir" | "idDays">,
  stop: AbortSignal,
  report: (report: Report) => void,
): Promise<void> {
  const wake = watchDirectory(dataDir);
  stop.addEventListener("abort", wake.close);
  const path = join(dataDir, JOURNAL_FILE);
  const prune = prunes(database, idDays);
  const effort = new BatchLimit();
  let ahead = new Map<string, number>();
  let trouble = "";
  while (!stop.aborted) {
    try {
      await noteEventTypes(database, getEventTypes());
      const journal = await openJournalReader(path);
      if (!journal) {
        await wake.next();
        continue;
      }
      const batches = await openJournalSource(database, path, journal, effort, ahead);
      const ended = await postBatches(database, batches, effort, stop, {
        posted(posted) {
          if (trouble) report({ type: "say", line: "processor: posting again" });
          trouble = "";
          report(posted);
        },
        beside: prune,
        more: () => wake.next(),
      });
      ahead = ended instanceof Map ? ended : new Map();
    } catch (error) {
      const { message } = error as Error;
      if (message !== trouble)
        report({ type: "say", level: "warn", line: `processor: waiting; ${message}` });
      trouble = message;
      await Bun.sleep(error instanceof Unavailable && error.passing ? 200 : 2_000);
    }
  }
}

/** Forgets old ids, some at a time, so that nobody waits for it. */
function prunes(database: Database, idDays: number): () => Promise<void> {
  let dueMs = 0;
  return async () => {
    if (performance.now() < dueMs) return;
    dueMs = performance.now() + ((await pruneIds(database, idDays)) ? 0 : PRUNE_EVERY_MS);
  };
}

/** Posts what is in a file and not posted yet. */
export async function postFile(
  database: Database,
  path: string,
  stop: AbortSignal,
  report: (report: Report) => void,
): Promise<void> {
  const leftOver = (bytes: number) =>
    report({
      type: "say",
      line: `${path}: the last line (${bytes} bytes) has no newline and is no event yet: left for the next run`,
    });
  let deadlineMs = performance.now() + FILE_PATIENCE_MS;
  const effort = new BatchLimit();
  let pauseMs = 100;
  let ahead = new Map<string, number>();
  let sent = null as Batch | null;
  while (!stop.aborted) {
    try {
      await noteEventTypes(database, getEventTypes());
      const openedMs = performance.now();
      const journal = await openJournalReader(path);
      // Open until it is posted: another file may take its name meanwhile, as a journal's own files do.
      await using file = journal ? null : await open(path);
      const batches: BatchReader = file
        ? await openFileSource(database, path, file, effort, leftOver)
        : await openJournalSource(database, path, journal as JournalReader, effort, ahead);
      // A large file that is posted in part is hashed up to there: that is no patience.
      deadlineMs += performance.now() - openedMs;
      // The answer to its COMMIT was lost, but not the COMMIT.
      if (sent && batches.from === sent.to)
        report(reportOf(sent, { ...sent, quarantined: await countQuarantined(database, sent) }, 0));
      sent = null;
      const bytes = (await file?.stat())?.size ?? (await journal?.end()) ?? 0;
      report({ type: "opened", file: path, bytes, from: batches.from });
      const ended = await postBatches(database, batches, effort, stop, {
        sent: (batch) => (sent = batch),
        posted(posted) {
          sent = null;
          deadlineMs = performance.now() + FILE_PATIENCE_MS;
          pauseMs = 100;
          report(posted);
        },
      });
      if (ended === "end") return;
      sent = null; // it was refused, for somebody else had posted it
      ahead = ended instanceof Map ? ended : new Map();
      // Another processor posts the same file: let it, and look again in case it dies.
      if (ended === "elsewhere") {
        deadlineMs = performance.now() + FILE_PATIENCE_MS;
        await Bun.sleep(pauseMs);
      }
    } catch (error) {
      const passing = error instanceof Unavailable && error.passing;
      if (!passing || performance.now() > deadlineMs) throw error;
      if (pauseMs > 1_000) report({ type: "say", line: `${path}: waiting; ${error.message}` });
      await Bun.sleep(pauseMs);
    }
    pauseMs = Math.min(pauseMs * 2, 2_000);
  }
}

/**
 * Posts batch after batch, folding one while the one before is on its way, and waits for `more` at
 * the end. Returns why it stopped: at the end (or told to), because another processor moved the
 * checkpoint, or because sources are ahead of what the journal expects: then how far they are.
 */
async function postBatches(
  database: Database,
  batches: BatchReader,
  effort: BatchLimit,
  stop: AbortSignal,
  on: {
    posted(report: Report): void;
    /** Hears what is sent, before it is known what becomes of it. */
    sent?(batch: Batch): void;
    beside?(): Promise<void>;
    more?(): Promise<void>;
  },
): Promise<"end" | "elsewhere" | Map<string, number>> {
  let posting: Promise<Outcome | null> = Promise.resolve(null);
  let garbageBytes = 0;
  for (;;) {
    const batch = stop.aborted ? null : await batches.next(posting);
    const outcome = await posting;
    if (outcome?.state === "elsewhere") return "elsewhere";
    if (outcome?.state === "ahead") return outcome.posted;
    await on.beside?.();
    if (batch) {
      garbageBytes += batch.to - batch.from;
      if (garbageBytes > GARBAGE_BYTES) {
        Bun.gc(true);
        garbageBytes = 0;
      }
      on.sent?.(batch);
      const fromMs = performance.now();
      posting = post(database, batch, effort.timeoutMs).then((outcome) => {
        if (outcome.state === "posted") {
          effort.succeeded();
          on.posted(reportOf(batch, outcome, performance.now() - fromMs));
        }
        return outcome;
      });
      // Awaited above, in the next turn.
      posting.catch(() => effort.failed(performance.now() - fromMs));
    } else if (stop.aborted || !on.more) return "end";
    else {
      posting = Promise.resolve(null);
      await on.more();
    }
  }
}

function reportOf(
  { events, from, to, changes, claims }: Batch,
  { quarantined, duplicates }: { quarantined: number; duplicates: number },
  ms: number,
): Report {
  const users = changes.size + new Set(claims.values().map(({ userId }) => userId)).size;
  return { type: "posted", events, quarantined, duplicates, bytes: to - from, users, ms };
}
