/** Tables that could not hold exact balances, and databases that could not hold every user, are refused. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { event, line } from "../support/events.ts";
import { openLedger, tryLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import { connectTest, testDatabase } from "../support/postgres.ts";
import { run, tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const TABLE = "create table users_revenue (user_id text primary key, revenue numeric not null)";
const TO_INTEGER = "alter table users_revenue alter column revenue type integer";
const TO_NUMERIC = "alter table users_revenue alter column revenue type numeric";
const INSENSITIVE =
  "create collation insensitive (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";

const table = (columns: string) => [`create table users_revenue (${columns})`];

test.each<[string, string[], RegExp]>([
  ["an integer", table("user_id text primary key, revenue integer not null"), /revenue is integer/],
  [
    "the table of a small project",
    table("user_id varchar(50), revenue integer"),
    /user_id is character varying\(50\).* revenue is integer/,
  ],
  [
    "numeric(10,2)",
    table("user_id text primary key, revenue numeric(10,2) not null"),
    /revenue is numeric\(10,2\)/,
  ],
  ["float8", table("user_id text primary key, revenue float8 not null"), /double precision/],
  ["money", table("user_id text primary key, revenue money not null"), /revenue is money/],
  ["text", table("user_id text primary key, revenue text not null"), /revenue is text/],
  [
    "a domain that limits, below another",
    [
      "create domain cents as numeric(12,2)",
      "create domain price as cents",
      ...table("user_id text primary key, revenue price not null"),
    ],
    /revenue is price/,
  ],
  ["null", table("user_id text primary key, revenue numeric"), /revenue may be null/],
  [
    "a generated column",
    table("user_id text primary key, revenue numeric not null generated always as (1) stored"),
    /revenue is generated/,
  ],
  [
    "char",
    table("user_id char(20) primary key, revenue numeric not null"),
    /user_id is character\(/,
  ],
  ["uuid", table("user_id uuid primary key, revenue numeric not null"), /user_id is uuid/],
  ["no key", table("user_id text not null, revenue numeric not null"), /no unique key/],
  [
    "a partial key",
    [
      ...table("user_id text not null, revenue numeric not null"),
      "create unique index on users_revenue (user_id) where revenue > 0",
    ],
    /no unique key/,
  ],
  [
    "a key of an expression",
    [
      ...table("user_id text not null, revenue numeric not null"),
      "create unique index on users_revenue (lower(user_id))",
    ],
    /no unique key/,
  ],
  [
    "a deferrable key",
    table("user_id text primary key deferrable, revenue numeric not null"),
    /no unique key/,
  ],
  [
    "a key with another column, which must be given",
    table("tenant text, user_id text, revenue numeric not null, primary key (tenant, user_id)"),
    /no unique key.*tenant must be given/,
  ],
  [
    "a collation by which different users are equal",
    [
      INSENSITIVE,
      ...table("user_id text collate insensitive primary key, revenue numeric not null"),
    ],
    /user_id has the collation insensitive/,
  ],
  [
    "such a collation of an index",
    [INSENSITIVE, TABLE, "create unique index on users_revenue (user_id collate insensitive)"],
    /unique index .* non-deterministic/,
  ],
  [
    "a view",
    ["create table t (user_id text, revenue numeric)", "create view users_revenue as table t"],
    /is a view/,
  ],
  [
    "a materialized view",
    ["create materialized view users_revenue as select 'a' as user_id, 1 as revenue"],
    /is a materialized view/,
  ],
  ["an unlogged table", [TABLE, "alter table users_revenue set unlogged"], /is unlogged/],
  [
    "an unlogged partition",
    [
      `${TABLE} partition by hash (user_id)`,
      "create unlogged table part partition of users_revenue for values with (modulus 1, remainder 0)",
    ],
    /the partition part .* unlogged/,
  ],
  [
    "a child table",
    [TABLE, "create table child () inherits (users_revenue)"],
    /child inherits from users_revenue/,
  ],
  [
    "a rule",
    [TABLE, "create rule hide as on update to users_revenue do instead nothing"],
    /the rule hide/,
  ],
  [
    "another's table of checkpoints",
    ["create table checkpoints (id int primary key)"],
    /no column/,
  ],
  [
    "another's table of snapshots",
    ["create table snapshots (source text, user_id text, revenue numeric)"],
    /snapshots cannot be used: no unique key of \(source, user_id\)/,
  ],
  [
    "another's table of ids",
    ["create table event_ids (id bigint primary key, event text, claimed_on date)"],
    /event_ids cannot be used: id is bigint/,
  ],
  [
    "an unlogged table of checkpoints",
    [
      "create unlogged table checkpoints (source text primary key, position bigint not null, digest text, moved_at timestamptz not null default now())",
    ],
    /checkpoints is unlogged/,
  ],
])(
  "%s is refused, nothing is created, and the statement it names makes it usable",
  async (_, statements, found) => {
    await using own = await testDatabase();
    await using sql = connectTest(own.url);
    for (const statement of statements) await sql.unsafe(statement);
    const tables = () =>
      sql`select relname from pg_class where relnamespace = 'public'::regnamespace`;
    const before = await tables();
    const message = await tryLedger(own.url);
    expect(message).toMatch(found);
    expect(message).not.toContain("\n");
    expect([...(await tables())]).toEqual([...before]);
    const [, remedy = ""] = /\. Run: (.*)$/.exec(message) ?? [];
    await sql.unsafe(remedy);
    expect(await tryLedger(own.url)).toBe("used");
  },
);

test.each([
  [
    "a unique constraint instead of a primary key",
    "user_id text not null unique, revenue numeric not null",
  ],
  ["varchar without a limit", "user_id varchar primary key, revenue numeric not null"],
  [
    "another deterministic collation",
    'user_id text collate "en-x-icu" primary key, revenue numeric not null',
  ],
  [
    "columns of a team's own",
    "id serial primary key, user_id text not null unique, revenue numeric not null, note text, at timestamptz not null default now()",
  ],
])("%s is accepted, and balances are exact", async (_, columns) => {
  await using ledger = await openLedger();
  await ledger.select(`create table users_revenue (${columns})`);
  const users = ["a", "A", "ä", "Z", "a ", "😀"];
  const file = ledger.write("a.jsonl", users.map((user, i) => line(user, `${i}.5`)).join(""));
  expect((await ledger.tool([file])).code).toBe(0);
  const rows = await ledger.select<{ user_id: string; revenue: string }>(
    "select user_id, revenue from users_revenue",
  );
  expect(new Map(rows.map((row) => [row.user_id, Number(row.revenue)]))).toEqual(
    new Map(users.map((user, i) => [user, i + 0.5])),
  );
});

test("partitions by hash are accepted, and balances are exact", async () => {
  await using ledger = await openLedger();
  await ledger.select(`${TABLE} partition by hash (user_id)`);
  for (const part of [0, 1, 2])
    await ledger.select(
      `create table part${part} partition of users_revenue for values with (modulus 3, remainder ${part})`,
    );
  const users = Array.from({ length: 50 }, (_, i) => `user${i}`);
  const file = ledger.write("a.jsonl", users.map((user) => line(user, 0.1).repeat(3)).join(""));
  expect((await ledger.tool([file])).code).toBe(0);
  expect(await ledger.balances()).toEqual(Object.fromEntries(users.map((user) => [user, "0.3"])));
});

test("every program ends with 2 and one message, and changes nothing", async () => {
  await using ledger = await openLedger();
  await ledger.select("create table users_revenue (user_id varchar(50), revenue integer)");
  const file = ledger.write("a.jsonl", line("ann", 1.5));
  const app = await run("app.ts", { env: ledger.env });
  expect(app).toMatchObject({ code: 2, stdout: "" });
  expect(app.stderr).toContain("Run: alter table users_revenue alter column");
  expect(app.stderr.trimEnd().split("\n")).toHaveLength(1);
  expect((await run("app.ts", { env: ledger.env, args: ["--no-processor"] })).code).toBe(2);
  for (const args of [[], [file], ["--verify"], ["--rebuild"], ["--quarantine"]]) {
    const { code, stderr } = await ledger.tool(args);
    expect(code, `${args}: ${stderr}`).toBe(2);
    expect(stderr.split("Run: alter table users_revenue")).toHaveLength(2);
  }
  expect(await ledger.select("select to_regclass('checkpoints') as found")).toEqual([
    { found: null },
  ]);
});

test.each(["LATIN1", "SQL_ASCII"])(
  "a database with encoding %s is refused with the way to another",
  async (encoding) => {
    await using own = await testDatabase();
    await using sql = connectTest(own.url);
    const name = `${own.name}_${encoding.toLowerCase()}`;
    await sql.unsafe(
      `create database ${name} encoding '${encoding}' template template0 lc_collate 'C' lc_ctype 'C'`,
    );
    const url = new URL(own.url);
    url.pathname = `/${name}`;
    using dir = tempDir();
    const { code, stderr } = await run("app.ts", {
      env: { DATA_DIR: dir.file("data"), DATABASE_URL: url.href },
    });
    await sql.unsafe(`drop database ${name}`);
    expect(stderr).toContain(`encoding ${encoding}`);
    expect(stderr).toContain("createdb --encoding=UTF8 --template=template0");
    expect(code).toBe(2);
  },
);

test("row-level security that may hide rows is refused, also of the program's own tables", async () => {
  await using own = await testDatabase();
  await using sql = connectTest(own.url);
  expect(await tryLedger(own.url)).toBe("used");
  const role = `${own.name}_role`;
  await sql.unsafe(`
    create role ${role} login password 'p'; grant usage on schema public to ${role};
    grant select, insert, update, delete on all tables in schema public to ${role}`);
  const url = new URL(own.url);
  url.username = role;
  url.password = "p";
  try {
    for (const name of ["users_revenue", "checkpoints"]) {
      await sql.unsafe(`alter table ${name} enable row level security`);
      const [, remedy = ""] = /Run: (.*) \(or: .*\)$/.exec(await tryLedger(url.href)) ?? [];
      expect(remedy).toBe(`alter table ${name} disable row level security`);
      await sql.unsafe(remedy);
    }
    expect(await tryLedger(url.href)).toBe("used");
  } finally {
    await sql.unsafe(`drop owned by ${role}; drop role ${role}`);
  }
});

/** A gauge of a server. */
async function gauge(url: string, name: string): Promise<number> {
  const text = await (await fetch(`${url}/metrics`)).text();
  return Number(new RegExp(`^${name} (.*)$`, "m").exec(text)?.[1]);
}

