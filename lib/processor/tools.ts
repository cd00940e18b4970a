/**
 * What an operator asks of `processor.ts` instead of posting: to look, or to mend. Loaded only then:
 * with it `processor.ts` itself took a third longer to load.
 */
import { join } from "node:path";

import { rebuild, verify } from "./verify.ts";
import { check, repair } from "./check.ts";
import { ledgerUrl } from "../postgres/cluster.ts";
import { type Database, openDatabase, CannotProceed } from "../ledger/database.ts";
import type { SettingsOf } from "../config.ts";
import { setEventTypes } from "../event/event.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { listQuarantine, retryQuarantine } from "./quarantine.ts";

export type ToolName = "verify" | "rebuild" | "check" | "repair" | "list" | "retry";

interface Parts {
  database: Database;
  /** All that was given, and the journal in DATA_DIR. */
  paths: string[];
  /** What was given, or else the journal in DATA_DIR. */
  journals: string[];
  /** --yes */
  yes: boolean;
}

/** Each answers the exit code: 0, or 1 where something differs, is damaged or is set aside. */
const TOOLS: Record<ToolName, (parts: Parts) => Promise<number>> = {
  verify: async ({ database, paths }) => Math.min(1, await verify(database, paths, print, say)),
  async rebuild({ database, paths, yes }) {
    await rebuild(database, paths, yes, print, say);
    return 0;
  },
  async check({ journals }) {
    let damaged = 0;
    for (const journal of journals) damaged += await check(journal, print);
    return Math.min(1, damaged);
  },
  async repair({ database, journals }) {
    for (const journal of journals) await repair(journal, database, print);
    return 0;
  },
  list: async ({ database }) => Math.min(1, await listQuarantine(database, print)),
  retry: async ({ database, paths }) =>
    Math.min(1, await retryQuarantine(database, paths, print, say)),
};

/** Returns the exit code; 2 where the tool refuses, which is said. */
export async function runTool(
  name: ToolName,
  { files, yes, settings }: { files: string[]; yes: boolean; settings: SettingsOf<"processor"> },
): Promise<number> {
  const { DATA_DIR: dataDir, DATABASE_URL: databaseUrl, EVENT_TYPES: eventTypes } = settings;
  setEventTypes(eventTypes);
  const journal = join(dataDir, JOURNAL_FILE);
  const database = openDatabase(ledgerUrl(dataDir, databaseUrl ?? null), "processor", 1);
  try {
    const journals = files.length > 0 ? files : [journal];
    return await TOOLS[name]({ database, journals, paths: [journal, ...files], yes });
  } catch (error) {
    if (!(error instanceof CannotProceed)) throw error;
    say(error.message);
    return 2;
  } finally {
    await database.close();
  }
}

function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

function print(line: string): void {
  process.stdout.write(`${line}\n`);
}
