/**
 * Events with an id count once, however often and by whichever way they arrive. A writer can wait until
 * its events are posted, and then reads them.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";

import { openDatabase } from "../../lib/ledger/database.ts";
import { openPruning } from "../../lib/ledger/boundary.ts";
import { line } from "../support/events.ts";
import { keyOf } from "../../lib/ledger/ids.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { run, SECRET, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { seeded } from "../support/random.ts";

const EVENTS = 5_000;
const KIB = 1024;
const OTHER_EVENT = "its id belongs to another event, which came first";

type App = Awaited<ReturnType<typeof startApp>>;

setDefaultTimeout(20_000);

const dir = tempDir();
let database: Awaited<ReturnType<typeof testDatabase>>;
let sql: ReturnType<typeof connectTest>;
let app: App;

beforeAll(async () => {
  database = await testDatabase();
  app = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  sql = connectTest(database.url);
  await until(async () => (await fetch(`${app.url}/readyz?reads`)).status === 200);
});

afterAll(async () => {
  await app?.[Symbol.asyncDispose]();
  await sql?.[Symbol.asyncDispose]();
  await database?.drop();
  dir[Symbol.dispose]();
});

// What an id may be

test("an id in the event and an Idempotency-Key are the same id", async () => {
  const [user, id] = [newName(), newName()];
  await take(line(user, 5, { id }));
  await take(line(user, 5), { "idempotency-key": id });
  await take(line(user, 5, { id }), { "idempotency-key": id });
  expect(await settled(user)).toBe("5");
  expect(await quarantined(user)).toEqual([]);
});

test("an Idempotency-Key is stored unchanged, whatever it contains", async () => {
  const user = newName();
  const keys = ['"quoted"', "a\\b", "{x},NULL", "__proto__", "x".repeat(87)].map(
    (key) => user + key,
  );
  for (const key of [...keys, ...keys]) await take(line(user, 1), { "idempotency-key": key });
  expect(await settled(user)).toBe("5");
  expect(await stored(keys)).toEqual(keys);
});

test("an Idempotency-Key that differs from the id is answered 422", async () => {
  const user = newName();
  await refused(line(user, 5, { id: "one" }), { "idempotency-key": "two" });
  expect(await settled(user)).toBeNull();
});

for (const [what, id] of [
  ["empty", ""],
  ["129 bytes long", "x".repeat(129)],
] as const)
  test(`an id or Idempotency-Key that is ${what} is answered 422`, async () => {
    await refused(line(newName(), 1, { id }));
    await refused(line(newName(), 1), { "idempotency-key": id });
    await refused(line(newName(), 1, { id }), { "idempotency-key": id });
  });

for (const json of [
  "1",
  "null",
  "true",
  "{}",
  '["x"]',
  `"${"é".repeat(64)}x"`,
  '"a\\u0000b"',
  '"\\ud800"',
])
  test(`an event with the id ${json.slice(0, 12)} is rejected`, async () => {
    const user = newName();
    const written = line(user, 1, { id: "ID" }).replace('"ID"', json);
    await refused(written);
    const response = await app.postLines(`${written}${line(user, 2)}`);
    expect(await response.json()).toMatchObject({ accepted: 1, rejected: 1 });
    expect(await settled(user)).toBe("2");
  });

for (const end of [
  "",
  "x".repeat(87),
  `${"é".repeat(43)}x`,
  `${"😀".repeat(21)}xyz`,
  " ",
  "/__proto__",
  "a\nb\t\u0001",
  `"\\{},NULL`,
  "\ufeff",
])
  test(`an event may have an id of ${41 + Buffer.byteLength(end)} bytes that ends in ${JSON.stringify(end.slice(0, 12))}`, async () => {
    const user = newName();
    const sent = line(user, 1, { id: user + end });
    await takeLines(sent + sent);
    await takeLines(sent);
    expect(await settled(user)).toBe("1");
    expect(await stored([user + end])).toEqual([user + end]);
  });

test("events without an id count each time, and store no id", async () => {
  const user = newName();
  const before = await countIds();
  await takeLines(line(user, 1).repeat(3));
  await take(line(user, 1));
  expect(await settled(user)).toBe("4");
  expect(await countIds()).toBe(before);
});

test("an event of 64 KiB with an Idempotency-Key is posted if it is answered 201", async () => {
  const user = newName();
  const bare = line(user, 1).trim().replace(/}$/, ',"pad":""}');
  const body = bare.replace('""}', `"${"x".repeat(64 * KIB - bare.length)}"}`);
  expect(body).toHaveLength(64 * KIB);
  const response = await post(body, { "idempotency-key": newName() });
  expect([201, 413]).toContain(response.status);
  expect(await settled(user)).toBe(response.status === 201 ? "1" : null);
  expect(await quarantined(user)).toEqual([]);
});

// The same event again

test("the same event counts once: in one request, in several, on another server, after a restart, from a file", async () => {
  using folder = tempDir();
  const [user, id] = [newName(), newName()];
  const sent = line(user, 7, { id });
  await takeLines(sent.repeat(3));
  await takeLines(sent);
  await Promise.all([sent, sent, sent].map((each) => take(each)));
  expect(await settled(user)).toBe("7");
  for (let start = 0; start < 2; start++) {
    const options = { dataDir: folder.path, databaseUrl: database.url };
    await using other = await startApp(options);
    await takeLines(sent, other);
    expect(await settled(user, other)).toBe("7");
    other.kill();
    await other.exit();
  }
  const file = folder.file("again.jsonl");
  writeFileSync(file, sent.repeat(2));
  const env = { DATA_DIR: folder.file("none"), DATABASE_URL: database.url };
  expect((await run("processor.ts", { args: [file], env })).code).toBe(0);
  expect(await settled(user)).toBe("7");
  expect(await quarantined(user)).toEqual([]);
});

test("5, 5.0 and 5e0 are the same value, and other fields do not make another event", async () => {
  const [user, id] = [newName(), newName()];
  for (const value of ["5", "5.0", "5e0", "0.5e1", "5.000"]) await take(line(user, value, { id }));
  await take(`{"note":[1,2],"id":"${id}","value":5,"userId":"${user}","name":"add_revenue"}`);
  expect(await settled(user)).toBe("5");
  expect(await quarantined(user)).toEqual([]);
});

for (const [what, first, second] of [
  ["another value", ["add_revenue", 5], ["add_revenue", 6]],
  ["the other name", ["add_revenue", 5], ["subtract_revenue", 5]],
  ["the other name and sign", ["add_revenue", 5], ["subtract_revenue", -5]],
] as const)
  test(`${what} under the same id is quarantined, and the first event stands`, async () => {
    for (const together of [true, false]) {
      const [user, id] = [newName(), newName()];
      const [one, two] = [first, second].map(([name, value]) => line(user, value, { id, name }));
      if (together) await takeLines(`${one}${two}${one}`);
      else {
        await takeLines(`${one}`);
        await settled(user);
        await takeLines(`${two}${two}`);
      }
      expect(await settled(user)).toBe("5");
      const reasons = (await quarantined(user)).map(({ reason }) => reason);
      expect(reasons.length).toBeGreaterThan(0);
      expect(new Set(reasons)).toEqual(new Set([OTHER_EVENT]));
    }
  });

test("an event of another user under the same id is quarantined", async () => {
  const [first, second, id] = [newName(), newName(), newName()];
  await take(line(first, 5, { id }));
  await take(line(second, 5, { id }));
  expect(await settled(first)).toBe("5");
  expect(await settled(second)).toBeNull();
  expect(await quarantined(second)).toMatchObject([{ reason: OTHER_EVENT }]);
});

test("a repeated event between two others under its id is not quarantined", async () => {
  const [user, id] = [newName(), newName()];
  await take(line(user, 5, { id }));
  expect(await settled(user)).toBe("5");
  await takeLines(line(user, 6, { id }) + line(user, 5, { id }) + line(user, 7, { id }));
  expect(await settled(user)).toBe("5");
  const values = (await quarantined(user)).map(({ line }) => /"value":"?(\d)/.exec(line)?.[1]);
  expect(values.sort()).toEqual(["6", "7"]);
});

test("events that arrive with a quarantined one are posted", async () => {
  const [user, other, id] = [newName(), newName(), newName()];
  await takeLines(line(user, 1, { id }));
  await takeLines(line(user, 2, { id }) + line(other, 4) + line(other, 8, { id: newName() }));
  expect(await settled(other)).toBe("12");
  expect(await settled(user)).toBe("1");
});

test(
  "processors that post files with the same ids at once count each event once",
  seeded(async (random) => {
    await using ledger = await testDatabase();
    using folder = tempDir();
    const lines = Array.from({ length: 3_000 }, (_, i) =>
      line(`user${i % 100}`, 1, { id: `id${i}` }),
    );
    const env = { DATA_DIR: folder.file("data"), DATABASE_URL: ledger.url };
    const runs = ["a", "b", "c"].map((name) => {
      const file = folder.file(name);
      writeFileSync(file, shuffled(lines, random).join(""));
      return run("processor.ts", { args: [file], env });
    });
    for (const { code, stderr } of await Promise.all(runs)) expect([code, stderr]).toEqual([0, ""]);
    const found = Object.values(await balances(ledger.url));
    expect(found).toEqual(Array.from({ length: 100 }, () => "30"));
  }),
);

test(
  "events sent one to three times, in any order, to two servers count once",
  seeded(async (random) => {
    await using ledger = await testDatabase();
    using folder = tempDir();
    const start = (name: string) =>
      startApp({ dataDir: folder.file(name), databaseUrl: ledger.url });
    await using first = await start("first");
    await using second = await start("second");
    const wanted = new Map<string, number>();
    const sent: string[] = [];
    for (let i = 0; i < EVENTS; i++) {
      const user = `user${Math.floor(random() * (EVENTS / 20))}`;
      const value = Math.floor(random() * 1_000);
      const add = random() < 0.6;
      wanted.set(user, (wanted.get(user) ?? 0) + (add ? value : -value));
      const name = add ? "add_revenue" : "subtract_revenue";
      const one = line(user, value, { id: `id${i}`, name });
      for (let times = Math.ceil(random() * 3); times > 0; times--) sent.push(one);
    }
    const parts = inParts(shuffled(sent, random), random);
    const send = async (app: App) => {
      for (let part = parts.pop(); part; part = parts.pop()) await takeLines(part.join(""), app);
    };
    await Promise.all([first, first, second, second].map(send));
    for (const app of [first, second]) {
      const after = await takeLines(line("last", 0), app);
      await until(async () => (await fetch(`${app.url}/userEvents/last?after=${after}`)).ok, 600e3);
    }
    const found = await balances(ledger.url);
    expect(found).toEqual({
      ...Object.fromEntries([...wanted].map(([k, v]) => [k, `${v}`])),
      last: "0",
    });
    await using sql = connectTest(ledger.url);
    const [row] = await sql`
      select (select count(*) from ids)::int as ids, (select count(*) from quarantine)::int as bad`;
    expect(row).toEqual({ ids: EVENTS, bad: 0 });
  }),
  600_000,
);

// ID_DAYS

test("ids older than ID_DAYS are deleted in small steps while events are posted", async () => {
  await using ledger = await testDatabase();
  using folder = tempDir();
  const options = { dataDir: folder.path, databaseUrl: ledger.url, env: { ID_DAYS: "3" } };
  await using sql = connectTest(ledger.url);
  await sql.unsafe(await Bun.file(`${import.meta.dir}/../../schema.sql`).text());
  await sql`
    insert into event_ids (id, event, claimed_on)
    select 'old' || i, 'x', current_date - 4 from generate_series(1, 20000) as i`;
  await sql`
    insert into ids (id, event, day)
    select convert_to('new' || i, 'UTF8'), gen_random_uuid(), daybook_day(current_date - 4)
    from generate_series(1, 20000) as i`;
  await sql`
    insert into ids (id, event, day)
    values ('kept too', gen_random_uuid(), daybook_day(current_date - 3))`;
  const newer = async () => (await sql`select count(*)::int as count from ids`)[0]?.["count"];
  await sql`insert into event_ids (id, event, claimed_on) values ('kept', 'x', current_date - 3)`;
  const old = async () =>
    (await sql`select count(*)::int as count from event_ids where id <> 'kept'`)[0]?.["count"];

  const database = openDatabase(() => ledger.url, "test", 1);
  expect(await openPruning(database, 3)()).toBe(true);
  expect(await old()).toBe(10_000);
  expect(await newer()).toBeWithin(1_000, 20_000);
  await database.close();

  await using app = await startApp(options);
  let sum = 0;
  await until(async () => {
    await takeLines(line("ann", 1), app);
    expect(await settled("ann", app)).toBe(`${++sum}`);
    return (await old()) === 0 && (await newer()) === 1;
  });
  expect(await sql`select id from event_ids`).toMatchObject([{ id: "kept" }]);

  await takeLines(line("ann", 100, { id: "old7" }) + line("ann", 100, { id: "kept" }), app);
  await takeLines(line("ann", 1, { id: "new7" }) + line("ann", 1, { id: "kept too" }), app);
  expect(await settled("ann", app)).toBe(`${sum + 101}`);
});

// Reading one's own writes

test.concurrent("a read after the position of a write includes it, 200 times", async () => {
  const user = newName();
  for (let sum = 1; sum <= 200; sum++) {
    const position = await take(line(user, 1));
    expect(await balanceAfter(user, position)).toBe(`${sum}`);
  }
});

test.concurrent(
  "a read after the position of a write includes it, 50 times, with the processor as another process",
  async () => {
    using folder = tempDir();
    const options = { dataDir: folder.path, databaseUrl: database.url, args: ["--no-processor"] };
    await using app = await startApp(options);
    const env = { DATA_DIR: folder.path, DATABASE_URL: database.url };
    await using _ = spawn("processor.ts", { env });
    const user = newName();
    for (let sum = 1; sum <= 50; sum++) {
      const position =
        sum % 2 ? await take(line(user, 1), {}, app) : await takeLines(line(user, 1), app);
      expect(await balanceAfter(user, position, app)).toBe(`${sum}`);
    }
  },
);

test.concurrent("a position that is never posted is answered 504 with Retry-After", async () => {
  using folder = tempDir();
  const options = { dataDir: folder.path, databaseUrl: database.url, args: ["--no-processor"] };
  await using app = await startApp(options);
  const position = await takeLines(line(newName(), 1), app);
  const response = await read(newName(), position, app);
  expect(Number(response.headers.get("retry-after"))).toBeGreaterThan(0);
  await problem(response, 504);
});

test("many clients that write and read at once never read an old balance", async () => {
  const users = Array.from({ length: 40 }, newName);
  const write = async (user: string) => {
    for (let sum = 1; sum <= 5; sum++)
      expect(await balanceAfter(user, await take(line(user, 1)))).toBe(`${sum}`);
  };
  await Promise.all(users.map(write));
});

test("a server with an empty journal answers a position that is posted and has no lag; other servers wait for its later positions", async () => {
  using folder = tempDir();
  await using other = await startApp({ dataDir: folder.path, databaseUrl: database.url });
  const { position } = (await (await other.postLines("no event\n")).json()) as { position: string };
  expect((await read(newName(), position, other)).status).toBe(404);
  const ready = (await (await fetch(`${other.url}/readyz?reads`)).json()) as object;
  expect(ready).toEqual({ status: "ready", reads: "ready", lagBytes: 0, lagSeconds: 0 });

  const user = newName();
  for (let sum = 1; sum <= 10; sum++) {
    const position = await takeLines(line(user, 1), other);
    expect(await balanceAfter(user, position)).toBe(`${sum}`);
  }
});

test("a user without events is answered 404 also with ?after=", async () => {
  const position = await take(line(newName(), 1));
  expect((await read(newName(), position)).status).toBe(404);
});

const UUID = "00000000-0000-4000-8000-000000000000";
for (const after of ["", "x", "5", UUID, `${UUID}:`, `${UUID}:-1`, `${UUID}:1.5`, `${UUID}:x`])
  test(`?after=${after} is answered 422`, async () => {
    await problem(await read(newName(), after), 422);
  });

test("a position of 16 digits, or followed by other text, is answered 422", async () => {
  for (const after of [`${UUID}:${"9".repeat(16)}`, `${UUID}:1:2`, `${UUID}:1 `, ` ${UUID}:1`])
    await problem(await read(newName(), after), 422);
});

test("?after= is answered 503 with Retry-After when the database is unavailable", async () => {
  using folder = tempDir();
  const databaseUrl = "postgres://nobody@127.0.0.1:1/nothing";
  await using app = await startApp({ dataDir: folder.path, databaseUrl });
  const position = await takeLines(line(newName(), 1), app);
  const response = await read(newName(), position, app);
  expect(Number(response.headers.get("retry-after"))).toBeGreaterThan(0);
  await problem(response, 503);
});

// Helpers

function newName(): string {
  return `name-${crypto.randomUUID()}`;
}

function post(body: string, headers = {}, server = app): Promise<Response> {
  const all = { authorization: SECRET, "content-type": "application/json", ...headers };
  return fetch(`${server.url}/liveEvent`, { method: "POST", headers: all, body });
}

/** POST /liveEvent; returns the position. */
async function take(body: string, headers = {}, server = app): Promise<string> {
  const response = await post(body, headers, server);
  expect(response.status).toBe(201);
  return ((await response.json()) as { position: string }).position;
}

