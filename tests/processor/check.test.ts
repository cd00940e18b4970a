/** --check finds damage anywhere in a journal, and --repair replaces it without moving any position. */
import { expect, setDefaultTimeout, test } from "bun:test";
import {
  existsSync,
  readdirSync,
  readFileSync,
  renameSync,
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
import { event, line } from "../support/events.ts";
import { readFrames, segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import { run, spawn, tempDir, until, untilBalance } from "../support/programs.ts";
import { IS_LONG, seeded } from "../support/random.ts";

setDefaultTimeout(60_000);

/** A journal of `frames` frames in segments; the value of each event is its number. */
async function makeJournal(directory: string, frames: number, segmentBytes: number) {
  const journal = await openJournal({ directory, segmentBytes });
  for (let i = 0; i < frames; i++) await journal.append(Buffer.from(line("u", i)));
  await journal.close();
  return { path: `${directory}/eventsPost.jsonl`, end: journal.end() };
}

/** The lines of each frame of the journal at `path`, by the position at which it begins. */
async function linesByPosition(path: string): Promise<Map<number, string>> {
  const frames = await readFrames(path);
  return new Map(frames.map(({ from, payload }) => [from, payload.toString().trim()]));
}

async function damageOf(path: string) {
  const { files } = await checkJournal(path, disk);
  return files.flatMap(({ damage }) => damage);
}

test("--check counts the frames of an intact journal, and needs no ledger", async () => {
  using dir = tempDir();
  await makeJournal(dir.path, 50, 700);
  const { code, stdout } = await run("processor.ts", {
    args: ["--check"],
    env: { DATA_DIR: dir.path },
  });
  expect(code).toBe(0);
  expect(stdout).toContain(
    `50 whole frames in ${segmentNames(dir.path).length + 1} files; nothing is damaged`,
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
  const segments = segmentNames(directory);
  const name = segments[Math.floor(random() * segments.length)] as string;
  const segment = join(directory, name);
  return { path, segment, base: Number(name.split(".")[1]), bytes: readFileSync(segment) };
}

const junkOf = (random: () => number, length: number) =>
  Buffer.from(Array.from({ length }, () => Math.floor(random() * 256)));

test(
  "--repair keeps every frame that was not overwritten at its position, whatever bytes were overwritten",
  seeded(async (random) => {
    for (let round = 0; round < (IS_LONG ? 200 : 40); round++) {
      using dir = tempDir();
      const { path, segment, base, bytes } = await makeSegments(dir.path, random);
      const before = await linesByPosition(path);
      const from = Math.floor(random() * bytes.length);
      const length = Math.floor(random() ** 3 * Math.min(400, bytes.length - from));
      junkOf(random, length).copy(bytes, from);
      writeFileSync(segment, bytes);

      const checked = await checkJournal(path, disk);
      for (const file of checked.files)
        if (file.damage.length > 0) await repairFile(file, checked.id ?? "", disk);
      const detail = `${length} bytes at ${from} of ${segment} (${bytes.length})`;
      expect(await damageOf(path), detail).toEqual([]);
      const kept = await linesByPosition(path);
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
  "a segment in which bytes were inserted or removed is reported, and --repair does not change it",
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

test("--repair changes no file of a journal if one of them has the wrong length", async () => {
  await using ledger = await openLedger();
  const { path } = await makeJournal(ledger.dataDir, 10, 400);
  const [first = "", second = ""] = segmentNames(ledger.dataDir).map((name) =>
    join(ledger.dataDir, name),
  );
  const rotten = readFileSync(first).fill("x", 100, 110);
  writeFileSync(first, rotten);
  const cut = readFileSync(second).subarray(0, -1);
  writeFileSync(second, cut);
  expect((await ledger.tool(["--check"])).code).toBe(1);
  const repaired = await ledger.tool(["--check", "--repair", path]);
  expect(repaired.code).toBe(3);
  expect(repaired.stderr).toContain(`cannot repair ${second}`);
  expect(readFileSync(first)).toEqual(rotten);
  expect(readFileSync(second)).toEqual(cut);
});

test("--check ends although the journal keeps growing", async () => {
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
  const segments = segmentNames(dir.path);
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

test("--repair reports a damaged frame and moves it aside, and everything else is posted once", async () => {
  await using ledger = await openLedger();
  const { path } = await makeJournal(ledger.dataDir, 10, 10_000);
  const text = readFileSync(path, "latin1");
  writeFileSync(path, text.replace('"value":4', '"value":5'), "latin1");

  const checked = await ledger.tool(["--check"]);
  expect(checked.code).toBe(1);
  expect(checked.stdout).toContain(`damaged from byte ${text.indexOf('{"frame"', 500)}`);
  {
    await using stopped = spawn("app.ts", { env: ledger.env });
    expect(await stopped.exit()).toBe(1); // until --repair
  }
  const repaired = await ledger.tool(["--check", "--repair"]);
  expect(repaired.code).toBe(0);
  const [aside = ""] = /\S+\.lost-\d+/.exec(repaired.stdout) ?? [];
  expect(readFileSync(aside, "latin1")).toContain('"value":5');
  expect(repaired.stdout).toContain("1 of their lines are still events");
  expect((await ledger.tool(["--check"])).code).toBe(0);

  await using server = await ledger.start();
  await server.post(event("new"));
  await untilBalance(server, "new", "1");
  expect(await server.balance("u")).toBe("41");
});

test("a server does not start if frames that were posted are damaged, and posting resumes after --repair", async () => {
  await using ledger = await openLedger();
  const { path } = await makeJournal(ledger.dataDir, 10, 600);
  expect((await ledger.tool([path])).code).toBe(0);
  const bytes = readFileSync(path);
  bytes[bytes.length - 10] = 0; // in the very last frame: to the journal alone, a torn one
  writeFileSync(path, bytes);
  {
    await using stopped = spawn("app.ts", { env: ledger.env });
    expect(await stopped.exit()).toBe(1);
    expect(stopped.stderr.text()).toContain("but the ledger has posted it up to");
    expect(stopped.stdout.text()).toBe(""); // it never listened
  }
  const repaired = await ledger.tool(["--check", "--repair"]);
  expect(repaired.stdout).toContain("they had been posted: the balances include their events");
  expect(repaired.code).toBe(0);
  await using server = await ledger.start();
  await server.post(event("u"));
  await untilBalance(server, "u", "46");

  // Lost events cannot be counted again. They are reported, and subtracted only with --yes.
  const verified = await ledger.tool(["--verify"]);
  expect(verified.code).toBe(1);
  expect(verified.stdout).toContain('user "u": balance 46, expected 37; off by 9');
  expect(verified.stdout).toContain("ranges of a journal marked as lost by --repair: 1");
  const rebuilt = await ledger.tool(["--rebuild"]);
  expect(rebuilt.code).toBe(2);
  expect(await ledger.balances()).toEqual({ u: "46" });
});

type Ledger = Awaited<ReturnType<typeof openLedger>>;

/** Replaces the journal by an older copy, which ends before the position that the ledger has posted. */
async function restoreOlder(ledger: Ledger): Promise<void> {
  await makeJournal(ledger.dataDir, 5, 10_000);
  const older = readFileSync(ledger.journal);
  await makeJournal(ledger.dataDir, 5, 10_000);
  expect((await ledger.tool([ledger.journal])).code).toBe(0);
  writeFileSync(ledger.journal, older);
}

test("a server that starts on an older copy during a database outage exits with 1 when the database returns", async () => {
  await using ledger = await openLedger();
  await using proxy = await openProxy(ledger.url);
  await restoreOlder(ledger);
  proxy.cut();
  await using server = await ledger.start({ DATABASE_URL: proxy.url }, ["--no-processor"]);
  await until(() => proxy.refused() > 1);
  expect(server.child.exitCode).toBeNull();
  expect((await server.post(event("new"))).status).toBe(201);
  proxy.mend();
  await until(() => server.child.exitCode !== null);
  expect(await server.exit()).toBe(1);
  expect(server.stderr.text()).toContain("but the ledger has posted it up to");
  expect(server.stderr.text()).toMatch(
    /events after position \d+ were accepted since this server started/,
  );
});

test("nothing of an older copy that has grown since it was restored is posted, and the error says so", async () => {
  await using ledger = await openLedger();
  await restoreOlder(ledger);
  await makeJournal(ledger.dataDir, 20, 10_000);
  const refused = await ledger.tool([ledger.journal]);
  expect(refused.stderr).toContain("the ledger has posted another frame at position");
  expect(refused.code).toBe(3);
  expect(await ledger.balances()).toEqual({ u: "20" });
  // As it says.
  const [, key = ""] = /--retire (journal:\S+) --yes/.exec(refused.stderr) ?? [];
  renameSync(ledger.journal, ledger.file("moved.jsonl"));
  expect(await ledger.tool(["--retire", key, "--yes"])).toMatchObject({ code: 0 });
  await using server = await ledger.start();
  await server.post(event("u"));
  await untilBalance(server, "u", "21");
  expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
});

test("while a server writes, --check works and --repair is refused", async () => {
  await using ledger = await openLedger();
  await using server = await ledger.start();
  const sending = (async () => {
    for (let i = 0; i < 200; i++) await server.post(event("a"));
  })();
  const checked = await ledger.tool(["--check"]);
  expect(checked.stdout).toContain("nothing is damaged");
  expect(checked.code).toBe(0);
  const repaired = await ledger.tool(["--check", "--repair"]);
  expect(repaired.code).toBe(3);
  expect(repaired.stderr).toContain("is being written by another process; stop it first");
  await sending;
});

test("--repair without --check is invalid use", async () => {
  const { code, stderr } = await run("processor.ts", { args: ["--repair"] });
  expect(code).toBe(2);
  expect(stderr).toContain("--repair requires --check");
});
