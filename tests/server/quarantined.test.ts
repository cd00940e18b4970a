/** GET /quarantine: the lines that were set aside, the newest first. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { event } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { root, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

interface Page {
  lines: { source: string; position: number; reason: string; line: string; at: string }[];
  next: string | null;
}

test("an event that was set aside is listed with its reason, source and position", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  for (const value of [1, 2])
    expect((await app.post(event("ann", value, { id: "a" }))).status).toBe(201);
  const page = await until(async () => {
    const response = await fetch(`${app.url}/quarantine`);
    expect(response.headers.get("cache-control")).toBe("no-store");
    const found = (await response.json()) as Page;
    return found.lines.length > 0 ? found : null;
  });
  const [row] = await ledger.quarantine();
  expect(page).toMatchObject({ lines: [row as object], next: null });
  expect(Math.abs(Date.parse(page.lines[0]!.at) - Date.now())).toBeLessThan(3_600_000);
});

test("pages of any size list each line once, the newest first, also those of one moment", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  await fetch(`${app.url}/userEvents`); // applies the schema
  await ledger.select(`
    insert into quarantine select 'file:' || n % 7 || E'\\n ü#1', n, 'reason', 'line ' || n || repeat(E'\\u0001', 2000),
      timestamptz '2026-11-26 00:00:00.000001Z' + n / 10 * interval '1 microsecond'
    from generate_series(1, 500) as n`);
  const rows = await ledger.select<{ line: string }>(
    "select line from quarantine order by at desc, source desc, position desc",
  );
  for (const limit of [7, 1_000]) {
    const found: Page["lines"] = [];
    let cursor: string | null = null;
    do {
      const query: string = `limit=${limit}${cursor ? `&cursor=${cursor}` : ""}`;
      const text = await (await fetch(`${app.url}/quarantine?${query}`)).text();
      expect(text.length).toBeLessThan(1024 * 1024);
      const page = JSON.parse(text) as Page;
      expect(page.lines.length).toBeLessThanOrEqual(limit);
      found.push(...page.lines);
      cursor = page.next;
    } while (cursor && found.length < 1_000);
    expect(found.map(({ line }) => line)).toEqual(rows.map(({ line }) => line));
  }
  const plan = await ledger.select(`
    set enable_seqscan = off; set enable_sort = off; explain select source from quarantine
    where (at, source, position) < (now(), 'file:a', 3) order by at desc, source desc, position desc limit 9`);
  expect(JSON.stringify(plan)).toContain("quarantine_newest");
});

const forged = ["2026-99-99T00:00:00Z", "2026-02-30T00:00:00.000Z", "0000-01-01T00:00:00Z"].map(
  (at) => Buffer.from(`${at} 1 x`).toString("base64url"),
);
test.each(["", "*", "AA", ...forged])("the cursor %j is answered 422", async (cursor) => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  const response = await fetch(`${app.url}/quarantine?cursor=${cursor}`);
  expect(response.status).toBe(422);
  expect(((await response.json()) as { errors: object[] }).errors).toMatchObject([
    { path: "/cursor" },
  ]);
  expect((await fetch(`${app.url}/quarantine?limit=0`)).status).toBe(422);
});

test("a query that Postgres refuses for a value is our own fault, not an outage of the database", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  expect((await fetch(`${app.url}/quarantine`)).status).toBe(200);
  await ledger.select(`
    insert into quarantine (source, position, reason, line) values ('a', 1, 'r', 'l');
    alter table quarantine rename to lines;
    create view quarantine as
      select source, position, (1 / (position - 1))::text as reason, line, at from lines`);
  expect((await fetch(`${app.url}/quarantine`)).status).toBe(500);
  await until(() => app.stderr.text().includes("internal error: database: division by zero"));
  expect((await fetch(`${app.url}/readyz?reads`)).status).toBe(200);
  expect(app.stderr.text()).not.toMatch(/"(database: |.*unavailable)/);
});

test("a ledger of 0.1.0 gets the index for it; without a credential nobody sees lines", async () => {
  await using ledger = await openLedger({ READ_SECRET: "read" });
  await ledger.select(readFileSync(join(root, "tests/fixtures/0.1.0/ledger.sql"), "utf8"));
  await using app = await ledger.start({}, ["--no-processor"]);
  const read = (headers = {}) => fetch(`${app.url}/quarantine`, { headers });
  expect((await read()).status).toBe(401);
  expect((await read({ authorization: "read" })).status).toBe(200);
  const [index] = await ledger.select("select to_regclass('quarantine_newest')::text as name");
  expect(index).toEqual({ name: "quarantine_newest" });
});
