/** A ledger, a data directory, and the programs that share both. */
import { mkdirSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";

import { LedgerRefused, openDatabase } from "../../lib/ledger/database.ts";
import { balances, select, testDatabase } from "./postgres.ts";
import { run, spawn, startApp, tempDir } from "./programs.ts";

/**
 * An empty database and an empty folder. `settings` are passed to every program that is started here;
 * `more` are those of one program.
 */
export async function openLedger(settings: Record<string, string> = {}) {
  const database = await testDatabase();
  const folder = tempDir();
  const dataDir = folder.file("data");
  const env = { DATA_DIR: dataDir, DATABASE_URL: database.url, ...settings };
  return {
    url: database.url,
    dataDir,
    /** The settings of all programs. */
    env,
    /** The active file of the journal. */
    journal: `${dataDir}/eventsPost.jsonl`,
    /** A path in the folder, beside the data directory. */
    file: folder.file,
    /** Writes a file into the folder, and returns its path. */
    write(name: string, content: string | Uint8Array): string {
      const path = folder.file(name);
      mkdirSync(dirname(path), { recursive: true });
      writeFileSync(path, content);
      return path;
    },
    /** Starts `app.ts`, and returns when it listens. */
    start: (more: Record<string, string> = {}, args: string[] = []) =>
      startApp({ dataDir, databaseUrl: database.url, args, env: { ...env, ...more } }),
    /** Starts `processor.ts`. */
    process: (args: string[] = [], more: Record<string, string> = {}) =>
      spawn("processor.ts", { args, env: { ...env, ...more } }),
    /** Runs `processor.ts` to its end. */
    tool: (args: string[], more: Record<string, string> = {}) =>
      run("processor.ts", { args, env: { ...env, ...more } }),
    select: <Row>(query: string) => select<Row>(database.url, query),
    balances: () => balances(database.url),
    /** The quarantined lines, in the order of their positions. */
    quarantine: () =>
      select<{ source: string; position: number; reason: string; line: string }>(
        database.url,
        "select source, position::int, reason, line from quarantine order by source, position",
      ),
    /** How many lines are in quarantine, whole or by their positions. */
    async countQuarantined(): Promise<number> {
      const [row] = await select<{ count: number }>(
        database.url,
        `select ((select count(*) from quarantine) +
           (select coalesce(sum(cardinality(positions)), 0) from packed_quarantine))::int as count`,
      );
      return row?.count ?? 0;
    },
    async [Symbol.asyncDispose]() {
      folder[Symbol.dispose]();
      await database.drop();
    },
  };
}

/** What happens when a program opens the ledger at `url`: "used", or why it is refused. */
export async function tryLedger(url: string): Promise<string> {
  const database = openDatabase(() => url, "test", 1);
  try {
    await database.use(async () => {});
    return "used";
  } catch (error) {
    if (!(error instanceof LedgerRefused)) throw error;
    return error.message;
  } finally {
    await database.close();
  }
}
