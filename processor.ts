/**
 * The processor: reads events from the journal, or from files, and posts them to the ledger, each
 * exactly once, whatever crashes and however many processors run.
 *
 * The main thread holds what must survive a fault of the driver: the settings, the processor's lock,
 * the embedded Postgres. A Worker does the work, always from the checkpoint on, and is restarted when
 * it dies.
 */
import "./lib/install.ts";

import { mkdirSync, statSync } from "node:fs";
import { join } from "node:path";

import { InvalidSetting, maskSettings, readCommand, requireDataDir } from "./lib/config.ts";
import { explain } from "./lib/errors.ts";
import { inspectFile } from "./lib/event/input.ts";
import { disk } from "./lib/journal/disk.ts";
import { explainPiece, openJournalReader } from "./lib/journal/reader.ts";
import { activeOf } from "./lib/journal/segments.ts";
import { checkJournalUrl } from "./lib/journal/url.ts";
import { checkDatabaseUrl, parseDatabaseUrl } from "./lib/ledger/url.ts";
import { openCluster } from "./lib/postgres/cluster.ts";
import { InvalidUse, readAsked, toolOf } from "./lib/processor/asked.ts";
import { runJob, type Tell } from "./lib/processor/run.ts";
import type { ToolName } from "./lib/processor/tools.ts";
import { say, sayLines, visible } from "./lib/progress.ts";

async function main(): Promise<number> {
  process.umask(0o077); // what is in DATA_DIR is for its owner
  const { settings, options, files: given } = readCommand(COMMAND);
  const tool = toolOf(options);
  // A segment stands for its whole journal, so eventsPost*.jsonl is one journal.
  const files = [...new Set(await Promise.all(given.map((file) => activeOf(file, disk))))];
  const reasons = await Promise.all(files.map((file) => whyUnreadable(file, tool)));
  const unreadable = reasons.filter((why) => why !== null);
  if (unreadable.length > 0) throw new InvalidUse(unreadable.join("\n"));

  const stop = new AbortController();
  // Before anything is started. A tool has nothing to finish: it changes one transaction, or one rename.
  if (!tool)
    for (const signal of ["SIGTERM", "SIGINT"] as const)
      process.on(signal, () => stop.abort(signal));
  const { DATA_DIR: dataDir, DATABASE_URL: databaseUrl, DAYBOOK_POSTGRES: programs } = settings;
  const { note = null } = databaseUrl ? parseDatabaseUrl(databaseUrl) : {};
  if (!settings.JOURNAL_URL) {
    requireDataDir(dataDir, "read");
    mkdirSync(dataDir, { recursive: true });
  }
  // A program that keeps running has a log; to a person who waits, it speaks plainly.
  const isFollowing = !tool && files.length === 0;
  const log = isFollowing ? (await import("./lib/log.ts")).openLog(settings.LOG_LEVEL) : null;
  const tell: Tell = log ? (line, level = "info") => log[level](line) : say;
  if (note) tell(note);
  if (isFollowing) process.on("SIGHUP", () => tell("SIGHUP: there is nothing to reload"));
  const needsCluster = !databaseUrl && tool !== "check";
  const cluster = needsCluster
    ? await openCluster(join(dataDir, "postgres"), tell, { programs })
    : null;
  try {
    if (tool) {
      const { runTool } = await import("./lib/processor/tools.ts");
      return await runTool(tool, { files, settings, ...readAsked(options) });
    }
    log?.info({ settings: maskSettings(settings) }, "started");
    const code = await runJob({ settings, files }, stop.signal, tell);
    log?.info("stopped");
    return code;
  } finally {
    await cluster?.close();
  }
}

const COMMAND = {
  program: "processor",
  usage:
    "bun run processor.ts [--verify | --rebuild [--yes] | --check [--repair] | --quarantine[=retry|dismiss] | --retire SOURCE [--yes] | --history USER | --backup DIR | --restore DIR [--yes]] [FILE…]",
  about:
    "Follows the journal in DATA_DIR and posts its events to the ledger, until stopped. With FILEs\n" +
    "(event files, also gzip or zstd, or journals), posts each of them once, however often it is run, and exits.\n" +
    "With one of the options, it checks or corrects instead. --verify and --rebuild need every source\n" +
    "of the ledger. They find the journal in DATA_DIR; name the journals of other servers and the\n" +
    "files posted by processor.ts FILE. If one is missing, they name it and do nothing.",
  options: {
    verify: { type: "boolean", meaning: "recount all sources and name each user that differs" },
    rebuild: { type: "boolean", meaning: "the same, and correct the balances in one transaction" },
    retire: {
      type: "string",
      multiple: true,
      meaning: "keep what a SOURCE that is gone has added, as a snapshot; repeat it for several",
    },
    history: { type: "string", meaning: "every event of a USER, and the balance after it" },
    from: { type: "string", meaning: "with --history: from this TIME on, as 2026-11-26T15:04Z" },
    to: { type: "string", meaning: "with --history: before this TIME" },
    backup: {
      type: "string",
      meaning: "copy journal and ledger into DIR, as of one moment, while everything runs",
    },
    restore: {
      type: "string",
      meaning:
        "read a backup in DIR into an empty ledger (and DATA_DIR), and verify it; name the FILEs that were posted",
    },
    yes: {
      type: "boolean",
      meaning:
        "with --rebuild: even where lines count differently now; with --retire: do it; with --restore: retire what is missing",
    },
    check: { type: "boolean", meaning: "check the journal, or the journals FILE…, for damage" },
    repair: { type: "boolean", meaning: "with --check: move damage aside, keep intact frames" },
    quarantine: {
      type: "string",
      bare: "list",
      meaning:
        "list the quarantined lines; =retry posts those that are valid by now; =dismiss [SOURCE[@POSITION]…] removes them for good",
    },
  },
  checks: [checkDatabaseUrl, checkJournalUrl],
  maxFiles: Number.POSITIVE_INFINITY,
  exits: {
    0: "done, or stopped; nothing differs, is damaged or was quarantined",
    1: "balances differ, the journal is damaged, lines were quarantined (with --quarantine: there are some), or the end of a FILE is not a whole event yet",
    2: "invalid use or setting, no such file, one that is not lines of events, a source that --verify needs is missing, a ledger that cannot be used as it is, or something in the way of --backup or --restore",
    3: "gave up: the database is unavailable or refuses, a file is damaged, or METRICS_PORT is in use",
    130: "stopped by SIGINT before the end of the FILEs; run again, it continues",
    143: "the same, by SIGTERM",
  },
} as const;

async function whyUnreadable(file: string, tool: ToolName | null): Promise<string | null> {
  if (tool === "dismiss") return null; // a place in the quarantine
  const stat = statSync(file, { throwIfNoEntry: false });
  if (stat?.isFile()) {
    if (tool) return null; // what has been posted by an earlier version is still recounted
    const { problem, head, compression } = await inspectFile(file);
    const found =
      problem ?? (await explainPiece(file, { head, isCompressed: compression !== null }));
    return found && `${visible(file)}: ${found}`;
  }
  if (stat) return `${visible(file)}: not a regular file`;
  // While a journal begins its next file, no file has this name.
  return (await openJournalReader(file).catch(() => null))
    ? null
    : `${visible(file)}: no such file`;
}

/** Runs the program, and ends the process with its exit code. */
export async function run(): Promise<never> {
  process.exitCode = await main().catch((error) => {
    sayLines(explain(error));
    return error instanceof InvalidUse || error instanceof InvalidSetting ? 2 : 3;
  });
  process.exit();
}

if (import.meta.main) await run();
