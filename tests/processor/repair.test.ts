/**
 * What an operator does about a damaged journal, from the first check to the last event posted. Each
 * kind of damage here once left a journal that no tool could repair, or that was repaired without end.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";

import { repair } from "../../lib/processor/check.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { checkJournal } from "../../lib/journal/check.ts";
import { disk } from "../../lib/journal/disk.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { repairFile } from "../../lib/journal/repair.ts";
import { JournalDamage } from "../../lib/journal/format.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const event = (userId: string) =>
  Buffer.from(`{"userId":"${userId}","name":"add_revenue","value":1}\n`);

/** Appends one frame for each of `users`; returns the positions behind them. */
async function append(
  directory: string,
  users: string,
  segmentBytes = Infinity,
): Promise<number[]> {
  const journal = await openJournal({ directory, segmentBytes });
  const ends: number[] = [];
  for (const user of users) ends.push(await journal.append(event(user)));
  await journal.close();
  return ends;
}

function change(path: string, at: number, by = 2): void {
  const bytes = readFileSync(path);
  bytes[at] = (bytes[at] as number) ^ by;
  writeFileSync(path, bytes);
}

/** A folder with a journal, a database, and the tools on both. */
async function openDesk() {
  const database = await testDatabase();
  const dir = tempDir();
  const env = { DATA_DIR: dir.path, DATABASE_URL: database.url };
  return {
    ...{ dir, env, url: database.url, path: dir.file("eventsPost.jsonl") },
    tool: (...args: string[]) => run("processor.ts", { args, env }),
    async [Symbol.asyncDispose]() {
      await database.drop();
      dir[Symbol.dispose]();
    },
  };
}

async function damageOf(path: string) {
  const { files } = await checkJournal(path, disk);
  return files.flatMap(({ damage }) => damage);
}

test("a rotation that died, or is in progress, is not damage", async () => {
  using dir = tempDir();
  await append(dir.path, "abcd", 200);
  const path = dir.file("eventsPost.jsonl");
  const { base } = JSON.parse(readFileSync(path, "utf8").split("\n")[0] ?? "") as { base: number };
  renameSync(path, dir.file(`eventsPost.${base}.jsonl`));
  expect(await damageOf(path)).toEqual([]);
});

test("a rotten header of the active file is repaired, and the file before it left alone", async () => {
  await using desk = await openDesk();
  await append(desk.dir.path, "abcd", 200);
  const before = readFileSync(desk.path);
  change(desk.path, 20);
  expect(await damageOf(desk.path)).toMatchObject([{ from: 0 }]);
  expect((await desk.tool("--check", "--repair")).code).toBe(0);
  expect((await desk.tool("--check")).code).toBe(0);
  expect(readFileSync(desk.path)).toEqual(before);
});

test("acknowledged frames before a torn one are not a torn tail, whichever byte has rotted", async () => {
  for (const cut of [0, 5]) {
    using dir = tempDir();
    const [, end = 0] = await append(dir.path, "abc");
    const path = dir.file("eventsPost.jsonl");
    const whole = readFileSync(path);
    const from = whole.indexOf('{"frame"', whole.indexOf('{"frame"') + 1);
    for (let at = from; at < end; at++) {
      writeFileSync(path, whole.subarray(0, whole.length - cut));
      change(path, at);
      const opening = openJournal({ directory: dir.path });
      const refused = await opening.then((journal) => journal.close()).catch((error) => error);
      const { files } = await checkJournal(path, disk);
      const [file] = files;
      if (!(refused instanceof JournalDamage)) {
        expect(file?.damage, `${at}`).toEqual([]); // the time of a frame is not under a checksum
        continue;
      }
      // The frame behind it stays, unless it is the torn one.
      expect(file, `${at}`).toMatchObject({
        damage: [{ from, to: end }],
        frames: cut ? 1 : 2,
        tornBytes: cut ? whole.length - end - cut : 0,
      });
    }
  }
});

test("damage of any length is replaced by frames that every reader accepts", async () => {
  for (const mib of [15, 17, 30, 33]) {
    using dir = tempDir();
    const journal = await openJournal({ directory: dir.path });
    await journal.append(event("a"));
    const lines = Buffer.alloc(event("b").length * 20_000, event("b"));
    const from = journal.end();
    while (journal.end() - from < mib * 1024 * 1024) await journal.append(lines);
    const to = journal.end();
    await journal.append(event("c"));
    await journal.close();
    const path = dir.file("eventsPost.jsonl");
    const bytes = readFileSync(path);
    writeFileSync(path, bytes.fill(0, from, to - 1));
    const { id, files } = await checkJournal(path, disk);
    for (const file of files) await repairFile(file, id as string, disk);
    expect(await damageOf(path)).toEqual([]);
    const reader = await openJournalReader(path);
    expect((await reader?.read(to))?.[0]?.payload.toString()).toBe(event("c").toString());
  }
});

test("of damage that was posted in part both parts are reported, and what follows is posted", async () => {
  await using desk = await openDesk();
  const [, posted = 0] = await append(desk.dir.path, "ab");
  expect((await desk.tool(desk.path)).code).toBe(0);
  const [end = 0] = await append(desk.dir.path, "cde");
  const bytes = readFileSync(desk.path);
  writeFileSync(desk.path, bytes.fill(0, posted - 30, posted + 30));
  const { code, stdout } = await desk.tool("--check", "--repair");
  expect(code).toBe(0);
  expect(stdout).toContain("they had been posted");
  expect(stdout).toContain("they had not been posted: 1 of their lines are still events");
  expect((await desk.tool("--check")).code).toBe(0);
  expect((await openJournalReader(desk.path).then((reader) => reader?.read(end)))?.length).toBe(2);
  await using server = await startApp({ dataDir: desk.dir.path, databaseUrl: desk.url });
  await server.post(event("f").toString());
  await until(async () => (await server.balance("f")) === "1");
  expect(Object.keys(await balances(desk.url))).toEqual([..."abdef"]);
});

