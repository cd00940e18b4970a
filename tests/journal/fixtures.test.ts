/** What version 0.1.0 has left on disk and in the database: every later version goes on with it. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, readFileSync } from "node:fs";
import { join } from "node:path";

import { openJournalReader } from "../../lib/journal/reader.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { root, run, startApp, tempDir } from "../support/programs.ts";

setDefaultTimeout(60_000);

const FIXTURES = join(root, "tests", "fixtures", "0.1.0");
/** As they were when it was made. */
const EVENT_TYPES = "add_revenue:+,subtract_revenue:-,note_revenue:0";

interface Mark {
  name: string;
  events: number;
  ends?: number[];
}

/** All that a journal holds: its events, and the marks of its sources. */
async function readJournal(path: string) {
  const reader = (await openJournalReader(path))!;
  const marks: Mark[] = [];
  let position = reader.start;
  let frames = 0;
  let events = 0;
  for (;;) {
    const read = await reader.read(position);
    if (read.length === 0) break;
    for (const { payload, to } of read) {
      const lines = payload.toString().split("\n");
      expect(lines.pop()).toBe("");
      const parsed = lines.map((line) => JSON.parse(line) as { userId?: string; source: Mark });
      const own = parsed.filter(({ userId }) => userId === undefined).map(({ source }) => source);
      events += parsed.length - own.length;
      for (const { events, ends } of own) if (ends) expect(ends).toHaveLength(events);
      marks.push(...own);
      frames++;
      position = to;
    }
  }
  expect(position).toBe(await reader.end());
  const sources = [...new Set(marks.map(({ name }) => name))];
  const withEnds = marks.filter(({ ends }) => ends).length;
  return {
    start: reader.start,
    end: position,
    frames,
    events,
    marks: marks.length,
    withEnds,
    sources,
  };
}

/** A copy of the fixtures, and the ledger in a database under the schema of today. */
async function openFixtures() {
  const database = await testDatabase();
  const dir = tempDir();
  cpSync(FIXTURES, dir.path, { recursive: true });
  await using sql = connectTest(database.url);
  await sql.unsafe(readFileSync(dir.file("ledger.sql"), "utf8"));
  const schema = readFileSync(join(root, "schema.sql"), "utf8");
  for (let time = 0; time < 2; time++) await sql.unsafe(schema);
  const env = { DATA_DIR: dir.file("journal"), DATABASE_URL: database.url, EVENT_TYPES };
  const others = [
    "other/eventsPost.jsonl",
    "files/2026-10/orders.jsonl",
    "files/2026-11/orders.jsonl",
  ];
  return {
    ...{ dir, env },
    // Maps, because one of the users is called __proto__.
    wanted: new Map(
      Object.entries<string>(JSON.parse(readFileSync(dir.file("balances.json"), "utf8"))),
    ),
    found: async () => new Map(Object.entries(await balances(database.url))),
    verify: () => run("processor.ts", { args: ["--verify", ...others.map(dir.file)], env }),
    async [Symbol.asyncDispose]() {
      await database.drop();
      dir[Symbol.dispose]();
    },
  };
}

test("a journal of 0.1.0 is read to its end, from where its old segments were removed, with all marks of its sources", async () => {
  expect(await readJournal(join(FIXTURES, "journal", "eventsPost.jsonl"))).toEqual({
    ...{ start: 13985, end: 33997, frames: 101, events: 174, marks: 7, withEnds: 2 },
    sources: [
      "plain.jsonl",
      "windows.jsonl",
      "windows.jsonl#2",
      'till "7" \\ süd 😀',
      "moved.jsonl",
    ],
  });
  expect(await readJournal(join(FIXTURES, "other", "eventsPost.jsonl"))).toEqual({
    ...{ start: 0, end: 1012, frames: 4, events: 10, marks: 1, withEnds: 0 },
    sources: ["moved.jsonl"],
  });
});

test("a ledger of 0.1.0 has the balances of its events under the schema of today, and --verify counts the same", async () => {
  await using fixtures = await openFixtures();
  expect(fixtures.wanted.size).toBe(49);
  expect(await fixtures.found()).toEqual(fixtures.wanted);
  const { code, stdout, stderr } = await fixtures.verify();
  expect(stdout, stderr).toBe("49 balances match their sources\n");
  expect(code).toBe(0);
});

test("what 0.1.0 has taken and posted is known: files that are sent and posted again change nothing", async () => {
  await using fixtures = await openFixtures();
  const { dir, env } = fixtures;
  {
    const { DATA_DIR: dataDir, DATABASE_URL: databaseUrl } = env;
    await using server = await startApp({ dataDir, databaseUrl, env });
    const send = async (file: string, ...args: string[]) => {
      const sent = { SERVER_URL: server.url, EVENT_TYPES };
      const { stdout } = await run("client.ts", { args: [dir.file(file), ...args], env: sent });
      expect(stdout, file).toStartWith("sent 0 events (0 rejected)");
    };
    await send("sent/plain.jsonl");
    await send("sent/before/windows.jsonl");
    await send("sent/windows.jsonl");
    await send("sent/till.jsonl", "--source", 'till "7" \\ süd 😀');
    await send("sent/moved.jsonl");
  }
  for (const file of ["files/2026-10/orders.jsonl", "files/2026-11/orders.jsonl"])
    expect((await run("processor.ts", { args: [dir.file(file)], env })).stdout).toStartWith(
      "posted 0",
    );
  expect(await fixtures.found()).toEqual(fixtures.wanted);
  expect((await fixtures.verify()).code).toBe(0);
});