test("a table that is altered while a server runs takes no rounded amount: posting pauses, says why, and resumes", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await app.post(event("ann", 1));
  await untilBalance(app, "ann", "1");
  await ledger.select(TO_INTEGER);
  expect((await app.post(event("ann", 1.5))).status).toBe(201);
  await until(() => app.stderr.text().includes("revenue is integer instead of numeric"));
  await until(async () => (await gauge(app.url, "daybook_posting_paused")) === 1);
  await until(async () => (await gauge(app.url, "daybook_posting_lag_bytes")) > 0);
  expect(await ledger.balances()).toEqual({ ann: "1" });
  expect((await app.post(event("ben", 0.5))).status).toBe(201);
  await ledger.select(TO_NUMERIC);
  await untilBalance(app, "ann", "2.5");
  await untilBalance(app, "ben", "0.5");
  await until(async () => (await gauge(app.url, "daybook_posting_paused")) === 0);
  expect(app.stderr.text().match(/posting again/g)).toHaveLength(1);
  expect(app.stderr.text().match(/waiting; database: users_revenue/g)).toHaveLength(1);
});

test.each([
  ["loses its key", "drop constraint users_revenue_pkey", "no unique key"],
  [
    "gets a column that must be given",
    "add column tenant text not null default '', alter column revenue set default 0; alter table users_revenue alter column tenant drop default",
    "tenant must be given",
  ],
  ["becomes unlogged", "set unlogged", "is unlogged"],
])("posting pauses and quarantines nothing when a table %s", async (_, alteration, found) => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await app.post(event("ann", 1));
  await untilBalance(app, "ann", "1");
  await ledger.select(`alter table users_revenue ${alteration}`);
  await app.post(event("ben", 2));
  const [, remedy = ""] = await until(() =>
    new RegExp(`${found}.* Run: (alter table [^"\\\\]*)`).exec(app.stderr.text()),
  );
  expect(await ledger.quarantine()).toEqual([]);
  await ledger.select(remedy);
  await untilBalance(app, "ben", "2");
  expect(await ledger.quarantine()).toEqual([]);
});