/** POST /liveEvents of good lines; returns the position. */
async function takeLines(body: string, server = app): Promise<string> {
  const response = await server.postLines(body);
  const answer = (await response.json()) as { rejected: number; position: string };
  expect([response.status, answer.rejected]).toEqual([201, 0]);
  return answer.position;
}

async function refused(body: string, headers = {}): Promise<void> {
  const size = () => readFileSync(dir.file("eventsPost.jsonl")).length;
  const before = size();
  const { errors } = await problem(await post(body, headers), 422);
  expect(errors.map(({ path }) => path)).toEqual(["/id"]);
  expect(size()).toBe(before);
}

async function problem(response: Response, status: number) {
  const text = await response.text();
  expect(response.status, text).toBe(status);
  expect(response.headers.get("content-type")).toStartWith("application/problem+json");
  return JSON.parse(text) as { errors: { path: string }[] };
}

function read(user: string, after: string, server = app): Promise<Response> {
  return fetch(`${server.url}/userEvents/${user}?after=${encodeURIComponent(after)}`);
}

async function balanceAfter(user: string, position: string, server = app): Promise<string | null> {
  const response = await read(user, position, server);
  expect([200, 404]).toContain(response.status);
  return ((await response.json()) as { revenue?: string }).revenue ?? null;
}

