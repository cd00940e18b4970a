/** Postgres refuses what a row contains: constraints, domains, foreign keys and triggers of a team's own. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { NOT_A_ROW } from "../../lib/ledger/database.ts";
import { openLedger } from "../support/ledger.ts";
import { root, until } from "../support/programs.ts";

setDefaultTimeout(120_000);

const event = (userId: string, value: number, id?: string) =>
  `${JSON.stringify({ userId, name: "add_revenue", value, ...(id ? { id } : {}) })}\n`;

/** A ledger with the tables, altered by `statements`. */
async function openAltered(...statements: string[]) {
  const ledger = await openLedger();
  await ledger.tool([ledger.write("none.jsonl", event("first", 1))]);
  for (const statement of statements) await ledger.select(statement);
  return ledger;
}

const RAISING = (scope: "row" | "statement", condition: string, sqlstate = "P0001") => [
  `create function raising() returns trigger language plpgsql as $$ begin
     if ${condition} then raise exception 'closed' using errcode = '${sqlstate}'; end if;
     return ${scope === "row" ? "new" : "null"};
   end $$`,
  `create trigger raising before insert or update on users_revenue for each ${scope} execute function raising()`,
];

const SKIPPING = (condition: string) => [
  `create function skipping() returns trigger language plpgsql as $$ begin
     if ${condition} then return null; end if;
     return new;
   end $$`,
  `create trigger skipping before insert or update on users_revenue for each row execute function skipping()`,
];

test.each<[string, string[], string]>([
  [
    "a check constraint",
    ["alter table users_revenue add constraint not_negative check (revenue >= 0)"],
    "not_negative",
  ],
  [
    "a domain",
    [
      "create domain positive as numeric check (value >= 0)",
      "alter table users_revenue alter column revenue type positive",
    ],
    "positive",
  ],
  [
    "a foreign key",
    [
      "create table people (id text primary key)",
      "insert into people values ('first'), ('ann'), ('ben')",
      "alter table users_revenue add constraint people_fk foreign key (user_id) references people",
    ],
    "people_fk",
  ],
  [
    "a deferred foreign key",
    [
      "create table people (id text primary key)",
      "insert into people values ('first'), ('ann'), ('ben')",
      "alter table users_revenue add constraint people_fk foreign key (user_id) references people initially deferred deferrable",
    ],
    "people_fk",
  ],
  ["a trigger that raises for one user", RAISING("row", "new.user_id = 'bad'"), "closed"],
  ["a trigger that raises a data error", RAISING("row", "new.user_id = 'bad'", "22003"), "closed"],
  [
    "a trigger that raises a code of its own",
    RAISING("row", "new.user_id = 'bad'", "AC001"),
    "closed",
  ],
  ["a trigger that skips the row", SKIPPING("new.user_id = 'bad'"), "skips the row"],
  [
    "a unique index over several users",
    ["create unique index only_one on users_revenue (replace(user_id, 'bad', 'ann'))"],
    "only_one",
  ],
  ["a trigger that finds no row", RAISING("row", "new.user_id = 'bad'", "P0002"), "closed"],
])(
  "lines that %s refuses are quarantined with Postgres' reason, all others are posted, and --verify agrees",
  async (_, statements, reason) => {
    await using ledger = await openAltered(...statements);
    const file = ledger.write(
      "events.jsonl",
      event("ann", 5) + event("bad", -1) + event("ben", 7, "id1") + event("bad", -2, "id2"),
    );
    const { code, stderr } = await ledger.tool([file]);
    expect({ code, stderr }).toEqual({ code: 1, stderr: "" });
    expect(await ledger.balances()).toEqual({ ann: "5", ben: "7", first: "1" });
    const quarantined = await ledger.quarantine();
    expect(quarantined.map(({ line }) => JSON.parse(line).value)).toEqual([-1, -2]);
    for (const each of quarantined) expect(each.reason).toContain(reason);
    const none = ledger.file("none.jsonl");
    expect((await ledger.tool(["--verify", file, none])).code).toBe(0);
    expect(await ledger.select("select convert_from(id, 'UTF8') as id from ids")).toEqual([
      { id: "id1" },
    ]);
  },
);

