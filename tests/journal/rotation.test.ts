/** A journal in several files: what holds for one file also holds across segments. */
import { expect, setDefaultTimeout, test } from "bun:test";
import {
  copyFileSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
} from "node:fs";

import { openDatabase } from "../../lib/ledger/database.ts";
import { BatchLimit } from "../../lib/processor/fold.ts";
import { type Disk, disk, type ReadableFile } from "../../lib/journal/disk.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { post } from "../../lib/ledger/ledger.ts";
import { listSegments } from "../../lib/journal/segments.ts";
import { openJournalBatches } from "../../lib/processor/batches.ts";
import { postFile } from "../../lib/processor/posting.ts";
import type { Report } from "../../lib/processor/supervisor.ts";
import { openSources } from "../../lib/server/sources.ts";
import { event } from "../support/events.ts";
import { readFrames, readLines, segmentNames } from "../support/journal.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until, untilBalance } from "../support/programs.ts";
import { IS_LONG } from "../support/random.ts";

setDefaultTimeout(60_000);

const line = (text: string) => Buffer.from(`${text}\n`);

/** The real disk, with a call of `before` before each read of a file. */
function onRead(before: (path: string, from: number) => Promise<void>): Disk {
  return {
    ...disk,
    withFile: (path, use) =>
      disk.withFile(path, (file) =>
        use({
          ...file,
          async read(from, to) {
            await before(path, from);
            return file.read(from, to);
          },
        }),
      ),
  };
}

/** A journal of ten appends in files of at most 300 bytes. */
async function rotated(directory: string) {
  const journal = await openJournal({ directory, segmentBytes: 300 });
  const positions: number[] = [];
  for (let i = 0; i < 10; i++) positions.push(await journal.append(line(`${i}`)));
  await journal.close();
  return { id: journal.id, positions };
}

test("a full file becomes a segment named by its base, and positions continue", async () => {
  using dir = tempDir();
  const { id, positions } = await rotated(dir.path);
  const files = [...segmentNames(dir.path), "eventsPost.jsonl"];
  expect(files.length).toBeGreaterThan(3);
  let base = 0;
  for (const name of files) {
    const bytes = readFileSync(dir.file(name));
    expect(bytes.toString()).toStartWith(`{"journal":"${id}","base":${base},"version":1}\n`);
    if (name !== "eventsPost.jsonl") expect(name).toBe(`eventsPost.${base}.jsonl`);
    base += bytes.length;
  }
  expect(positions.at(-1)).toBe(base);
  expect(positions).toEqual(positions.toSorted((a, b) => a - b));
  expect(await readLines(dir.file("eventsPost.jsonl"))).toEqual([..."0123456789"]);
});

test("a start continues after the last segment, even if a rotation was interrupted half-way", async () => {
  using dir = tempDir();
  const { id, positions } = await rotated(dir.path);
  const end = positions.at(-1) as number;
  const base = JSON.parse(readFileSync(dir.file("eventsPost.jsonl"), "utf8").split("\n")[0] ?? "");
  renameSync(dir.file("eventsPost.jsonl"), dir.file(`eventsPost.${base.base}.jsonl`));
  const journal = await openJournal({ directory: dir.path, segmentBytes: 300 });
  expect(journal.id).toBe(id);
  // After the last frame, not after the header of the new file, which is never posted.
  expect(journal.end()).toBe(end);
  expect(await journal.append(Buffer.alloc(0))).toBe(end);
  await journal.append(line("next"));
  await journal.close();
  expect(await readLines(dir.file("eventsPost.jsonl"))).toEqual([..."0123456789", "next"]);
});

test("a journal without its oldest files is read from where it begins; a gap is reported as damage", async () => {
  using dir = tempDir();
  await rotated(dir.path);
  const [first = "", second = "", third = ""] = segmentNames(dir.path);
  rmSync(dir.file(first));
  const left = await readLines(dir.file("eventsPost.jsonl"));
  expect("0123456789").toEndWith(left.join(""));
  rmSync(dir.file(third));
  await expect(readLines(dir.file("eventsPost.jsonl"))).rejects.toThrow(second);
  await expect(openJournal({ directory: dir.path })).rejects.toThrow(second);
});

