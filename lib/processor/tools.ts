/**
 * What an operator can ask of `processor.ts` instead of posting: to inspect or to correct. Loaded only
 * then, because it made loading `processor.ts` a third slower.
 */
import { join } from "node:path";

import type { SettingsOf } from "../config.ts";
import { setEventTypes } from "../event/event.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { CannotProceed, LedgerRefused, openDatabase } from "../ledger/database.ts";
import { ledgerUrl } from "../postgres/cluster.ts";
import { print, say, sayLines } from "../progress.ts";
import { check, repair } from "./check.ts";
import { dismissQuarantine, listQuarantine, retryQuarantine } from "./quarantine.ts";
import type { Reconciliation } from "./recount.ts";
import { type Asked, history } from "./history.ts";
import { retire } from "./retire.ts";
import { rebuild, verify } from "./verify.ts";

export type ToolName =
  "verify" | "rebuild" | "check" | "repair" | "list" | "retry" | "dismiss" | "retire" | "history";

/** `paths` are the FILEs and the journal in DATA_DIR. */
interface ToolRun extends Reconciliation {
  /** The FILEs, and the same, or if there are none the journal in DATA_DIR. */
  files: string[];
  journals: string[];
  /** --yes */
  yes: boolean;
  /** --retire SOURCE */
  gone: string[];
  /** --history USER */
  asked: Asked;
}

/** Each returns how many differences, damaged ranges or quarantined lines there are. */
const TOOLS: Record<ToolName, (run: ToolRun) => Promise<number>> = {
  verify,
  rebuild: async (run) => (await rebuild(run), 0),
  async check({ journals }) {
    let damaged = 0;
    for (const journal of journals) damaged += await check(journal, print);
    return damaged;
  },
  async repair({ journals, database }) {
    for (const journal of journals) await repair(journal, database, print);
    return 0;
  },
  list: listQuarantine,
  retry: retryQuarantine,
  history,
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
    settings: SettingsOf<"processor">;
  },
): Promise<number> {
  setEventTypes(settings.EVENT_TYPES);
  const journal = join(settings.DATA_DIR, JOURNAL_FILE);
  const journals = files.length > 0 ? files : [journal];
  // A rebuild corrects on a second connection.
  const database = openDatabase(ledgerUrl(settings), "processor", 2);
  try {
    const paths = [journal, ...files];
    return (await TOOLS[name]({ database, paths, files, journals, ...options, print, say })) > 0
      ? 1
      : 0;
  } catch (error) {
    if (!(error instanceof CannotProceed || error instanceof LedgerRefused)) throw error;
    sayLines(error.message);
    return 2;
  } finally {
    await database.close();
  }
}