test("programs and schema.sql agree on which errors concern a row", async () => {
  const schema = await Bun.file(`${root}/schema.sql`).text();
  expect(schema).toContain(`state !~ '${NOT_A_ROW.source}'`);
  await using ledger = await openAltered();
  const states = ["22003", "23505", "44000", "P0001", "P0004", "AC001", "09000", "27000"];
  const others = ["08006", "25006", "40001", "53100", "57014", "42501", "58030", "XX000", "DB001"];
  const rows = await ledger.select<{ state: string; is: boolean }>(
    `select state, daybook_is_refusal(state) as is from unnest('{${[...states, ...others]}}'::text[]) as state`,
  );
  expect(rows.filter(({ is }) => is).map(({ state }) => state)).toEqual(states);
});

test("a follower posts what others send while one user's events are refused", async () => {
  await using ledger = await openAltered(
    "alter table users_revenue add constraint not_negative check (revenue >= 0)",
  );
  await using app = await ledger.start();
  expect((await app.post(event("bad", -1).trim())).status).toBe(201);
  expect((await app.post(event("ann", 2).trim())).status).toBe(201);
  expect(await until(() => app.balance("ann"))).toBe("2");
  expect(await ledger.quarantine()).toHaveLength(1);
});

test("of a user's lines only those are refused that do not fit on those before them", async () => {
  await using ledger = await openAltered(
    "alter table users_revenue add constraint not_negative check (revenue >= 0)",
  );
  const values = [-5, 10, -3, -20, 1];
  const file = ledger.write("a.jsonl", values.map((value) => event("ann", value)).join(""));
  expect((await ledger.tool([file])).code).toBe(1);
  expect(await ledger.balances()).toMatchObject({ ann: "8" });
  expect((await ledger.quarantine()).map(({ line }) => JSON.parse(line).value)).toEqual([-5, -20]);
});

test("a refused event claims no id, and is quarantined wherever it is repeated; another one may claim it", async () => {
  await using ledger = await openAltered(
    "alter table users_revenue add constraint not_negative check (revenue >= 0)",
  );
  const lines = [event("ann", -1, "x"), event("ann", -1, "x"), event("ben", 3, "x")];
  const file = ledger.write("a.jsonl", lines.join(""));
  expect((await ledger.tool([file])).code).toBe(1);
  expect(await ledger.balances()).toEqual({ ben: "3", first: "1" });
  expect(await ledger.quarantine()).toHaveLength(2);
});

test("1,000 culprits among 100,000 events are found, and every other event is posted", async () => {
  await using ledger = await openAltered(
    "alter table users_revenue add constraint not_negative check (revenue >= 0)",
  );
  const lines = Array.from({ length: 100_000 }, (_, i) =>
    event(`user${i}`, i % 100 === 0 ? -1 : 1),
  );
  const { stdout } = await ledger.tool([ledger.write("a.jsonl", lines.join(""))]);
  expect(stdout).toContain("(1000 lines quarantined)");
  const [row] = await ledger.select<{ users: number; revenue: string }>(
    "select count(*)::int as users, sum(revenue)::text as revenue from users_revenue",
  );
  expect(row).toEqual({ users: 99_001, revenue: "99001" });
});

test("one line is found among 100,000 of one user", async () => {
  await using ledger = await openAltered(...RAISING("row", "new.revenue = 50000.5"));
  const lines = Array.from({ length: 100_000 }, (_, i) => event("ann", i === 49_999 ? 1.5 : 1));
  await ledger.select("drop trigger raising on users_revenue");
  await ledger.select(
    "alter table users_revenue add constraint whole check (revenue = trunc(revenue))",
  );
  expect((await ledger.tool([ledger.write("a.jsonl", lines.join(""))])).code).toBe(1);
  expect(await ledger.balances()).toMatchObject({ ann: "99999" });
  expect(await ledger.quarantine()).toHaveLength(1);
});

