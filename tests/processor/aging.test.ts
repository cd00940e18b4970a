/**
 * What is deleted by age: only what has grown old on the ledger's own day, which no single reading of a
 * clock moves.
 */
import { expect, setDefaultTimeout, test } from "bun:test";

import { openPruning, readDay } from "../../lib/ledger/boundary.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { openAging } from "../../lib/processor/aging.ts";
import { openRetention } from "../../lib/processor/retention.ts";
import { event } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;

/**
 * A ledger whose database's clock can be moved: `now()` is replaced by a function of a schema that comes
 * before Postgres' own.
 */
async function openClock() {
  const ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "500" });
  const name = new URL(ledger.url).pathname.slice(1);
  const database = openDatabase(() => ledger.url, "test", 1);
  await readDay(database); // applies the schema
  await database.close();
  await ledger.select(`
    create schema clock;
    create table clock.ahead as select 0 as days;
    create function clock.now() returns timestamptz language plpgsql as $$
      begin return (select pg_catalog.now() + days * interval '1 day' from clock.ahead); end $$;
    alter database ${name} set search_path = clock, pg_catalog, public`);
  const faked = openDatabase(() => ledger.url, "test", 1);
  return {
    ledger,
    database: faked,
    /** Moves the database's clock to so many days from now. */
    async setClock(days: number) {
      await ledger.select(`update clock.ahead set days = ${days}`);
    },
    ids: async () =>
      (
        await ledger.select<{ id: string }>(
          "select convert_from(id, 'UTF8') as id from ids union all select id from event_ids order by id",
        )
      ).map((r) => r.id),
    async [Symbol.asyncDispose]() {
      await faked.close();
      await ledger.select(`
        alter database ${name} reset search_path;
        drop schema clock cascade`);
      await ledger[Symbol.asyncDispose]();
    },
  };
}

test("the ledger's day moves by one, after an hour in which it was due and nobody moved it", async () => {
  await using clock = await openClock();
  const { database, setClock } = clock;
  let ms = 0;
  const [one, other] = [openAging(database, () => ms), openAging(database, () => ms)];
  const { day: first } = await readDay(database);
  const moved = async () => {
    const { day } = await readDay(database);
    return (Date.parse(day) - Date.parse(first)) / (24 * HOUR);
  };
  /** Looks every minute for so long. */
  const pass = async (minutes: number, ages = [one, other]) => {
    for (let i = 0; i < minutes; i++, ms += MINUTE) for (const age of ages) await age();
  };
  await pass(70);
  expect(await moved()).toBe(0);
  await setClock(40);
  await pass(59);
  expect(await moved()).toBe(0);
  await setClock(0); // the clock was wrong for 59 minutes
  await pass(2);
  await setClock(40);
  await pass(59);
  expect(await moved()).toBe(0);
  await pass(2);
  expect(await moved()).toBe(1);
  await pass(59);
  expect(await moved()).toBe(1);
  await pass(2);
  expect(await moved()).toBe(2);
  await setClock(-40);
  await pass(120);
  expect(await moved()).toBe(2);
  // A gap, or a new process, begins the hour again.
  await setClock(40);
  await pass(50);
  ms += 20 * MINUTE;
  await pass(50);
  await pass(50, [openAging(database, () => ms)]);
  expect(await moved()).toBe(2);
});

test("ids are remembered while the database's clock is wrong, ahead or behind", async () => {
  await using clock = await openClock();
  const { ledger, database, setClock, ids } = clock;
  await using app = await ledger.start();
  const send = (user: string, id: string) => app.post(event(user, 1, { id }));
  await send("ann", "a");
  await untilBalance(app, "ann", "1");
  await ledger.select("insert into event_ids (id, event) values ('of 0.1.0', '')");
  await setClock(40);
  expect(await openPruning(database, 30)()).toBe(false);
  await send("ben", "b");
  await untilBalance(app, "ben", "1");
  await setClock(-40);
  await send("cid", "c");
  await untilBalance(app, "cid", "1");
  await setClock(0);
  expect(await openPruning(database, 30)()).toBe(false);
  expect(await ids()).toEqual(["a", "b", "c", "of 0.1.0"]);
  // Once the ledger's day has moved on, what is older than that goes.
  await ledger.select("update boundary set day = day + 31");
  expect(await openPruning(database, 30)()).toBe(false);
  expect(await ids()).toEqual(["b"]); // it was claimed while the clock was ahead
});

test("a segment is deleted when it has been posted for so many of the ledger's days, whatever its own time is", async () => {
  await using clock = await openClock();
  const { ledger, database, setClock } = clock;
  {
    await using app = await ledger.start();
    for (let i = 1; i <= 20; i++) {
      await app.post(event("ann"));
      await untilBalance(app, "ann", `${i}`);
    }
  }
  const { journal: path, dataDir } = ledger;
  const count = segmentNames(dataDir).length;
  expect(count).toBeGreaterThan(2);
  for (const name of segmentNames(dataDir))
    Bun.spawnSync(["touch", "-d", "1970-01-02", `${dataDir}/${name}`]);
  const deleteOld = async () =>
    (await Array.fromAsync(openRetention({ database, path, keepDays: 2 })())).length;
  expect(await deleteOld()).toBe(0);
  await setClock(40);
  expect(await deleteOld()).toBe(0);
  await setClock(-40);
  expect(await deleteOld()).toBe(0);
  await setClock(0);
  for (let day = 1; day <= 2; day++) {
    await ledger.select("update boundary set day = day + 1");
    expect(await deleteOld()).toBe(0);
  }
  await ledger.select("update boundary set day = day + 1");
  expect(await deleteOld()).toBe(count);
  expect((await ledger.tool(["--verify"])).code).toBe(0);
  expect(await ledger.select("select * from segments")).toEqual([]);
});
