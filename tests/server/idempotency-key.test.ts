/**
 * `Idempotency-Key` is the id of an event: plain, or as a quoted string of RFC 8941. What could be several
 * keys is none: Bun joins the values of repeated headers.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";

import { line } from "../support/events.ts";
import { openConnection, writtenPost } from "../support/network.ts";
import { connectTest, testDatabase } from "../support/postgres.ts";
import { SECRET, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(20_000);

const dir = tempDir();
let database: Awaited<ReturnType<typeof testDatabase>>;
let sql: ReturnType<typeof connectTest>;
let app: Awaited<ReturnType<typeof startApp>>;

beforeAll(async () => {
  database = await testDatabase();
  app = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  sql = connectTest(database.url);
});

afterAll(async () => {
  await app?.[Symbol.asyncDispose]();
  await sql?.[Symbol.asyncDispose]();
  await database?.drop();
  dir[Symbol.dispose]();
});

for (const [what, quoted, plain] of [
  ["letters", '"key"', "key"],
  ["one letter", '"k"', "k"],
  ["blanks, a comma and a semicolon", '"a, b;c=1 "', "a, b;c=1 "],
  ["escaped quotes", '"a\\"b\\""', 'a"b"'],
  ["escaped backslashes", '"a\\\\b\\\\"', "a\\b\\"],
  ["an escaped backslash before an escaped quote", '"\\\\\\""', '\\"'],
  ["only blanks", '" "', " "],
  ["128 bytes besides its escapes", `"${'\\"'.repeat(87)}"`, '"'.repeat(87)],
] as const)
  test(`a quoted Idempotency-Key of ${what} is the same id as the key itself`, async () => {
    const user = newName();
    const unique = user.slice(-36).padEnd(41, "-");
    const inQuotes = `"${unique}${quoted.slice(1)}`;
    for (let again = 0; again < 2; again++) {
      await take(line(user, 1), { "idempotency-key": inQuotes });
      await take(line(user, 1, { id: unique + plain }));
    }
    await take(line(user, 1, { id: unique + plain }), { "idempotency-key": inQuotes });
    expect(await settled(user)).toBe("1");
    expect(await quarantined(user)).toBe(0);
  });

for (const key of [
  '"k',
  '"',
  '"k\\"',
  '"k"x',
  '"k";a=1',
  '"k" x',
  '"k","k"',
  '"k", "k"',
  '"k", k',
  '"a\\b"',
  '"a"b"',
  '"tab\there"',
  '"é"',
  "k, k",
  ", k",
  'k, "k"',
  "a,\tb",
])
  test(`the Idempotency-Key ${JSON.stringify(key)} is answered 400`, async () => {
    const user = newName();
    const headers = { "content-type": "application/json", "idempotency-key": key };
    expect(await answerTo(headers, line(user, 1, { id: "k" }))).toBe(400);
    expect(await answerTo(headers, line(user, 1))).toBe(400);
    expect(await settled(user)).toBeNull();
  });

for (const keys of [
  ["k", "k"],
  ["k", ""],
  ["", "k"],
  ['"k"', '"k"'],
  ['"k"', "k"],
])
  test(`the Idempotency-Keys ${JSON.stringify(keys)} of one request are answered 400`, async () => {
    const user = newName();
    expect(await answerTo({ "idempotency-key": keys }, line(user, 1))).toBe(400);
    expect(await settled(user)).toBeNull();
  });

test("a comma that no blank follows is a part of an Idempotency-Key", async () => {
  const user = newName();
  const keys = ["a,b", ",", "a,"].map((key) => user + key);
  for (const key of [...keys, ...keys]) await take(line(user, 1), { "idempotency-key": key });
  expect(await settled(user)).toBe("3");
});

function newName(): string {
  return `key-${crypto.randomUUID()}`;
}

/** The status that POST /liveEvent answers; a header with several values is sent as often. */
async function answerTo(headers: Record<string, string | string[]>, body: string) {
  const all = { authorization: SECRET, "content-type": "application/json", ...headers };
  using connection = openConnection(app.url);
  connection.send(writtenPost("/liveEvent", all, body));
  return Number(await until(() => /^HTTP\/1.1 (\d+)/.exec(connection.text())?.[1]));
}

async function take(body: string, headers: Record<string, string> = {}): Promise<void> {
  expect(await answerTo(headers, body)).toBe(201);
}

/** The balance once everything is posted; `null`: no event was. */
async function settled(user: string): Promise<string | null> {
  const marker = newName();
  const stored = await app.post(line(marker, 0));
  const { position } = (await stored.json()) as { position: string };
  await fetch(`${app.url}/userEvents/${marker}?after=${position}`);
  return app.balance(user);
}

async function quarantined(user: string): Promise<number> {
  const rows = await sql`select from quarantine where strpos(line, ${user}) > 0`;
  return rows.length;
}
