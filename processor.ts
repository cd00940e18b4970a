/**
 * The processor: reads events from the journal, or from files, and posts them to the ledger, each
 * exactly once, whatever dies in between and however many processors run.
 *
 * The main thread holds what must survive a fault of the driver: the settings, the lock of the
 * journal's processor, the private Postgres. A Worker does the work, always beginning at the
 * checkpoint, and is started again when it dies.
 */
import "./lib/install.ts";

import { mkdirSync, statSync } from "node:fs";
import { basename, join } from "node:path";

import { clusterUrl, openCluster } from "./lib/cluster.ts";
import { readCommand } from "./lib/config.ts";
import { type Database, openDatabase, Unavailable } from "./lib/database.ts";
import { Effort } from "./lib/effort.ts";
import { BATCH_BYTES, Fold } from "./lib/fold.ts";
import { JOURNAL_FILE } from "./lib/journal.ts";
import { JournalDamage } from "./lib/journal-frame.ts";
import { type JournalReader, openJournalReader } from "./lib/journal-reader.ts";
import { openCheckpoint, type Outcome, post, pruneIds, readCheckpoint } from "./lib/ledger.ts";
import { waitForLock } from "./lib/lock.ts";
import { type Progress, showProgress } from "./lib/progress.ts";
import { type BatchReader, openFileSource } from "./lib/source.ts";
import { type Job, type Report, supervise } from "./lib/supervisor.ts";
import { watchDirectory } from "./lib/wake.ts";

/** A file is given up when the database has been away for this long; the journal never is. */
const FILE_PATIENCE_MS = 60_000;
/** After so much was read it is collected: left to itself that comes late, for buffers look small. */
const GARBAGE_BYTES = 16 * 1024 * 1024;
/** How often old ids are looked for. */
const PRUNE_EVERY_MS = 60_000;

async function main(): Promise<number> {
  const { settings, files } = readCommand({
    usage: "bun run processor.ts [FILE…]",
    about:
      "Follows the journal in DATA_DIR and posts its events to the ledger, until stopped. With\n" +
      "FILEs (events or journals), posts each of them once, whoever did before, and exits.",
    options: {},
    files: { atMost: Number.POSITIVE_INFINITY },
    settings: ["DATA_DIR", "DATABASE_URL", "ID_DAYS"],
    exits: {
      0: "everything is posted, or it was told to stop",
      1: "posted, but some lines are in quarantine",
      2: "wrong use, a wrong setting, or no such file",
      3: "gave up: the database is away or refuses, or a file is damaged",
    },
  });
  let wrong = false;
  for (const file of files) {
    const stat = statSync(file, { throwIfNoEntry: false });
    if (stat?.isFile()) continue;
    say(`${file}: ${stat ? "not a regular file" : "no such file"}`);
    wrong = true;
  }
  if (wrong) return 2;

  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort());

  const { DATA_DIR: dataDir, DATABASE_URL: databaseUrl = null, ID_DAYS: idDays } = settings;
  mkdirSync(dataDir, { recursive: true });
  const cluster = databaseUrl ? null : await openCluster(join(dataDir, "postgres"), say);
  try {
    if (files.length === 0 && !(await becomeTheProcessor(dataDir, stop.signal))) return 0;
    return await run({ dataDir, databaseUrl, idDays, files }, stop.signal);
  } finally {
    await cluster?.close();
  }
}

/** Waits until no other processor follows this journal. `false`: told to stop before. */
async function becomeTheProcessor(dataDir: string, stop: AbortSignal): Promise<boolean> {
  const said = setTimeout(say, 500, "standing by: another processor follows this journal");
  const lock = await waitForLock(join(dataDir, "processor.lock"), stop);
  clearTimeout(said);
  if (lock) say(`following ${join(dataDir, JOURNAL_FILE)}`);
  return lock !== null;
}

/** Runs the job in its Worker, shows how it goes, and returns the exit code. */
async function run(job: Job, stop: AbortSignal): Promise<number> {
  const startedMs = performance.now();
  const total = { events: 0, quarantined: 0, bytes: 0 };
  let progress: Progress | null = null;
  let at = 0;
  let eventsBefore = 0;
  let failed = false;

  const processor = supervise(new URL(import.meta.url), job, (report) => {
    if (report.type === "say") say(report.line);
    if (report.type === "opened") {
      progress?.stop();
      progress = showProgress(basename(report.file), report.bytes, report.from);
      at = report.from;
      eventsBefore = total.events;
    }
    if (report.type === "posted") {
      total.events += report.events;
      total.quarantined += report.quarantined;
      total.bytes += report.bytes;
      at += report.bytes;
      progress?.update(at, total.events - eventsBefore);
    }
    if (report.type === "failed") {
      progress?.stop();
      say(report.line);
      failed = true;
    }
  });
  stop.addEventListener("abort", () => processor.stop());
  if (stop.aborted) await processor.stop();
  await processor.ended;
  (progress as Progress | null)?.stop();

  const seconds = (performance.now() - startedMs) / 1000;
  const rate = Math.round(total.events / seconds);
  if (job.files.length > 0)
    process.stdout.write(
      `posted ${total.events} events (${total.quarantined} lines quarantined) from ` +
        `${job.files.length} ${job.files.length === 1 ? "file" : "files"}: ` +
        `${total.bytes} bytes in ${seconds.toFixed(1)} s, ${rate} events/s\n`,
    );
  return failed ? 3 : total.quarantined > 0 && job.files.length > 0 ? 1 : 0;
}

