/**
 * The processor's Worker: does one job with a database of its own, reports, and ends. It is a module of
 * its own because a Worker shares no code with the thread that starts it: each import here is loaded a
 * second time.
 */
import { join } from "node:path";

import { setEventTypes } from "../event/event.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { openDatabase } from "../ledger/database.ts";
import { ledgerUrl } from "../postgres/cluster.ts";
import { follow, postFile } from "./posting.ts";
import type { Job, Report } from "./supervisor.ts";

const stop = new AbortController();
self.onmessage = ({ data }: MessageEvent<Job | "stop">) => {
  if (data === "stop") stop.abort();
  else work(data, stop.signal, postMessage).then(() => process.exit(0));
};

async function work(job: Job, stop: AbortSignal, report: (report: Report) => void): Promise<void> {
  const { settings, files } = job;
  setEventTypes(settings.EVENT_TYPES);
  const database = openLedger(job);
  try {
    if (files.length === 0)
      await Promise.all([
        follow(database, settings, stop, report),
        deleteOldSegments(job, stop, report),
      ]);
    for (const file of files) await postFile(database, file, stop, report);
    report({ type: "done" });
  } catch (error) {
    report({ type: "failed", line: (error as Error).message });
  }
  await database.close();
}

/** Runs beside the posting, with a connection of its own. */
async function deleteOldSegments(
  job: Job,
  stop: AbortSignal,
  report: (report: Report) => void,
): Promise<void> {
  const { JOURNAL_KEEP_DAYS: keepDays, DATA_DIR: dataDir } = job.settings;
  if (keepDays === undefined) return;
  const { retain } = await import("./retention.ts");
  const database = openLedger(job);
  const path = join(dataDir, JOURNAL_FILE);
  const say = (line: string) => report({ type: "say", line: `processor: ${line}` });
  await retain({ database, path, keepDays, stop, say });
  await database.close();
}

function openLedger({ settings }: Job) {
  const { DATA_DIR: dataDir, DATABASE_URL: databaseUrl = null } = settings;
  return openDatabase(ledgerUrl(dataDir, databaseUrl), "processor", 1);
}