test.each(["read committed", "repeatable read"])(
  "a posting that waits for an alteration to commit sees it, also where %s is the default",
  async (isolation) => {
    await using ledger = await openLedger();
    const { pathname } = new URL(ledger.url);
    const setDefault = (level: string) =>
      ledger.select(
        `alter database ${pathname.slice(1)} set default_transaction_isolation = '${level}'`,
      );
    await using stack = new AsyncDisposableStack(); // other tests use the database again
    stack.defer(() => setDefault("read committed").then(() => {}));
    await setDefault(isolation);
    await using app = await ledger.start();
    await app.post(event("ann", 1));
    await untilBalance(app, "ann", "1");
    await using sql = connectTest(ledger.url);
    await sql.begin(async (tx) => {
      await tx.unsafe(TO_INTEGER);
      await app.post(event("ben", 1.5));
      await until(async () => {
        const [row] = await ledger.select<{ waiting: string }>(
          "select count(*) as waiting from pg_locks where relation = 'users_revenue'::regclass and not granted",
        );
        return row?.waiting !== "0";
      });
    });
    await until(() => app.stderr.text().includes("revenue is integer instead of numeric"));
    await ledger.select(TO_NUMERIC);
    await untilBalance(app, "ben", "1.5");
  },
);

test("a ledger that turns out to be inexact after a start without a database pauses posting only", async () => {
  await using ledger = await openLedger();
  await ledger.select(
    "create table users_revenue (user_id text primary key, revenue integer not null)",
  );
  await using proxy = await openProxy(ledger.url);
  proxy.cut();
  await using app = await ledger.start({ DATABASE_URL: proxy.url });
  expect((await app.post(event("ann", 1.5))).status).toBe(201);
  proxy.mend();
  await until(() => app.stderr.text().includes("revenue is integer instead of numeric"));
  expect((await app.post(event("ann", 1.5))).status).toBe(201);
  await until(async () => (await gauge(app.url, "daybook_posting_paused")) === 1);
  await ledger.select(TO_NUMERIC);
  await untilBalance(app, "ann", "3");
  await until(async () => (await gauge(app.url, "daybook_posting_paused")) === 0);
});

test("a ledger that a newer program upgrades meanwhile stops this one, and is named", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await app.post(event("ann", 1));
  await untilBalance(app, "ann", "1");
  await ledger.select("update ledger_version set version = version + 1");
  expect((await app.post(event("ann", 1))).status).toBe(201);
  await until(() => /the ledger has version \d+, and this program knows/.test(app.stderr.text()));
  expect(await ledger.balances()).toEqual({ ann: "1" });
  expect((await ledger.tool(["--verify"])).code).toBe(2);
});
