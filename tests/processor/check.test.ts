/** Damage in a journal is found wherever it is, and taken out without moving a single position. */
import { expect, setDefaultTimeout, test } from "bun:test";
import {
  existsSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";

import { disk, type ReadableFile } from "../../lib/journal/disk.ts";
import { type CheckedFile, checkJournal } from "../../lib/journal/check.ts";
import { repairFile } from "../../lib/journal/repair.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { openProxy } from "../support/network.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { IS_LONG, seeded } from "../support/random.ts";

setDefaultTimeout(60_000);

/** A journal of `frames` frames in segments; the value of each event is its number. */
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

async function damageOf(path: string) {
  const { files } = await checkJournal(path, disk);
  return files.flatMap(({ damage }) => damage);
}

test("--check reports an intact journal as such, with the number of its frames", async () => {
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
  expect(existsSync(join(dir.path, "postgres"))).toBe(false); // the ledger is not needed
});

test("a torn tail is not damage", async () => {
  using dir = tempDir();
  const { path } = await makeJournal(dir.path, 5, 10_000);
  truncateSync(path, statSync(path).size - 3);
  const { files } = await checkJournal(path, disk);
  expect(files[0]).toMatchObject({ frames: 4, damage: [] });
  expect(files[0]?.tornBytes).toBeGreaterThan(10);
});

/** A journal of 30 frames in small segments, and one of its segments. */
async function makeSegments(directory: string, random: () => number) {
  const { path } = await makeJournal(directory, 30, 200 + random() * 2000);
  const segments = filesOf(directory).filter((name) => name !== "eventsPost.jsonl");
  const name = segments[Math.floor(random() * segments.length)] as string;
  const segment = join(directory, name);
  return { path, segment, base: Number(name.split(".")[1]), bytes: readFileSync(segment) };
}

const junkOf = (random: () => number, length: number) =>
  Buffer.from(Array.from({ length }, () => Math.floor(random() * 256)));

test(
  "whatever bytes are overwritten, a repair keeps every other frame at its position",
  seeded(async (random) => {
    for (let round = 0; round < (IS_LONG ? 200 : 40); round++) {
      using dir = tempDir();
      const { path, segment, base, bytes } = await makeSegments(dir.path, random);
      const before = await readFrames(path);
      const from = Math.floor(random() * bytes.length);
      const length = Math.floor(random() ** 3 * Math.min(400, bytes.length - from));
      junkOf(random, length).copy(bytes, from);
      writeFileSync(segment, bytes);

      const checked = await checkJournal(path, disk);
      for (const file of checked.files)
        if (file.damage.length > 0) await repairFile(file, checked.id ?? "", disk);
      const detail = `${length} bytes at ${from} of ${segment} (${bytes.length})`;
      expect(await damageOf(path), detail).toEqual([]);
      const kept = await readFrames(path);
      for (const [position, line] of before) {
        // A frame that touches the overwritten bytes may be lost, and no other.
        const isSpared = position + 130 < base + from || position > base + from + length;
        if (isSpared) expect(kept.get(position), `${detail}: frame ${position}`).toBe(line);
      }
      for (const [position, line] of kept)
        if (!line.startsWith('{"lost":') && line !== "")
          expect(before.get(position), detail).toBe(line);
      await (await openJournal({ directory: dir.path })).close();
    }
  }),
);

test(
  "a segment in which bytes were inserted or removed is reported, and no repair touches it",
  seeded(async (random) => {
    for (let round = 0; round < (IS_LONG ? 100 : 20); round++) {
      using dir = tempDir();
      const { path, segment, base, bytes } = await makeSegments(dir.path, random);
      const from = Math.floor(random() * bytes.length);
      const length = 1 + Math.floor(random() ** 3 * Math.min(400, bytes.length - from - 1));
      const isInserted = random() < 0.5;
      const put = isInserted ? junkOf(random, length) : Buffer.alloc(0);
      const rest = bytes.subarray(from + (isInserted ? 0 : length));
      const changed = Buffer.concat([bytes.subarray(0, from), put, rest]);
      writeFileSync(segment, changed);

      const { id, files } = await checkJournal(path, disk);
      const file = files.find((each) => each.path === segment) as CheckedFile;
      expect(file.damage.at(-1)?.what).toBe(
        `it ends at position ${base + changed.length}, but the next file begins at ${base + bytes.length}`,
      );
      await expect(repairFile(file, id ?? "", disk)).rejects.toThrow("restore it from a copy");
      expect(readFileSync(segment)).toEqual(changed);
      expect(readdirSync(dir.path).filter((name) => /lost|repairing/.test(name))).toEqual([]);
    }
  }),
);

test("--repair changes no file of a journal that holds one of the wrong length", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const env = { DATA_DIR: dir.path, DATABASE_URL: database.url };
  const { path } = await makeJournal(dir.path, 10, 400);
  const [first = "", second = ""] = filesOf(dir.path)
    .filter((name) => name !== "eventsPost.jsonl")
    .toSorted((a, b) => Number(a.split(".")[1]) - Number(b.split(".")[1]));
  const rotten = readFileSync(dir.file(first)).fill("x", 100, 110);
  writeFileSync(dir.file(first), rotten);
  const cut = readFileSync(dir.file(second)).subarray(0, -1);
  writeFileSync(dir.file(second), cut);
  expect((await run("processor.ts", { args: ["--check"], env })).code).toBe(1);
  const repaired = await run("processor.ts", { args: ["--check", "--repair", path], env });
  expect(repaired.code).toBe(3);
  expect(repaired.stderr).toContain(`cannot repair ${dir.file(second)}`);
  expect(readFileSync(dir.file(first))).toEqual(rotten);
  expect(readFileSync(dir.file(second))).toEqual(cut);
});