test("a start names a segment that belongs to another journal or is too short", async () => {
  using dir = tempDir();
  using other = tempDir();
  await rotated(dir.path);
  await rotated(other.path);
  const last = segmentNames(dir.path).at(-1) as string;
  renameSync(dir.file(last), dir.file("kept"));
  renameSync(other.file(segmentNames(other.path).at(-1) as string), dir.file(last));
  await expect(openJournal({ directory: dir.path })).rejects.toThrow("belongs to another journal");
  await Bun.write(dir.file(last), readFileSync(dir.file("kept")).subarray(0, -5));
  await expect(openJournal({ directory: dir.path })).rejects.toThrow("is damaged at byte");
});

test("a reader keeps up with a writer that rotates with every append", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path, segmentBytes: 1 });
  const reader = await openJournalReader(dir.file("eventsPost.jsonl"));
  if (!reader) throw new Error("no journal");
  const found: string[] = [];
  let position = reader.start;
  let done = false;
  const writing = (async () => {
    for (let i = 0; i < 200; i++) await journal.append(line(`${i}`));
    done = true;
  })();
  for (;;) {
    const wasDone = done;
    const frames = await reader.read(position);
    for (const { payload, to } of frames) {
      found.push(payload.toString().trim());
      position = to;
    }
    expect(await reader.end()).toBeGreaterThanOrEqual(position);
    if (wasDone && frames.length === 0) break;
  }
  await writing;
  await journal.close();
  expect(found).toEqual(Array.from({ length: 200 }, (_, i) => `${i}`));
});

test.each(["it is opened", "its header is read"] as const)(
  "a file that is rotated right after %s is not mistaken for the next one",
  async (moment) => {
    using dir = tempDir();
    const journal = await openJournal({ directory: dir.path, segmentBytes: 1 });
    await journal.append(line("0"));
    let rotate: (() => Promise<unknown>) | null = null;
    const act = async () => {
      const once = rotate;
      rotate = null;
      await once?.();
    };
    const rotating: Disk = {
      ...disk,
      withFile: (path, use) =>
        disk.withFile(path, async (file) => {
          if (moment === "it is opened") await act();
          const read = async (from: number, to: number) => {
            if (from > 0) await act();
            return file.read(from, to);
          };
          return use({ ...file, read });
        }),
    };
    const reader = await openJournalReader(dir.file("eventsPost.jsonl"), rotating);
    if (!reader) throw new Error("no journal");
    rotate = () => journal.append(line("another"));
    const [frame] = await reader.read(0);
    expect(frame?.payload.toString()).toBe("0\n");
    expect(frame?.to).toBeLessThan(journal.end());
    const [next] = await reader.read(frame?.to ?? 0);
    expect(next?.payload.toString()).toBe("another\n");
    // At its end: the next file begins at this position, and the old one has other bytes there.
    const end = journal.end();
    rotate = () => journal.append(line("third"));
    const atEnd = await reader.read(end);
    const [third] = atEnd.length > 0 ? atEnd : await reader.read(end);
    expect(third?.payload.toString()).toBe("third\n");
    await journal.close();
  },
);

test.each([
  ["a reader that opens", openJournalReader],
  ["a start", listSegments],
])("%s does not mistake a segment that is deleted meanwhile for damage", async (_, look) => {
  for (let at = 0, calls = 1; calls > at; at++) {
    using dir = tempDir();
    await rotated(dir.path);
    calls = 0;
    /** Deletes the oldest segment after call number `at`. */
    const passing = <T>(result: T): T => {
      if (calls++ === at) rmSync(dir.file(segmentNames(dir.path)[0] as string));
      return result;
    };
    const losing = {
      ...disk,
      list: async (path: string) => passing(await disk.list(path)),
      size: async (path: string) => passing(await disk.size(path)),
      withFile: <T>(path: string, use: (file: ReadableFile) => T | Promise<T>) => {
        passing(null);
        return disk.withFile(path, async (file) => passing(await use(file)));
      },
    };
    expect(await look(dir.file("eventsPost.jsonl"), losing)).toBeTruthy();
  }
});

