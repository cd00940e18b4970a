/** Damage in a journal: found wherever it is, taken out without moving a single position. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { disk, type ReadableFile } from "../../lib/journal/disk.ts";
import { checkJournal } from "../../lib/journal/check.ts";
import { repairFile } from "../../lib/journal/repair.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { openProxy } from "../support/network.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { IS_LONG, seeded } from "../support/random.ts";

setDefaultTimeout(60_000);

/** A journal of so many frames in segments; each line says which it is. */
async function makeJournal(directory: string, frames: number, segmentBytes: number) {
  const journal = await openJournal({ directory, segmentBytes });
  for (let i = 0; i < frames; i++)
    await journal.append(Buffer.from(`{"userId":"u","name":"add_revenue","value":${i}}\n`));
  await journal.close();
  return { path: `${directory}/eventsPost.jsonl`, end: journal.end() };
}

async function readFrames(path: string) {
  const reader = await openJournalReader(path);
  const found = new Map<number, string>();
  for (let position = reader?.start ?? 0; reader;) {
    const frames = await reader.read(position);
    if (frames.length === 0) break;
    for (const { payload, to, from } of frames) {
      found.set(from, payload.toString().trim());
      position = to;
    }
  }
  return found;
}

const filesOf = (directory: string) =>
  readdirSync(directory).filter((name) => /^eventsPost(\.\d+)?\.jsonl$/.test(name));

test("a whole journal is said to be whole, with its frames", async () => {
  using dir = tempDir();
  await makeJournal(dir.path, 50, 700);
  const { code, stdout } = await run("processor.ts", {
    args: ["--check"],
    env: { DATA_DIR: dir.path },
  });
  expect(code).toBe(0);
  expect(stdout).toContain(
    `50 whole frames in ${filesOf(dir.path).length} files; nothing is damaged`,
  );
  expect(existsSync(join(dir.path, "postgres"))).toBe(false); // it asks no ledger
});

test("a torn tail is no damage", async () => {
  using dir = tempDir();
  const { path } = await makeJournal(dir.path, 5, 10_000);
  truncateSync(path, statSync(path).size - 3);
  const { files } = await checkJournal(path, disk);
  expect(files[0]).toMatchObject({ frames: 4, damage: [] });
  expect(files[0]?.tornBytes).toBeGreaterThan(10);
});

test(
  "whatever bytes are overwritten, put in or taken away: every frame that was spared stays where it was",
  seeded(async (random) => {
    for (let round = 0; round < (IS_LONG ? 300 : 60); round++) {
      using dir = tempDir();
      const { path } = await makeJournal(dir.path, 30, 200 + random() * 2000);
      const before = await readFrames(path);
      const files = filesOf(dir.path).filter((name) => name !== "eventsPost.jsonl");
      const name = files[Math.floor(random() * files.length)] as string;
      const base = Number(name.split(".")[1]);
      const bytes = readFileSync(dir.file(name));
      const from = Math.floor(random() * bytes.length);
      const length = Math.floor(random() ** 3 * Math.min(400, bytes.length - from));
      const junk = Buffer.from(Array.from({ length }, () => Math.floor(random() * 256)));
      const kind = ["overwrite", "insert", "delete"][Math.floor(random() * 3)];
      const rest = bytes.subarray(from + (kind === "insert" ? 0 : length));
      // The time of a frame is under no checksum: digits that it lacks shift what follows.
      if (kind === "delete" && /^\d*$/.test(bytes.toString("latin1", from, from + length)))
        continue;
      const put = kind === "delete" ? [] : [junk];
      writeFileSync(dir.file(name), Buffer.concat([bytes.subarray(0, from), ...put, rest]));

      const checked = await checkJournal(path, disk);
      // Whole frames, or digits of a frame's time, may be taken away or put in: that only shows in
      // the length of the file, and what follows is not where it was.
      const isSeen = checked.files
        .flatMap(({ damage }) => damage)
        .some(({ what }) => !what.startsWith("the next file begins"));
      for (const file of checked.files)
        if (file.damage.length > 0) await repairFile(file, checked.id ?? "", disk);
      const after = await checkJournal(path, disk);
      const told = `${kind} ${length} at ${from} of ${name} (${bytes.length})`;
      expect(
        after.files.flatMap(({ damage }) => damage),
        told,
      ).toEqual([]);
      const kept = await readFrames(path);
      for (const [position, line] of before) {
        const at = position - base;
        // What lies in the file and touches what was changed may be lost; nothing else.
        const spared =
          position < base ||
          at >= bytes.length ||
          position + 130 < base + from ||
          (isSeen && at > from + length);
        if (spared) expect(kept.get(position), `${told}: frame ${position}`).toBe(line);
      }
      for (const [position, line] of kept)
        if (!line.startsWith('{"lost":') && line !== "")
          expect(isSeen ? before.get(position) : line, told).toBe(line);
      await (await openJournal({ directory: dir.path })).close();
    }
  }),
);

test("a check ends although the journal goes on growing", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path, segmentBytes: 300 });
  const add = () => journal.append(Buffer.from(`${"x".repeat(200)}\n`));
  for (let i = 0; i < 20; i++) await add();
  let reads = 0;
  const growing = {
    ...disk,
    async withFile<T>(path: string, use: (file: ReadableFile) => T | Promise<T>) {
      if (++reads % 30 === 0) await add(); // a file becomes full in less time than all are read in
      if (reads > 2_000) throw new Error("it does not end");
      return disk.withFile(path, use);
    },
  };
  const { files } = await checkJournal(dir.file("eventsPost.jsonl"), growing);
  expect(files.flatMap(({ damage }) => damage)).toEqual([]);
  expect(files.length).toBeGreaterThan(20);
  await journal.close();
});

