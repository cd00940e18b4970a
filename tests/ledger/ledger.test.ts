/** Posting while the driver runs statements outside their transaction, as it was seen to do. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";

import { type Database, openDatabase, type Sql } from "../../lib/ledger/database.ts";
import { Fold } from "../../lib/processor/fold.ts";
import { fileKey, listLocked, openCheckpoint } from "../../lib/ledger/checkpoints.ts";
import { post } from "../../lib/ledger/ledger.ts";
import { event } from "../support/events.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { isInstalled, root } from "../support/programs.ts";

setDefaultTimeout(30_000);

const TIMEOUT_MS = 10_000;
const KEY = fileKey("a", 1);

function batch() {
  const fold = new Fold(10);
  fold.add(Buffer.from(event("ann")), 0);
  fold.add(Buffer.from(event("bob", 2, { id: "b" })), 50);
  return fold.batch({ key: KEY, from: 0, to: 100, digest: null });
}

/** A database with a checkpoint at 0, and its balances. */
async function openLedger(connections: number) {
  const own = await testDatabase();
  const database = openDatabase(() => own.url, "test", connections);
  await openCheckpoint(database, KEY, null);
  return {
    url: own.url,
    database,
    post: (through = database) => post(through, batch(), TIMEOUT_MS),
    balances: () => balances(own.url),
    async [Symbol.asyncDispose]() {
      await database.close();
      await own.drop();
    },
  };
}

/** A database without transactions, in which `between` runs once a row is locked. */
function strayDatabase(database: Database, between: () => Promise<unknown>): Database {
  const stray = (sql: Sql) => {
    const run = (strings: TemplateStringsArray, ...values: never[]) => {
      const query = sql(strings, ...values);
      if (!strings.join("").includes("where source = ") || !strings.join("").includes("for update"))
        return query;
      return query.then(async (rows) => {
        await between();
        return rows;
      });
    };
    const begin = (_options: string, work: (tx: unknown) => unknown) => work(run);
    return Object.assign(run, { begin, unsafe: sql.unsafe });
  };
  return {
    ...database,
    use: (work, deadlineMs) =>
      database.use((sql) => work(stray(sql) as unknown as Sql), deadlineMs),
  };
}

test("a statement that runs outside its transaction, after another has posted the batch, changes nothing", async () => {
  await using ledger = await openLedger(4);
  const late = ledger.post(strayDatabase(ledger.database, () => ledger.post()));
  expect(await late).toEqual({ state: "elsewhere" });
  expect(await ledger.balances()).toEqual({ ann: "1", bob: "2" });
});

test("a batch that several posters post at once counts once", async () => {
  await using ledger = await openLedger(8);
  const all = await Promise.all(Array.from({ length: 8 }, () => ledger.post()));
  expect(all.filter(({ state }) => state === "posted")).toHaveLength(1);
  expect(await ledger.balances()).toEqual({ ann: "1", bob: "2" });
});

test("a batch whose checkpoint another transaction holds is left to it, and nobody waits", async () => {
  await using ledger = await openLedger(1);
  await using other = connectTest(ledger.url);
  await other.begin(async (tx) => {
    await tx`select from checkpoints where source = ${KEY} for update`;
    expect(await ledger.post()).toEqual({ state: "elsewhere" });
    expect(await listLocked(ledger.database, [KEY, fileKey("b", 1)])).toEqual([KEY]);
  });
  expect(await listLocked(ledger.database, [KEY])).toEqual([]);
  expect(await ledger.post()).toMatchObject({ state: "posted" });
});

test.if(isInstalled("psql"))("the example at the end of post.sql runs in psql", async () => {
  await using ledger = await openLedger(1);
  const file = await Bun.file(join(root, "lib/ledger/post.sql")).text();
  const [, call = ""] = /^-- A call.*\n(?:-- .*:\n)?([^]*)$/m.exec(file) ?? [];
  const script = call.replace(/^-- /gm, "").replace("rollback", "commit");
  const psql = Bun.spawn(["psql", "-XqAt", "-v", "ON_ERROR_STOP=1", ledger.url], {
    cwd: root,
    stdio: [Buffer.from(script), "pipe", "pipe"],
  });
  const [stdout, stderr] = await Promise.all([
    new Response(psql.stdout).text(),
    new Response(psql.stderr).text(),
  ]);
  expect({ stderr, stdout }).toEqual({ stderr: "", stdout: expect.stringContaining("ann|17.5\n") });
  await using sql = connectTest(ledger.url);
  const rows = await sql`select source, position::int, reason from quarantine order by position`;
  expect([...rows]).toEqual([
    { source: "file:a.jsonl#1", position: 100, reason: "not JSON" },
    { source: "file:a.jsonl#1", position: 170, reason: expect.stringContaining("another event") },
  ]);
});