test("a repair that dies between its steps can be repeated", async () => {
  await using desk = await openDesk();
  await append(desk.dir.path, "abc");
  expect((await desk.tool(desk.path)).code).toBe(0);
  change(desk.path, readFileSync(desk.path).length - 4);
  const database = openDatabase(() => desk.url, "test", 1);
  const dying = repair(desk.path, database, () => {
    throw new Error("killed");
  });
  await expect(dying).rejects.toThrow("killed");
  await database.close();
  expect((await desk.tool("--check", "--repair")).code).toBe(0);
  await append(desk.dir.path, "d");
  expect(await desk.tool(desk.path)).toMatchObject({ code: 0, stderr: "" });
  expect(Object.keys(await balances(desk.url))).toEqual([..."abcd"]);
});

test("the command that a repair prints posts the events that it has moved aside", async () => {
  await using desk = await openDesk();
  const journal = await openJournal({ directory: desk.dir.path });
  await journal.append(event("a"));
  const end = await journal.append(Buffer.concat([event("b"), event("c"), event("d")]));
  await journal.append(event("e"));
  await journal.close();
  change(desk.path, end - 20); // of the last event's value or name
  const { stdout } = await desk.tool("--check", "--repair");
  const [, command = ""] = /bun run processor\.ts (\S+) posts them/.exec(stdout) ?? [];
  expect((await desk.tool(command)).code).toBe(0);
  await desk.tool(desk.path);
  expect(Object.keys(await balances(desk.url))).toEqual([..."abce"]);
});

test("lost bytes prevent neither the deletion of segments nor a rebuild with --yes", async () => {
  await using desk = await openDesk();
  await append(desk.dir.path, "abcdef", 300);
  expect((await desk.tool(desk.path)).code).toBe(0);
  const [first = ""] = readdirSync(desk.dir.path).filter((name) => /\.0\.jsonl$/.test(name));
  change(desk.dir.file(first), readFileSync(desk.dir.file(first)).indexOf("userId"));
  expect((await desk.tool("--check", "--repair")).code).toBe(0);
  const { code, stderr, stdout } = await desk.tool("--rebuild");
  expect(stderr, stdout).toContain("--yes");
  expect(code).toBe(2);
  {
    const app = { dataDir: desk.dir.path, databaseUrl: desk.url };
    await using server = await startApp({ ...app, env: { JOURNAL_KEEP_DAYS: "0" } });
    await server.post(event("g").toString());
    await until(() => !readdirSync(desk.dir.path).includes(first), 20_000);
    await until(() => server.balance("g"));
  }
  expect((await desk.tool("--verify")).stdout).toContain("1 of 7 balances differ");
  expect((await desk.tool("--rebuild", "--yes")).code).toBe(0);
  expect((await desk.tool("--verify")).code).toBe(0);
});

test("the last file of a journal is kept while no other one says which journal it is", async () => {
  await using desk = await openDesk();
  await append(desk.dir.path, "abc", 100);
  expect((await desk.tool(desk.path)).code).toBe(0);
  const { base } = JSON.parse(readFileSync(desk.path, "utf8").split("\n")[0] ?? "") as {
    base: number;
  };
  const last = `eventsPost.${base}.jsonl`;
  renameSync(desk.path, desk.dir.file(last));
  const id = (await openJournalReader(desk.path))?.id;
  const app = { dataDir: desk.dir.path, databaseUrl: desk.url };
  const env = { ...desk.env, JOURNAL_KEEP_DAYS: "0" };
  const kept = () => readdirSync(desk.dir.path).filter((name) => /\.\d+\.jsonl$/.test(name));
  {
    await using processor = spawn("processor.ts", { env });
    await until(() => kept().length === 1, 20_000);
    await Bun.sleep(100);
    processor.kill("SIGTERM");
    await processor.exit();
  }
  expect(kept()).toEqual([last]);
  await using server = await startApp(app);
  expect((await (await server.post(event("d").toString())).text()).includes(id as string)).toBe(
    true,
  );
});

test("a plain file may have neighbours with numbers in their names", async () => {
  await using desk = await openDesk();
  const plain = desk.dir.file("events.jsonl");
  writeFileSync(plain, event("a"));
  writeFileSync(desk.dir.file("events.1.jsonl"), event("b"));
  writeFileSync(desk.dir.file("events.20240101.jsonl"), event("c"));
  expect(await desk.tool(plain)).toMatchObject({ code: 0, stderr: "" });
  expect(await balances(desk.url)).toEqual({ a: "1" });
  expect((await desk.tool("--verify", plain)).code).toBe(0);
});

test("all files of a journal, or one of its segments, stand for the journal, also while the active file is missing", async () => {
  await using desk = await openDesk();
  await append(desk.dir.path, "abc", 100);
  const all = readdirSync(desk.dir.path).filter((name) => /^eventsPost.*\.jsonl$/.test(name));
  const paths = all.map((name) => desk.dir.file(name));
  expect((await desk.tool(desk.path)).stdout).toStartWith("posted 3 events");
  for (const given of [paths, [desk.dir.file("eventsPost.0.jsonl")]])
    expect(await desk.tool(...given)).toMatchObject({ code: 0, stderr: "" });
  expect((await desk.tool("--verify", ...paths)).code).toBe(0);
  rmSync(desk.path);
  for (const tool of [[], ["--check"], ["--verify"]])
    expect((await desk.tool(...tool, desk.path)).stderr).not.toContain("no such file");
});
