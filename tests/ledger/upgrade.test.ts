/** schema.sql: ledgers of every version become today's, and one that is newer is refused. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { LEDGER_VERSION } from "../../lib/ledger/database.ts";
import { tryLedger } from "../support/ledger.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { root } from "../support/programs.ts";

setDefaultTimeout(30_000);

const SCHEMA = readFileSync(join(root, "schema.sql"), "utf8");
const FIXTURE = readFileSync(join(root, "tests/fixtures/0.1.0/ledger.sql"), "utf8");

/** A database with the ledger of 0.1.0, or an empty one. */
async function openOld(content = FIXTURE) {
  const own = await testDatabase();
  const sql = connectTest(own.url);
  await sql.unsafe(content);
  return {
    url: own.url,
    sql,
    async [Symbol.asyncDispose]() {
      await sql.end({ timeout: 1 });
      await own.drop();
    },
  };
}

/** A role that may use what is there, but create nothing; and the URL at which it connects. */
async function createReaderWriter({
  sql,
  url,
}: {
  sql: ReturnType<typeof connectTest>;
  url: string;
}) {
  const name = `daybook_test_${crypto.randomUUID().replaceAll("-", "")}`;
  await sql.unsafe(`
    create role ${name} login password 'p';
    revoke create on schema public from public;
    grant usage on schema public to ${name};
    grant select, insert, update, delete on all tables in schema public to ${name}`);
  const its = new URL(url);
  its.username = name;
  its.password = "p";
  return {
    url: its.href,
    async [Symbol.asyncDispose]() {
      await sql.unsafe(`drop owned by ${name}; drop role ${name}`);
    },
  };
}

test("a ledger of 0.1.0 is upgraded by several at once, keeps its balances, and stays as it is", async () => {
  await using old = await openOld();
  const before = await balances(old.url);
  expect(await Promise.all(Array.from({ length: 6 }, () => tryLedger(old.url)))).toEqual(
    Array(6).fill("used"),
  );
  await using other = connectTest(old.url);
  await Promise.all([old.sql.unsafe(SCHEMA), other.unsafe(SCHEMA)]);
  expect(await balances(old.url)).toEqual(before);
  expect(Object.keys(before)).toHaveLength(49);
  const versions = await old.sql`select version from ledger_version`;
  expect([...versions]).toEqual([{ version: LEDGER_VERSION }]);
  const names = await old.sql`
    select attname as name, attcollation::regcollation::text as collation from pg_attribute
    where attrelid = 'checkpoints'::regclass and attnum > 0 order by attnum`;
  expect([...names].map(({ name }) => name)).toEqual([
    "source",
    "position",
    "digest",
    "moved_at",
    "points_from",
  ]);
  // The order of "C" never changes, so no library can hide the row of a journal.
  expect(names[0]?.["collation"]).toBe('"C"');
});

test("functions of an earlier version are replaced", async () => {
  await using old = await openOld(
    `${FIXTURE};
     create function daybook_refused_balances(users text[], out tried int, out why text)
     language sql as 'select 7, null::text'`,
  );
  expect(await tryLedger(old.url)).toBe("used");
  const [row] = await old.sql`select tried from daybook_refused_balances('{}')`;
  expect(row?.["tried"]).not.toBe(7);
});

test("a newer ledger is refused by its version, and left as it is", async () => {
  await using ledger = await openOld("select 1");
  expect(await tryLedger(ledger.url)).toBe("used");
  await ledger.sql`update ledger_version set version = ${LEDGER_VERSION + 1}`;
  await ledger.sql`drop table removed`;
  expect(await tryLedger(ledger.url)).toContain(`the ledger has version ${LEDGER_VERSION + 1}`);
  const [row] = await ledger.sql`select to_regclass('removed') is null as missing`;
  expect(row?.["missing"]).toBe(true);
});

test("a table that is missing from a ledger is named, and not made again, empty", async () => {
  await using ledger = await openOld("select 1");
  expect(await tryLedger(ledger.url)).toBe("used");
  await ledger.sql`alter table checkpoints rename to moved_away`;
  expect(await tryLedger(ledger.url)).toContain("the table checkpoints of this ledger is missing");
  await ledger.sql`alter table moved_away rename to checkpoints`;
  expect(await tryLedger(ledger.url)).toBe("used");
});

test("a role that may not create gets the command for the owner of an older ledger, and uses today's", async () => {
  await using old = await openOld();
  await using role = await createReaderWriter(old);
  expect(await tryLedger(role.url)).toContain(
    'Run, as the owner of the ledger: psql "$DATABASE_URL" -f',
  );
  const [row] = await old.sql`select to_regclass('ledger_version') is null as missing`;
  expect(row?.["missing"]).toBe(true);
  await old.sql.unsafe(SCHEMA);
  expect(await tryLedger(role.url)).toBe("used");
});

test("an empty database in which a role may not create is refused with the same command", async () => {
  await using empty = await openOld("select 1");
  await using role = await createReaderWriter(empty);
  expect(await tryLedger(role.url)).toContain('psql "$DATABASE_URL" -f schema.sql');
});

test("programs and schema.sql agree on the version", () => {
  expect(SCHEMA).toContain(`this_version constant int := ${LEDGER_VERSION};`);
});
