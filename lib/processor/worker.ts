/**
 * The processor's Worker: does one job with a database of its own, reports, and ends. It is a module of
 * its own because a Worker shares no code with the thread that starts it: each import here is loaded a
 * second time.
 */
import { join } from "node:path";

import { InvalidSetting } from "../config.ts";
import { setEventTypes } from "../event/event.ts";
import { fileJournals } from "../journal/reader.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { LedgerRefused, openDatabase, requireLedger } from "../ledger/database.ts";
import { ledgerUrl } from "../postgres/cluster.ts";
import { reportLag } from "./lag.ts";
import { follow, postFile } from "./posting.ts";
import { openRoom } from "./room.ts";
import type { Job, Report } from "./supervisor.ts";

/** The ledger is asked for this long whether it can be used, before it is waited for. */
const REQUIRE_MS = 15_000;
/** Journals of a stream that are posted at the same time. */
const MAX_POSTINGS = 3;

const stop = new AbortController();
const report = (report: Report) => postMessage(report);
self.onmessage = ({ data }: MessageEvent<Job | "stop">) => {
  if (data === "stop") stop.abort();
  else work(data).then(() => process.exit(0));
};

async function work(job: Job): Promise<void> {
  setEventTypes(job.settings.EVENT_TYPES);
  const { DATA_DIR, DATABASE_URL, JOURNAL_URL } = job.settings;
  const isStream = JOURNAL_URL !== undefined;
  const database = openDatabase(ledgerUrl(job.settings), "processor", isStream ? MAX_POSTINGS : 1);
  const room = DATABASE_URL ? null : openRoom(join(DATA_DIR, "postgres"), database);
  const context = { database, room, stop: stop.signal, report };
  try {
    if (!job.waitsForLedger) await requireLedger(database, REQUIRE_MS);
    if (job.files.length === 0 && isStream)
      await (await import("./streaming.ts")).followStream(job, context);
    else if (job.files.length === 0) {
      const lag = job.isMonitored
        ? reportLag(fileJournals(join(DATA_DIR, JOURNAL_FILE)), context)
        : null;
      await Promise.all([follow(job.settings, context), deleteOldSegments(job), lag]);
    }
    let isDone = true;
    for (const file of job.files) isDone &&= await postFile(file, context);
    report({ type: isDone ? "done" : "stopped" });
  } catch (error) {
    const { message: line } = error as Error;
    const isRefused = error instanceof LedgerRefused || error instanceof InvalidSetting;
    report({ type: "failed", line, isRefused });
  }
  await database.close();
}

/** Runs beside the posting, with a connection of its own. */
async function deleteOldSegments({ settings }: Job): Promise<void> {
  const { JOURNAL_KEEP_DAYS: keepDays, DATA_DIR: dataDir } = settings;
  if (keepDays === undefined) return;
  const { openRetention, retain } = await import("./retention.ts");
  const database = openDatabase(ledgerUrl(settings), "processor", 1);
  const path = join(dataDir, JOURNAL_FILE);
  const say = (line: string) => report({ type: "say", line: `processor: ${line}` });
  await retain(openRetention({ database, path, keepDays }), { keepDays, stop: stop.signal, say });
  await database.close();
}
