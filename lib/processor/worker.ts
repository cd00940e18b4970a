/**
 * The processor's Worker: does one job with a database of its own, tells how it goes, and ends. A
 * module of its own because a Worker shares no code with the thread that starts it: whatever is
 * imported here is loaded a second time.
 */
import { join } from "node:path";

import { ledgerUrl } from "../postgres/cluster.ts";
import { openDatabase } from "../ledger/database.ts";
import { setEventTypes } from "../event/event.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { follow, postFile } from "./posting.ts";
import type { Job, Report } from "./supervisor.ts";

const stop = new AbortController();
self.onmessage = ({ data }: MessageEvent<Job | "stop">) => {
  if (data === "stop") stop.abort();
  else work(data, stop.signal, postMessage).then(() => process.exit(0));
};

async function work(job: Job, stop: AbortSignal, report: (report: Report) => void): Promise<void> {
  setEventTypes(job.eventTypes);
  const database = openLedger(job);
  try {
    if (job.files.length === 0)
      await Promise.all([follow(database, job, stop, report), letGo(job, stop, report)]);
    for (const file of job.files) await postFile(database, file, stop, report);
    report({ type: "done" });
  } catch (error) {
    report({ type: "failed", line: (error as Error).message });
  }
  await database.close();
}

/** Beside the posting, with a connection of its own. */
async function letGo(job: Job, stop: AbortSignal, report: (report: Report) => void): Promise<void> {
  if (job.keepDays === null) return;
  const { retain } = await import("./retention.ts");
  const database = openLedger(job);
  await retain(database, join(job.dataDir, JOURNAL_FILE), job.keepDays, stop, (line) =>
    report({ type: "say", line: `processor: ${line}` }),
  );
  await database.close();
}

function openLedger({ dataDir, databaseUrl }: Job) {
  return openDatabase(ledgerUrl(dataDir, databaseUrl), "processor", 1);
}