/** The balance when everything that this server has stored is posted. */
async function settled(user: string, server = app): Promise<string | null> {
  return balanceAfter(user, await takeLines(line("everybody", 0), server), server);
}

function quarantined(text: string) {
  return sql<{ reason: string; line: string }[]>`
    select reason, line from quarantine where strpos(line, ${text}) > 0`.then((rows) => [...rows]);
}

/** Those of `ids` that are claimed. */
async function stored(ids: string[]): Promise<string[]> {
  const rows = await sql`select id::text as key from ids`;
  const keys = new Set(rows.map(({ key }) => key as string));
  return ids.filter((id) => keys.has(keyOf(id)));
}

async function countIds(): Promise<number> {
  return (await sql`select count(*)::int as count from ids`)[0]?.["count"];
}

function shuffled<T>(all: readonly T[], random: () => number): T[] {
  const mixed = [...all];
  for (let i = mixed.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [mixed[i], mixed[j]] = [mixed[j] as T, mixed[i] as T];
  }
  return mixed;
}

/** In parts of 1 to 200. */
function inParts<T>(all: readonly T[], random: () => number): T[][] {
  const parts: T[][] = [];
  for (let from = 0; from < all.length;) {
    const to = from + Math.ceil(random() * 200);
    parts.push(all.slice(from, to));
    from = to;
  }
  return parts;
}