test("a segment deleted while its last frame is compared with the checkpoint is not damage", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const ledger = openDatabase(() => database.url, "test", 1);
  const journal = await openJournal({ directory: dir.path, segmentBytes: 1 });
  await journal.append(line(event("ann")));
  const path = dir.file("eventsPost.jsonl");
  const open = async (disk: Disk) => {
    const reader = await openJournalReader(path, disk);
    if (!reader) throw new Error("no journal");
    return openJournalBatches(
      { database: ledger, path, limit: new BatchLimit(), ahead: new Map() },
      reader,
    );
  };
  const batch = await (await open(disk)).next(Promise.resolve());
  if (!batch) throw new Error("no batch");
  expect(await post(ledger, batch, 5_000)).toMatchObject({ state: "posted" });
  await journal.append(line(event("bob")));
  await journal.close();
  const [posted = ""] = segmentNames(dir.path);
  let reads = 0;
  const losing = (at: number) => ({
    ...disk,
    withFile<T>(name: string, use: (file: ReadableFile) => T | Promise<T>) {
      if (name === dir.file(posted) && reads++ === at) rmSync(name);
      return disk.withFile(name, use);
    },
  });
  const kept = readFileSync(dir.file(posted));
  for (let at = 0; at < 2; at++) {
    reads = 0;
    const batches = await open(losing(at));
    expect((await batches.next(Promise.resolve()))?.from).toBe(batch.to);
    expect(reads).toBeGreaterThan(at);
    await Bun.write(dir.file(posted), kept);
  }
  // A segment with other events is damage.
  await Bun.write(dir.file(posted), kept.toString().replace("ann", "eve"));
  await expect(open(disk)).rejects.toThrow("is damaged");
  await ledger.close();
});

test("processor.ts JOURNAL counts every event once beside a processor that posts and deletes the same segments", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path, segmentBytes: 1 });
  for (let i = 0; i < 6; i++) await journal.append(line(event("ann")));
  await journal.close();
  const path = dir.file("eventsPost.jsonl");
  const ledger = openDatabase(() => database.url, "test", 1);
  let opened = 0;
  const { signal } = new AbortController();
  const report = ({ type }: Report) => {
    if (type !== "opened" || opened++ > 0) return;
    const env = { ...process.env, DATABASE_URL: database.url, DATA_DIR: dir.file("other") };
    Bun.spawnSync([process.execPath, "run", "processor.ts", path], { env });
    for (const name of segmentNames(dir.path).slice(0, 3)) rmSync(dir.file(name));
  };
  await postFile(path, { database: ledger, room: null, stop: signal, report });
  expect(opened).toBe(2);
  expect(await balances(database.url)).toEqual({ ann: "6" });
  await ledger.close();
});

test("a server that reads the marks of its sources while segments are deleted asks the ledger again", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path, segmentBytes: 1 });
  for (const name of ["a", "b"]) await journal.append(line(event(name)));
  const [first = ""] = segmentNames(dir.path);
  const segment = statSync(dir.file(first)).size;
  const ledger = [
    { source: "sent:a", position: "0", digest: null },
    { source: `journal:${journal.id}`, position: `${segment}`, digest: null },
    { source: `journal:${journal.id}`, position: "0", digest: null },
  ];
  const database = {
    async use<T>() {
      const row = ledger.pop();
      if (row?.position === "0") rmSync(dir.file(first), { force: true });
      return [row] as T;
    },
    close: async () => {},
  };
  const sources = openSources(journal, database, async () => {});
  expect(await sources.state("a")).toBeNull();
  expect(ledger).toEqual([]);
  await journal.close();
});

test("a reader makes no more calls for each file, however many files there are", async () => {
  const callsPerFile = async (files: number) => {
    using dir = tempDir();
    const journal = await openJournal({ directory: dir.path, segmentBytes: 1 });
    for (let i = 0; i < files; i++) await journal.append(line(`${i}`));
    await journal.close();
    let calls = 0;
    const counting = {
      ...disk,
      withFile: <T>(path: string, use: (file: ReadableFile) => T | Promise<T>) => (
        calls++,
        disk.withFile(path, use)
      ),
      size: (path: string) => (calls++, disk.size(path)),
      list: (path: string) => (calls++, disk.list(path)),
    };
    expect(await readFrames(dir.file("eventsPost.jsonl"), counting)).toHaveLength(files);
    return calls / files;
  };
  expect(await callsPerFile(300)).toBeLessThanOrEqual(await callsPerFile(30));
});