function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** The Worker: does the job with a database of its own. */
async function work(job: Job, stop: AbortSignal, report: (report: Report) => void): Promise<void> {
  const url = () => job.databaseUrl ?? clusterUrl(join(job.dataDir, "postgres"));
  const database = openDatabase(url, "processor", 1);
  try {
    if (job.files.length === 0) await follow(database, job, stop, report);
    for (const file of job.files) await postFile(database, file, stop, report);
    report({ type: "done" });
  } catch (error) {
    report({ type: "failed", line: (error as Error).message });
  }
  await database.close();
}

/** Posts the journal as it grows, until told to stop. Waits out whatever is wrong. */
async function follow(
  database: Database,
  { dataDir, idDays }: Job,
  stop: AbortSignal,
  report: (report: Report) => void,
): Promise<void> {
  const wake = watchDirectory(dataDir);
  stop.addEventListener("abort", wake.close);
  const path = join(dataDir, JOURNAL_FILE);
  const prune = prunes(database, idDays);
  const effort = new Effort();
  let ahead = new Map<string, number>();
  let trouble = "";
  while (!stop.aborted) {
    try {
      const journal = (await Bun.file(path).exists()) && (await openJournalReader(path));
      if (!journal) {
        await wake.changed();
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
        more: () => wake.changed(),
      });
      ahead = ended instanceof Map ? ended : new Map();
    } catch (error) {
      const { message } = error as Error;
      if (message !== trouble) report({ type: "say", line: `processor: waiting; ${message}` });
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
async function postFile(
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
  const effort = new Effort();
  let pauseMs = 100;
  let ahead = new Map<string, number>();
  while (!stop.aborted) {
    try {
      const journal = await openJournalReader(path);
      const batches = journal
        ? await openJournalSource(database, path, journal, effort, ahead)
        : await openFileSource(database, path, effort, leftOver);
      const { size: bytes } = await Bun.file(path).stat();
      report({ type: "opened", file: path, bytes, from: batches.from });
      const ended = await postBatches(database, batches, effort, stop, {
        posted(posted) {
          deadlineMs = performance.now() + FILE_PATIENCE_MS;
          pauseMs = 100;
          report(posted);
        },
      });
      if (ended === "end") return;
      ahead = ended instanceof Map ? ended : new Map();
      // Another processor posts the same file: let it, and look again in case it dies.
      if (ended === "elsewhere") await Bun.sleep(pauseMs);
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
  effort: Effort,
  stop: AbortSignal,
  on: { posted(report: Report): void; beside?(): Promise<void>; more?(): Promise<void> },
): Promise<"end" | "elsewhere" | Map<string, number>> {
  let posting: Promise<Outcome | null> = Promise.resolve(null);
  let garbageBytes = 0;
  for (;;) {
    const batch = stop.aborted ? null : await batches.next();
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
      posting = post(database, batch, effort.timeoutMs).then((outcome) => {
        if (outcome.state === "posted") {
          effort.succeeded();
          const { events, from, to } = batch;
          on.posted({ type: "posted", events, quarantined: outcome.quarantined, bytes: to - from });
        }
        return outcome;
      });
      posting.catch(() => effort.failed()); // awaited above, in the next turn
    } else if (stop.aborted || !on.more) return "end";
    else {
      posting = Promise.resolve(null);
      await on.more();
    }
  }
}

/** The journal as a source, from its checkpoint on; `ahead` as `Fold` wants it. */
async function openJournalSource(
  database: Database,
  path: string,
  journal: JournalReader,
  effort: Effort,
  ahead: ReadonlyMap<string, number>,
): Promise<BatchReader> {
  const source = `journal:${journal.id}`;
  await openCheckpoint(database, source, journal.start, null);
  const checkpoint = await readCheckpoint(database, source);
  if (!checkpoint) throw new Unavailable(`the checkpoint ${source} has vanished`, true);
  const { position: from, digest } = checkpoint;
  if (from > (await journal.end()))
    throw new JournalDamage(path, await journal.end(), `the ledger has posted up to ${from}`);
  // An older copy that was put back and has grown since holds other events at these positions.
  const [, at = "", header = ""] = /^(\d+) (.*)$/.exec(digest ?? "") ?? [];
  const [last] = header ? await journal.read(Number(at)) : [];
  if (header && (last?.header !== header || last.to !== from))
    throw new JournalDamage(
      path,
      Number(at),
      `the ledger has posted another frame here: ${header}`,
    );
  const posted = new Map(ahead);
  let position = from;

  return {
    from,
    async next() {
      const fold = new Fold(effort.users, posted);
      const batchFrom = position;
      let last = "";
      while (!fold.full && position - batchFrom < BATCH_BYTES) {
        const frames = await journal.read(position);
        for (const { from, to, header, payload } of frames) {
          fold.addFrame(payload, to - payload.length);
          last = `${from} ${header}`;
          position = to;
          if (fold.full) break;
        }
        if (frames.length === 0) break;
      }
      if (position === batchFrom) return null;
      for (const [name, { to }] of fold.sources) if (posted.has(name)) posted.set(name, to);
      // What the writer has not synced yet could still be lost: the ledger must not be ahead.
      await journal.sync();
      return fold.batch(source, batchFrom, position, last);
    },
  };
}

if (!Bun.isMainThread) {
  const stop = new AbortController();
  self.onmessage = ({ data }: MessageEvent<Job | "stop">) => {
    if (data === "stop") stop.abort();
    else work(data, stop.signal, postMessage).then(() => process.exit(0));
  };
} else if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    say((error as Error).message);
    return 3;
  });
  process.exit();
}
