/**
 * What an operator can ask of `processor.ts` instead of posting: to inspect or to correct. Loaded only
 * then, because it made loading `processor.ts` a third slower.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";

import type { SettingsOf } from "../config.ts";
import { setEventTypes } from "../event/event.ts";
import type { JournalReader } from "../journal/reader.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { CannotProceed, LedgerRefused, openDatabase } from "../ledger/database.ts";
import { ledgerUrl } from "../postgres/cluster.ts";
import { print, say, sayLines } from "../progress.ts";
import { backup } from "./backup.ts";
import { check, checkStreamed, repair } from "./check.ts";
import { dismissQuarantine, listQuarantine, retryQuarantine } from "./quarantine.ts";
import type { Reconciliation } from "./recount.ts";
import { type Asked, history } from "./history.ts";
import { restore } from "./restore.ts";
import { retire } from "./retire.ts";
import { rebuild, verify } from "./verify.ts";

export type ToolName =
  | "verify"
  | "rebuild"
  | "check"
  | "repair"
  | "list"
  | "retry"
  | "dismiss"
  | "retire"
  | "history"
  | "backup"
  | "restore";

/** `paths` are the FILEs, the journal in DATA_DIR and those of the stream. */
interface ToolRun extends Reconciliation {
  /** The FILEs, and the same, or if there are none those of the stream, or the journal in DATA_DIR. */
  files: string[];
  journals: (string | JournalReader)[];
  /** --yes */
  yes: boolean;
  /** --retire SOURCE */
  gone: string[];
  /** --history USER */
  asked: Asked;
  /** --backup DIR, --restore DIR */
  folder: string;
  /** The active file in DATA_DIR. */
  journal: string;
}

const NO_REPAIR =
  "--repair is for files; a stream keeps copies: restore the files of its damaged node (deploy/README.md)";

/** Each returns how many differences, damaged ranges or quarantined lines there are. */
const TOOLS: Record<ToolName, (run: ToolRun) => Promise<number>> = {
  verify,
  rebuild: async (run) => (await rebuild(run), 0),
  async check({ journals }) {
    let damaged = 0;
    for (const journal of journals)
      damaged += await (typeof journal === "string"
        ? check(journal, print)
        : checkStreamed(journal, print));
    return damaged;
  },
  async repair({ journals, database }) {
    for (const journal of journals) {
      if (typeof journal !== "string") throw new CannotProceed(NO_REPAIR);
      await repair(journal, database, print);
    }
    return 0;
  },
  list: listQuarantine,
  retry: retryQuarantine,
  history,
  backup: async (run) => (await backup(run), 0),
  restore,
  retire: async (run) => (await retire(run), 0),
  dismiss: (run) => dismissQuarantine(run, run.files),
};

/** Runs a tool and returns the exit code: 0, 1 if it found something, 2 (with a message) if it refuses. */
export async function runTool(
  name: ToolName,
  {
    files,
    settings,
    ...options
  }: {
    files: string[];
    yes: boolean;
    gone: string[];
    asked: Asked;
    folder: string;
    settings: SettingsOf<"processor">;
  },
): Promise<number> {
  setEventTypes(settings.EVENT_TYPES);
  const journal = join(settings.DATA_DIR, JOURNAL_FILE);
  if (settings.JOURNAL_URL && (name === "backup" || name === "restore")) {
    say(`--${name} is for files; a stream has its own backup: see deploy/README.md`);
    return 2;
  }
  const stream = settings.JOURNAL_URL ? await openStreamed(settings.JOURNAL_URL) : null;
  const journals = files.length > 0 ? files : (stream?.journals ?? [journal]);
  // A rebuild corrects on a second connection.
  const database = openDatabase(ledgerUrl(settings), "processor", 2);
  try {
    const here = stream && !existsSync(settings.DATA_DIR) ? [] : [journal];
    const paths = [...here, ...files, ...(stream?.journals ?? [])];
    return (await TOOLS[name]({
      database,
      paths,
      files,
      journal,
      journals,
      ...options,
      print,
      say,
    })) > 0
      ? 1
      : 0;
  } catch (error) {
    if (!(error instanceof CannotProceed || error instanceof LedgerRefused)) throw error;
    sayLines(error.message);
    return 2;
  } finally {
    await database.close();
    await stream?.close();
  }
}

/** The journals of the stream. Throws InvalidSetting and JournalUnavailable. */
async function openStreamed(url: string) {
  const { openStream } = await import("../journal/stream.ts");
  const { openStreamReader } = await import("../journal/stream-reader.ts");
  const stream = await openStream(url);
  const journals: JournalReader[] = [];
  for (const id of (await stream.list()).counts.keys()) {
    const journal = await openStreamReader(stream, id);
    if (journal) journals.push(journal);
  }
  return { journals, close: stream.close };
}
