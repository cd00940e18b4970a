/** Posting, where the driver does what it was seen to do: run statements outside their transaction. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { type Database, openDatabase, type Sql } from "../../lib/ledger/database.ts";
import { Fold } from "../../lib/processor/fold.ts";
import { openCheckpoint } from "../../lib/ledger/checkpoints.ts";
import { post } from "../../lib/ledger/ledger.ts";
import { balances, testDatabase } from "../support/postgres.ts";

setDefaultTimeout(30_000);

const TIMEOUT_MS = 10_000;

function batchOf(source: string) {
  const fold = new Fold(10);
  fold.add(Buffer.from('{"userId":"ann","name":"add_revenue","value":1}'), 0);
  fold.add(Buffer.from('{"userId":"bob","name":"add_revenue","value":2,"id":"b"}'), 50);
  return fold.batch(source, 0, 100, null);
}

/** A database whose transactions are none, and in which `between` happens once a row is locked. */
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
    return Object.assign(run, { begin: (work: (tx: unknown) => unknown) => work(run) });
  };
  return {
    ...database,
    use: (work, deadlineMs) =>
      database.use((sql) => work(stray(sql) as unknown as Sql), deadlineMs),
  };
}

test("a statement that runs outside its transaction, after somebody else has posted, changes nothing", async () => {
  await using own = await testDatabase();
  const database = openDatabase(() => own.url, "test", 4);
  await openCheckpoint(database, "file:a#1", null);
  const posted = () => post(database, batchOf("file:a#1"), TIMEOUT_MS);
  const late = post(strayDatabase(database, posted), batchOf("file:a#1"), TIMEOUT_MS);
  await expect(late).rejects.toThrow("division by zero");
  expect(await balances(own.url)).toEqual({ ann: "1", bob: "2" });
  await database.close();
});

test("the same batch, posted by many at once, counts once", async () => {
  await using own = await testDatabase();
  const database = openDatabase(() => own.url, "test", 8);
  await openCheckpoint(database, "file:a#1", null);
  const all = await Promise.all(
    Array.from({ length: 8 }, () => post(database, batchOf("file:a#1"), TIMEOUT_MS)),
  );
  expect(all.filter(({ state }) => state === "posted")).toHaveLength(1);
  expect(await balances(own.url)).toEqual({ ann: "1", bob: "2" });
  await database.close();
});