test("posting pauses while the table refuses every change, quarantines nothing, and resumes by itself", async () => {
  await using ledger = await openAltered(...RAISING("row", "true"));
  await using app = await ledger.start();
  await app.post(event("first", 1).trim());
  await app.post(event("ann", 2).trim());
  await until(() => app.stderr.text().includes("posting pauses"));
  expect(app.stderr.text()).toContain("closed");
  const isPaused = async (paused: boolean) =>
    (await (await fetch(`${app.url}/metrics`)).text()).includes(
      `daybook_posting_paused ${Number(paused)}\n`,
    );
  await until(() => isPaused(true));
  expect(await ledger.quarantine()).toEqual([]);
  await ledger.select("drop trigger raising on users_revenue");
  expect(await until(() => app.balance("ann"))).toBe("2");
  await until(() => isPaused(false));
  expect(await ledger.quarantine()).toEqual([]);
});

test("posting pauses for a trigger that refuses the statement, and quarantines nothing by guess", async () => {
  await using ledger = await openAltered(
    // Refuses only the posting's own statement, which inserts two users at once.
    `create function raising() returns trigger language plpgsql as $$ begin
       if (select count(*) from added) > 1 then raise exception 'closed'; end if;
       return null;
     end $$`,
    "create trigger raising after insert on users_revenue referencing new table as added for each statement execute function raising()",
  );
  const file = ledger.write("a.jsonl", event("ann", 1) + event("zoe", 1));
  const { code, stderr } = await ledger.tool([file]);
  expect(code).toBe(3);
  expect(stderr).toContain("posting pauses");
  expect(await ledger.balances()).toEqual({ first: "1" });
  expect(await ledger.quarantine()).toEqual([]);
});

test("a full disk while the refused lines are searched is an outage, and makes no line bad", async () => {
  await using ledger = await openAltered(
    `create function raising() returns trigger language plpgsql as $$ begin
       if new.user_id = 'bad' and current_query() like '%daybook_refused_lines%'
         then raise exception 'no space left' using errcode = '53100'; end if;
       if new.user_id = 'bad' then raise exception 'closed'; end if;
       return new;
     end $$`,
    "create trigger raising before insert on users_revenue for each row execute function raising()",
  );
  await using app = await ledger.start();
  await app.post(event("bad", 1).trim());
  await until(() => app.stderr.text().includes("no space left"));
  expect(await ledger.quarantine()).toEqual([]);
  await ledger.select("drop trigger raising on users_revenue");
  expect(await until(() => app.balance("bad"))).toBe("1");
  expect(await ledger.quarantine()).toEqual([]);
});

test("a retry of a quarantined line that Postgres still refuses leaves it there with the reason", async () => {
  await using ledger = await openAltered(
    "alter table users_revenue add constraint not_negative check (revenue >= 0)",
  );
  const file = ledger.write("a.jsonl", event("ann", -1) + event("ben", -2));
  expect((await ledger.tool([file])).code).toBe(1);
  const refused = await ledger.tool(["--quarantine=retry"]);
  expect({ code: refused.code, stderr: refused.stderr }).toEqual({ code: 1, stderr: "" });
  expect(refused.stdout).toContain("not_negative");
  await ledger.select("alter table users_revenue drop constraint not_negative");
  expect((await ledger.tool(["--quarantine=retry"])).code).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "-1", ben: "-2", first: "1" });
});

test("posting pauses while a trigger skips every row, and loses nothing", async () => {
  await using ledger = await openAltered(...SKIPPING("true"));
  await using app = await ledger.start();
  for (const id of [undefined, "id1"])
    expect((await app.post(event("ann", 2, id).trim())).status).toBe(201);
  const paused = async () =>
    ((await (await fetch(`${app.url}/readyz?reads`)).json()) as { paused?: string }).paused;
  expect(await until(paused)).toContain("a trigger of users_revenue skips the row");
  await ledger.select("drop trigger skipping on users_revenue");
  expect(await until(() => app.balance("ann"))).toBe("4");
  expect(await ledger.quarantine()).toEqual([]);
});

test("a retry of a quarantined line that a trigger skips leaves it there", async () => {
  await using ledger = await openAltered(...SKIPPING("new.user_id = 'bad'"));
  const file = ledger.write("a.jsonl", event("ann", 1) + event("bad", 2));
  expect((await ledger.tool([file])).code).toBe(1);
  expect((await ledger.tool(["--quarantine=retry"])).stdout).toContain("skips the row");
  expect(await ledger.quarantine()).toHaveLength(1);
  await ledger.select("drop trigger skipping on users_revenue");
  expect((await ledger.tool(["--quarantine=retry"])).code).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "1", bad: "2", first: "1" });
});
