/** Every later version can use the journal and the ledger that version 0.1.0 wrote. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { cpSync, readFileSync } from "node:fs";
import { join } from "node:path";

import { openJournalReader } from "../../lib/journal/reader.ts";
import { readFrames, readLines } from "../support/journal.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { root, run, startApp, tempDir } from "../support/programs.ts";

setDefaultTimeout(60_000);

const FIXTURES = join(root, "tests", "fixtures", "0.1.0");
/** The event types of the server that wrote the fixtures. */
const EVENT_TYPES = "add_revenue:+,subtract_revenue:-,note_revenue:0";

interface Mark {
  name: string;
  events: number;
  ends?: number[];
}

/** What a journal contains: its positions, its events, and the marks of its sources. */
async function summarize(path: string) {
  const { start, end } = (await openJournalReader(path))!;
  const frames = await readFrames(path);
  expect(frames.at(-1)?.to).toBe(await end());
  for (const { payload } of frames) expect(payload.toString()).toEndWith("\n");
  const lines = (await readLines(path)).map(
    (line) => JSON.parse(line) as { userId?: string; source: Mark },
  );
  const marks = lines.filter(({ userId }) => userId === undefined).map(({ source }) => source);
  for (const { events, ends } of marks) if (ends) expect(ends).toHaveLength(events);
  return {
    start,
    end: await end(),
    frames: frames.length,
    events: lines.length - marks.length,
    marks: marks.length,
    withEnds: marks.filter(({ ends }) => ends).length,
    sources: [...new Set(marks.map(({ name }) => name))],
  };
}

/** A copy of the fixtures, and a database with their ledger, updated to the current schema. */
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

test("a journal of 0.1.0 whose oldest segments were deleted is read to its end, with all marks of its sources", async () => {
  expect(await summarize(join(FIXTURES, "journal", "eventsPost.jsonl"))).toEqual({
    ...{ start: 13985, end: 33997, frames: 101, events: 174, marks: 7, withEnds: 2 },
    sources: [
      "plain.jsonl",
      "windows.jsonl",
      "windows.jsonl#2",
      'till "7" \\ süd 😀',
      "moved.jsonl",
    ],
  });
  expect(await summarize(join(FIXTURES, "other", "eventsPost.jsonl"))).toEqual({
    ...{ start: 0, end: 1012, frames: 4, events: 10, marks: 1, withEnds: 0 },
    sources: ["moved.jsonl"],
  });
});

test("a ledger of 0.1.0 keeps its balances under the current schema, and they match their sources", async () => {
  await using fixtures = await openFixtures();
  expect(fixtures.wanted.size).toBe(49);
  expect(await fixtures.found()).toEqual(fixtures.wanted);
  const { code, stdout, stderr } = await fixtures.verify();
  expect(stdout, stderr).toBe("49 balances match their sources\n");
  expect(code).toBe(0);
});

test("files that 0.1.0 has stored or posted change nothing when they are sent or posted again", async () => {
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