test("a check ends although the journal keeps growing", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path, segmentBytes: 300 });
  const add = () => journal.append(Buffer.from(`${"x".repeat(200)}\n`));
  for (let i = 0; i < 20; i++) await add();
  let reads = 0;
  const growing = {
    ...disk,
    async withFile<T>(path: string, use: (file: ReadableFile) => T | Promise<T>) {
      if (++reads % 10 === 0) await add(); // a segment fills up while the others are being read
      if (reads > 2_000) throw new Error("the check does not end");
      return disk.withFile(path, use);
    },
  };
  const { files } = await checkJournal(dir.file("eventsPost.jsonl"), growing);
  expect(files.flatMap(({ damage }) => damage)).toEqual([]);
  expect(files.length).toBeGreaterThan(20);
  await journal.close();
});

test("segments that are deleted during a check are not damage", async () => {
  using dir = tempDir();
  const { path } = await makeJournal(dir.path, 30, 300);
  const segments = filesOf(dir.path)
    .filter((name) => name !== "eventsPost.jsonl")
    .toSorted((a, b) => Number(a.split(".")[1]) - Number(b.split(".")[1]));
  const deleting = {
    ...disk,
    async withFile<T>(name: string, use: (file: ReadableFile) => T | Promise<T>) {
      // When the third one is about to be checked, a processor has just deleted the first four.
      if (name === dir.file(segments[2] ?? ""))
        for (const old of segments.slice(0, 4)) rmSync(dir.file(old), { force: true });
      return disk.withFile(name, use);
    },
  };
  const { files } = await checkJournal(path, deleting);
  expect(files.flatMap(({ damage }) => damage)).toEqual([]);
  expect(files.map((file) => file.path)).toEqual([...segments.slice(4).map(dir.file), path]);
});

test("a damaged frame is named and moved aside, and everything else is posted once", async () => {
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
    expect(await stopped.exit()).toBe(1); // until an operator has repaired it
  }
  const repaired = await run("processor.ts", { args: ["--check", "--repair"], env });
  expect(repaired.code).toBe(0);
  const [aside = ""] = /\S+\.lost-\d+/.exec(repaired.stdout) ?? [];
  expect(readFileSync(aside, "latin1")).toContain('"value":5');
  expect(repaired.stdout).toContain("1 of their lines are still events");
  expect((await run("processor.ts", { args: ["--check"], env })).code).toBe(0);

  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  await server.post({ userId: "new", name: "add_revenue", value: 1 });
  await until(async () => (await server.balance("new")) === "1");
  expect(await server.balance("u")).toBe("41");
});

test("damage to what had been posted stops the start, and after a repair posting resumes", async () => {
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
  expect(repaired.stdout).toContain("they had been posted: the balances include their events");
  expect(repaired.code).toBe(0);
  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  await server.post({ userId: "u", name: "add_revenue", value: 1 });
  await until(async () => (await server.balance("u")) === "46");

  // What was lost cannot be counted again: it is reported, and not subtracted without consent.
  const verified = await run("processor.ts", { args: ["--verify"], env });
  expect(verified.code).toBe(1);
  expect(verified.stdout).toContain('user "u": balance 46, expected 37; off by 9');
  expect(verified.stdout).toContain("ranges of a journal marked as lost by --repair: 1");
  const rebuilt = await run("processor.ts", { args: ["--rebuild"], env });
  expect(rebuilt.code).toBe(2);
  expect(await balances(database.url)).toEqual({ u: "46" });
});

/** A journal that ends before what the ledger at `databaseUrl` has posted of it. */
async function restoreOlder(folder: string, databaseUrl: string) {
  const env = { DATA_DIR: folder, DATABASE_URL: databaseUrl };
  const { path } = await makeJournal(folder, 5, 10_000);
  const older = readFileSync(path);
  await makeJournal(folder, 5, 10_000);
  expect((await run("processor.ts", { args: [path], env })).code).toBe(0);
  writeFileSync(path, older);
  return { path, env };
}

test("a server that started on an older copy during a database outage ends when the database is back", async () => {
  await using database = await testDatabase();
  await using way = await openProxy(database.url);
  using dir = tempDir();
  await restoreOlder(dir.path, database.url);
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

test("an older copy that was restored and has grown since is named, and nothing of it is posted", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const { path, env } = await restoreOlder(dir.path, database.url);
  await makeJournal(dir.path, 20, 10_000);
  const refused = await run("processor.ts", { args: [path], env });
  expect(refused.stderr).toContain("the ledger has posted another frame at position");
  expect(refused.code).toBe(3);
  expect(await balances(database.url)).toEqual({ u: "20" });
});

test("--repair is refused while a server writes, and --check is not", async () => {
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

test("--repair without --check is invalid use", async () => {
  const { code, stderr } = await run("processor.ts", { args: ["--repair"] });
  expect(code).toBe(2);
  expect(stderr).toContain("--repair requires --check");
});
