/** The list of balances: by page, the largest, and all of them as CSV and NDJSON. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { connect } from "node:net";

import { openDatabase } from "../../lib/ledger/database.ts";
import { openBalances as openReading } from "../../lib/server/balances.ts";
import { openLedger } from "../support/ledger.ts";
import { until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const ODD = [
  "..",
  "=1+1",
  "'=1+1",
  "+a",
  "-a",
  "@a",
  "\ta",
  "\ra",
  'a"b,c',
  "a\r\nb",
  "😀",
  "<img>",
];

/** A server without a processor whose ledger holds ODD and `count` more users, with their number as balance. */
async function openBalances(count: number) {
  const ledger = await openLedger();
  const app = await ledger.start({}, ["--no-processor"]);
  await fetch(`${app.url}/userEvents`); // applies the schema
  const literals = ODD.map((user, i) => `(E'${user.replaceAll("'", "''")}', -${i}.5)`).join();
  await ledger.select(`insert into users_revenue values ${literals}`);
  await ledger.select(
    `insert into users_revenue select 'user' || n, n from generate_series(1, ${count}) as n`,
  );
  return {
    app,
    ledger,
    get: (query = "", accept = "application/json") =>
      fetch(`${app.url}/userEvents${query}`, { headers: { accept } }),
    async [Symbol.asyncDispose]() {
      await app[Symbol.asyncDispose]();
      await ledger[Symbol.asyncDispose]();
    },
  };
}

interface Page {
  users: { user_id: string; revenue: string }[];
  next: string | null;
  at?: string;
}

test("pages of any size list each user once, in order, and no cache keeps them", async () => {
  await using balances = await openBalances(2_000);
  for (const limit of [undefined, 7, 1_000]) {
    const found: Page["users"] = [];
    let cursor: string | null = null;
    do {
      const query = new URLSearchParams();
      if (limit) query.set("limit", `${limit}`);
      if (cursor) query.set("cursor", cursor);
      const response = await balances.get(`?${query}`);
      expect(response.headers.get("cache-control")).toBe("no-store");
      const page: Page = (await response.json()) as Page;
      expect(page.users.length).toBeLessThanOrEqual(limit ?? 100);
      found.push(...page.users);
      cursor = page.next;
    } while (cursor && found.length < 10 * (limit ?? 100));
    const users = found.map(({ user_id }) => user_id);
    expect(users).toEqual(
      [...users].toSorted((a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b))),
    );
    expect(new Set(users).size).toBe(users.length);
    if (limit === 1_000) expect(found).toHaveLength(2_000 + ODD.length);
  }
});

test.each([
  ["/userEvents/user1", 200],
  ["/userEvents/user1?after=x", 422],
  ["/userEvents/nobody", 404],
  ["/userEvents?user_id=user1", 200],
  ["/userEvents?limit=x", 422],
  ["/userEvents?order=revenue", 200],
  ["/revenue", 200],
  ["/quarantine", 200],
  ["/metrics", 200],
])("no cache keeps the answer of %s, nor what refuses it", async (path, status) => {
  await using balances = await openBalances(1);
  for (const method of ["GET", "HEAD"]) {
    const { url } = balances.app;
    const answer = await fetch(`${url}${path}`, { method });
    expect([answer.status, answer.headers.get("cache-control")]).toEqual([status, "no-store"]);
    const refused = await fetch(`${url}${path}`, { method, headers: { forwarded: "for=_x" } });
    expect([refused.status, refused.headers.get("cache-control")]).toEqual([401, "no-store"]);
  }
});

test("the largest balances come first, with the time at which they were read", async () => {
  await using balances = await openBalances(2_000);
  const { users, next, at } = (await (await balances.get("?order=revenue&limit=3")).json()) as Page;
  expect(users).toEqual([2000, 1999, 1998].map((n) => ({ user_id: `user${n}`, revenue: `${n}` })));
  expect([next, new Date(at as string).toISOString()]).toEqual([null, at as string]);
  const all = (await (await balances.get("?order=revenue&limit=1000")).json()) as Page;
  expect(all.users).toHaveLength(1_000);
});