test("a batch is returned only after the reader itself has synced what it read", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const calls: string[] = [];
  const strange = {
    ...onRead(async (_, from) => void (from > 0 && calls.push("read"))),
    async syncFile(path: string) {
      await disk.syncFile(path);
      calls.push("sync");
    },
  };
  const journal = await openJournal({ directory: dir.path });
  await journal.append(line(event("ann")));
  const path = dir.file("eventsPost.jsonl");
  const reader = await openJournalReader(path, strange);
  const ledger = openDatabase(() => database.url, "test", 1);
  if (!reader) throw new Error("no journal");
  const batches = await openJournalBatches(
    { database: ledger, path, limit: new BatchLimit(), ahead: new Map() },
    reader,
  );
  expect((await batches.next(Promise.resolve()))?.events).toBe(1);
  expect(calls.at(-1)).toBe("sync");

  // No batch is returned if the writer truncated the frame meanwhile because its sync failed.
  await journal.append(line(event("bob")));
  const size = statSync(path).size;
  const truncating = { ...strange, syncFile: async () => truncateSync(path, size - 20) };
  const other = await openJournalReader(path, truncating);
  if (!other) throw new Error("no journal");
  const again = await openJournalBatches(
    { database: ledger, path, limit: new BatchLimit(), ahead: new Map() },
    other,
  );
  await expect(again.next(Promise.resolve())).rejects.toThrow("could not sync");
  await journal.close();
  await ledger.close();
});

const KILLS = IS_LONG ? 3 : 1;

test("every event counts once when a server is killed during rotations", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const env = { JOURNAL_SEGMENT_BYTES: "2000" };
  const options = { dataDir: dir.file("data"), databaseUrl: database.url, env };
  const lines = Array.from({ length: 20_000 }, (_, i) => event(`user${i % 50}`, 1));
  await Bun.write(dir.file("a.jsonl"), `${lines.join("\n")}\n`);
  let server = await startApp(options);
  const { port } = new URL(server.url);
  const kept = () => segmentNames(dir.file("data")).length;
  for (let kill = 0; kill < KILLS; kill++) {
    const before = kept();
    await using client = spawn("client.ts", {
      args: [dir.file("a.jsonl")],
      env: { SERVER_URL: server.url },
    });
    for (let i = 0; i < 50; i++) await server.post(event("live", 1, { id: `${kill}.${i}` }));
    await until(() => kept() > before || client.child.exitCode !== null);
    server.kill("SIGKILL");
    await server.exit();
    server = await startApp({ ...options, env: { ...env, PORT: port } });
  }
  const { code } = await run("client.ts", {
    args: [dir.file("a.jsonl"), "--wait"],
    env: { SERVER_URL: server.url },
  });
  expect(code).toBe(0);
  await untilBalance(server, "live", `${50 * KILLS}`);
  await server[Symbol.asyncDispose]();
  const found = await balances(database.url);
  for (let user = 0; user < 50; user++) expect(found[`user${user}`]).toBe("400");
  expect(kept()).toBeGreaterThan(3);

  // The whole journal is posted to another database, from the active file and the segments beside it.
  await using second = await testDatabase();
  const posted = await run("processor.ts", {
    args: [dir.file("data/eventsPost.jsonl")],
    env: { DATA_DIR: dir.file("other"), DATABASE_URL: second.url },
  });
  expect(posted.code).toBe(0);
  expect(await balances(second.url)).toEqual(found);

  // A segment alone is refused: what is missing before it is not skipped silently.
  await using third = await testDatabase();
  const last = segmentNames(dir.file("data")).at(-1) as string;
  mkdirSync(dir.file("alone"));
  copyFileSync(dir.file(`data/${last}`), dir.file(`alone/${last}`));
  const refused = await run("processor.ts", {
    args: [dir.file(`alone/${last}`)],
    env: { DATA_DIR: dir.file("other"), DATABASE_URL: third.url },
  });
  expect(refused.code).toBe(3);
  expect(refused.stderr).toContain("the segments in between were removed");
});