test("a damaged frame is named, moved aside, and everything else is posted once", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const env = { DATA_DIR: dir.path, DATABASE_URL: database.url };
  const { path } = await makeJournal(dir.path, 10, 10_000);
  const text = readFileSync(path, "latin1");
  writeFileSync(path, text.replace('"value":4', '"value":5'), "latin1");

  const checked = await run("processor.ts", { args: ["--check"], env });
  expect(checked.code).toBe(1);
  expect(checked.stdout).toContain(`damaged from byte ${text.indexOf('{"frame"', 500)}`);
  {
    await using stopped = spawn("app.ts", { env });
    expect(await stopped.exit()).toBe(1); // but not before somebody has looked at it
  }
  const repaired = await run("processor.ts", { args: ["--check", "--repair"], env });
  expect(repaired.code).toBe(0);
  const [aside = ""] = /\S+\.lost-\d+/.exec(repaired.stdout) ?? [];
  expect(readFileSync(aside, "latin1")).toContain('"value":5');
  expect(repaired.stdout).toContain("1 of its lines still are events");
  expect((await run("processor.ts", { args: ["--check"], env })).code).toBe(0);

  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  await server.post({ userId: "new", name: "add_revenue", value: 1 });
  await until(async () => (await server.balance("new")) === "1");
  expect(await server.balance("u")).toBe("41");
});

test("what was damaged after it had been posted stops the start; mended, everything goes on", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const env = { DATA_DIR: dir.path, DATABASE_URL: database.url };
  const { path } = await makeJournal(dir.path, 10, 600);
  expect((await run("processor.ts", { args: [path], env })).code).toBe(0);
  const bytes = readFileSync(path);
  bytes[bytes.length - 10] = 0; // in the very last frame: to the journal alone, a torn one
  writeFileSync(path, bytes);
  {
    await using stopped = spawn("app.ts", { env });
    expect(await stopped.exit()).toBe(1);
    expect(stopped.stderr.text()).toContain("but the ledger has posted it up to");
  }
  const repaired = await run("processor.ts", { args: ["--check", "--repair"], env });
  expect(repaired.stdout).toContain("it had been posted: the balances have its events");
  expect(repaired.code).toBe(0);
  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  await server.post({ userId: "u", name: "add_revenue", value: 1 });
  await until(async () => (await server.balance("u")) === "46");

  // What was lost can be counted by nobody again: it is told, and not taken away unasked.
  const verified = await run("processor.ts", { args: ["--verify"], env });
  expect(verified.code).toBe(1);
  expect(verified.stdout).toContain('user "u": balance 46, wanted 37; off by 9');
  expect(verified.stdout).toContain("1 ranges of a journal are lost");
  const rebuilt = await run("processor.ts", { args: ["--rebuild"], env });
  expect(rebuilt.code).toBe(2);
  expect(await balances(database.url)).toEqual({ u: "46" });
});

/** A journal that ends before what the ledger at `databaseUrl` has posted of it. */
async function putBackOlder(folder: string, databaseUrl: string) {
  const env = { DATA_DIR: folder, DATABASE_URL: databaseUrl };
  const { path } = await makeJournal(folder, 5, 10_000);
  const older = readFileSync(path);
  await makeJournal(folder, 5, 10_000);
  expect((await run("processor.ts", { args: [path], env })).code).toBe(0);
  writeFileSync(path, older);
  return { path, env };
}

test("a server that has begun on an older copy while the database was away ends once that is back", async () => {
  await using database = await testDatabase();
  await using way = await openProxy(database.url);
  using dir = tempDir();
  await putBackOlder(dir.path, database.url);
  way.cut();
  const args = ["--no-processor"];
  await using server = await startApp({ dataDir: dir.path, databaseUrl: way.url, args });
  await until(() => way.refused() > 1);
  expect(server.child.exitCode).toBeNull();
  way.mend();
  await until(() => server.child.exitCode !== null);
  expect(await server.exit()).toBe(1);
  expect(server.stderr.text()).toContain("but the ledger has posted it up to");
});

test("an older copy that was put back and has grown since is named, and nothing of it is posted", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const { path, env } = await putBackOlder(dir.path, database.url);
  await makeJournal(dir.path, 20, 10_000);
  const refused = await run("processor.ts", { args: [path], env });
  expect(refused.stderr).toContain("the ledger has posted another frame here");
  expect(refused.code).toBe(3);
  expect(await balances(database.url)).toEqual({ u: "20" });
});

test("--repair refuses while the server writes, and --check does not", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  const env = { DATA_DIR: dir.path, DATABASE_URL: database.url };
  const sending = (async () => {
    for (let i = 0; i < 200; i++) await server.post({ userId: "a", name: "add_revenue", value: 1 });
  })();
  const checked = await run("processor.ts", { args: ["--check"], env });
  expect(checked.stdout).toContain("nothing is damaged");
  expect(checked.code).toBe(0);
  const repaired = await run("processor.ts", { args: ["--check", "--repair"], env });
  expect(repaired.code).toBe(3);
  expect(repaired.stderr).toContain("is being written by another process; stop it first");
  await sending;
});

test("--repair alone is wrong use", async () => {
  const { code, stderr } = await run("processor.ts", { args: ["--repair"] });
  expect(code).toBe(2);
  expect(stderr).toContain("--repair: found alone, wanted with --check");
});