test.each([
  ["?limit=0", "/limit"],
  ["?limit=1001", "/limit"],
  ["?limit=x", "/limit"],
  ["?limit=", "/limit"],
  ["?limit=1e2", "/limit"],
  ["?limit=0x10", "/limit"],
  ["?limit=1.0", "/limit"],
  ["?limit=%201", "/limit"],
  ["?limit=+1", "/limit"],
  ["?limit=-1", "/limit"],
  ["?limit=1&limit=2", "/limit"],
  ["?limit=1&l%69mit=1", "/limit"],
  ["?order=revenue&order=revenue", "/order"],
  ["?cursor=", "/cursor"],
  ["?cursor=*", "/cursor"],
  ["?cursor=AA", "/cursor"],
  ["?order=user", "/order"],
  ["?order=revenue&cursor=YQ", "/cursor"],
  ["?user_id=a&user_id=b", "/user_id"],
])("%s is answered 422 (%s)", async (query, path) => {
  await using balances = await openBalances(0);
  const response = await balances.get(query);
  expect(response.status).toBe(422);
  expect(((await response.json()) as { errors: { path: string }[] }).errors[0]?.path).toBe(path);
});

test("NDJSON is exact; CSV is as in RFC 4180, and no spreadsheet runs a user id", async () => {
  await using balances = await openBalances(5_000);
  const ndjson = await balances.get("", "application/x-ndjson");
  expect(ndjson.headers.get("content-type")).toBe("application/x-ndjson");
  expect(ndjson.headers.get("cache-control")).toBe("no-store");
  const rows = (await ndjson.text())
    .trimEnd()
    .split("\n")
    .map((row) => JSON.parse(row) as { user_id: string; revenue: string });
  expect(rows).toHaveLength(5_000 + ODD.length);
  for (const [i, user] of ODD.entries())
    expect(rows.find(({ user_id }) => user_id === user)?.revenue).toBe(
      i === 0 ? "-0.5" : `-${i}.5`,
    );
  const csv = await balances.get("", "text/html;q=0.9, text/csv;q=0.8, */*;q=0.1");
  expect(csv.headers.get("content-type")).toBe("text/csv; charset=utf-8");
  const text = await csv.text();
  expect(text).toStartWith("user_id,revenue\r\n");
  for (const line of [
    "..,-0.5",
    "'=1+1,-1.5",
    "''=1+1,-2.5",
    "'+a,-3.5",
    "'-a,-4.5",
    "'@a,-5.5",
    "'\ta,-6.5",
    `"'\ra",-7.5`,
    `"a""b,c",-8.5`,
    `"a\r\nb",-9.5`,
    "😀,-10.5",
    "user5000,5000",
  ])
    expect(text).toContain(`\r\n${line}\r\n`);
  expect((await balances.get("?limit=5", "text/csv")).status).toBe(422);
});

test("HEAD answers the headers of a stream, and begins none", async () => {
  await using balances = await openBalances(20_000);
  for (let i = 0; i < 60; i++) {
    const head = await fetch(`${balances.app.url}/userEvents`, {
      method: "HEAD",
      headers: { accept: "text/csv" },
    });
    expect([head.status, head.headers.get("content-type")]).toEqual([
      200,
      "text/csv; charset=utf-8",
    ]);
  }
  expect((await balances.get("", "text/csv")).status).toBe(200);
});

test("a stream that nobody reads holds no connection to Postgres and little memory, and one that hangs up is freed", async () => {
  await using balances = await openBalances(0);
  const { app, ledger } = balances;
  // More than what the sockets of one reader hold by themselves.
  await ledger.select(
    "insert into users_revenue select repeat('x', 200) || n, n from generate_series(1, 100000) as n",
  );
  const { hostname, port } = new URL(app.url);
  const open = () => {
    const socket = connect(Number(port), hostname);
    socket.on("error", () => {});
    socket.write(`GET /userEvents HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/csv\r\n\r\n`);
    socket.pause();
    return socket;
  };
  for (let turn = 0; turn < 3; turn++) {
    const sockets = Array.from({ length: 50 }, open);
    await until(async () => (await balances.get("", "text/csv")).status === 503);
    await until(async () => (await balances.get()).status === 200);
    for (const socket of sockets) socket.destroy();
    await until(async () => (await balances.get("", "text/csv")).status === 200);
  }
});

test("a stream of which nothing is taken for the time it may stall is broken off, and makes room for another", async () => {
  await using balances = await openBalances(20_000);
  const database = openDatabase(() => balances.ledger.url, "test", 1);
  const reading = openReading(database, { stalledMs: 20 });
  // More than there may be at once.
  for (let i = 0; i < 60; i++) {
    const { body } = await reading.stream("application/x-ndjson", false);
    await expect(body?.getReader().closed).rejects.toThrow("the reader takes nothing");
  }
  await database.close();
});
