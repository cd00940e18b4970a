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

import { openCluster } from "./lib/postgres/cluster.ts";
import { maskSettings, readCommand } from "./lib/config.ts";
import { disk } from "./lib/journal/disk.ts";
import { openJournalReader } from "./lib/journal/reader.ts";
import { activeOf } from "./lib/journal/segments.ts";
import { JOURNAL_FILE } from "./lib/journal/writer.ts";
import { waitForLock } from "./lib/lock.ts";
import { type Progress, showProgress } from "./lib/progress.ts";
import { type Job, supervise } from "./lib/processor/supervisor.ts";
import type { ToolName } from "./lib/processor/tools.ts";

async function main(): Promise<number> {
  const {
    settings,
    options,
    files: given,
  } = readCommand({
    usage:
      "bun run processor.ts [--verify | --rebuild [--yes] | --check [--repair] | --quarantine[=retry]] [FILE…]",
    about:
      "Follows the journal in DATA_DIR and posts its events to the ledger, until stopped. With\n" +
      "FILEs (events or journals), posts each of them once, whoever did before, and exits.\n" +
      "With one of the options, looks or mends instead. --verify and --rebuild need every source of\n" +
      "the ledger: the journal in DATA_DIR they find; the journals of other servers, and each file\n" +
      "that was posted by processor.ts FILE, are given as FILEs, or nothing is done.",
    options: {
      verify: {
        type: "boolean",
        meaning:
          "counts all sources again, while the system runs, and names each user that differs",
      },
      rebuild: {
        type: "boolean",
        meaning: "the same, and makes the balances what was counted, in one transaction",
      },
      yes: {
        type: "boolean",
        meaning: "with --rebuild: also where lines are no events any more, or count otherwise",
      },
      check: {
        type: "boolean",
        meaning: "reads all of the journal (or of the journals FILE…) and names what is damaged",
      },
      repair: {
        type: "boolean",
        meaning: "with --check: moves damage to a file of its own and keeps every whole frame",
      },
      quarantine: {
        type: "string",
        alone: "list",
        meaning:
          "lists the lines that were set aside; --quarantine=retry posts what is good by now",
      },
    },
    files: { atMost: Number.POSITIVE_INFINITY },
    settings: [
      ...(["DATA_DIR", "DATABASE_URL", "ID_DAYS", "JOURNAL_KEEP_DAYS"] as const),
      ...(["EVENT_TYPES", "LOG_LEVEL"] as const),
    ],
    exits: {
      0: "done, or told to stop; nothing differs, is damaged or is in quarantine (any more)",
      1: "balances differ, the journal is damaged, or lines are in quarantine",
      2: "wrong use, a wrong setting, no such file, or a source that --verify needs is missing",
      3: "gave up: the database is away or refuses, or a file is damaged",
    },
  });
  const { tool, wrong: wrongUse } = toolOf(options);
  if (wrongUse !== undefined) {
    say(wrongUse);
    return 2;
  }
  let wrong = false;
  // A full file of a journal stands for all of it: so eventsPost*.jsonl is one journal.
  const files = [...new Set(await Promise.all(given.map((file) => activeOf(file, disk))))];
  for (const file of files) {
    const stat = statSync(file, { throwIfNoEntry: false });
    if (stat?.isFile()) continue;
    // While a journal begins its next file, none has this name.
    if (!stat && (await openJournalReader(file).catch(() => null))) continue;
    say(`${file}: ${stat ? "not a regular file" : "no such file"}`);
    wrong = true;
  }
  if (wrong) return 2;

  const stop = new AbortController();
  // A tool has nothing to finish: what it changes is in one transaction, or one rename.
  if (!tool)
    for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort());

  const { DATA_DIR: dataDir, DATABASE_URL: databaseUrl = null, ID_DAYS: idDays } = settings;
  const { JOURNAL_KEEP_DAYS: keepDays = null, EVENT_TYPES: eventTypes } = settings;
  mkdirSync(dataDir, { recursive: true });
  // Who stays has a log; what a person waits for speaks plainly.
  const stays = !tool && files.length === 0;
  const log = stays ? (await import("./lib/log.ts")).openLog(settings.LOG_LEVEL) : null;
  const tell: Tell = log ? (line, level = "info") => log[level](line) : say;
  const cluster =
    databaseUrl || tool === "check" ? null : await openCluster(join(dataDir, "postgres"), tell);
  try {
    if (tool) {
      const { useTool } = await import("./lib/processor/tools.ts");
      return await useTool(tool, files, options["yes"] === true, settings);
    }
    log?.info({ settings: maskSettings(settings) }, "started");
    if (stays && !(await becomeTheProcessor(dataDir, stop.signal, tell))) return 0;
    const job = { dataDir, databaseUrl, idDays, keepDays, eventTypes, files };
    const code = await run(job, stop.signal, tell);
    log?.info("stopped");
    return code;
  } finally {
    await cluster?.close();
  }
}

/** What the options ask for instead of posting, or what is wrong with them. */
function toolOf(options: Record<string, string | boolean | undefined>): Choice {
  const { verify, rebuild, check, repair, yes, quarantine } = options;
  const chosen = [verify, rebuild, check, quarantine !== undefined].filter(Boolean).length;
  if (chosen > 1)
    return { wrong: "found several of --verify, --rebuild, --check, --quarantine; wanted one" };
  if (repair && !check) return { wrong: "--repair: found alone, wanted with --check" };
  if (yes && !rebuild) return { wrong: "--yes: found alone, wanted with --rebuild" };
  if (verify) return { tool: "verify" };
  if (rebuild) return { tool: "rebuild" };
  if (check) return { tool: repair ? "repair" : "check" };
  if (quarantine === "list" || quarantine === "retry") return { tool: quarantine };
  if (quarantine !== undefined)
    return { wrong: `--quarantine: found "${quarantine}", wanted nothing or retry` };
  return { tool: null };
}

type Choice = { tool: ToolName | null; wrong?: never } | { wrong: string; tool?: never };

/** Waits until no other processor follows this journal. `false`: told to stop before. */
async function becomeTheProcessor(
  dataDir: string,
  stop: AbortSignal,
  tell: Tell,
): Promise<boolean> {
  const said = setTimeout(tell, 500, "standing by: another processor follows this journal");
  const lock = await waitForLock(join(dataDir, "processor.lock"), stop);
  clearTimeout(said);
  if (lock) tell(`following ${join(dataDir, JOURNAL_FILE)}`);
  return lock !== null;
}

/** Runs the job in its Worker, shows how it goes, and returns the exit code. */
async function run(job: Job, stop: AbortSignal, tell: Tell): Promise<number> {
  const startedMs = performance.now();
  const total = { events: 0, quarantined: 0, bytes: 0 };
  let progress: Progress | null = null;
  let at = 0;
  let eventsBefore = 0;
  let failed = false;

  const processor = supervise(job, (report) => {
    if (report.type === "say") tell(report.line, report.level);
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
      tell(report.line, "error");
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

type Tell = (line: string, level?: "info" | "warn" | "error") => void;

function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    say((error as Error).message);
    return 3;
  });
  process.exit();
}
