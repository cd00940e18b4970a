/** The journal's writer, on disks that fail, and what a reader finds of what it wrote. */
import { expect, test } from "bun:test";
import {
  chmodSync,
  mkdirSync,
  appendFileSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { setImmediate } from "node:timers/promises";
import { crc32 } from "node:zlib";

import { type Disk, disk, type JournalFile } from "../../lib/journal/disk.ts";
import { type Journal, JournalBusy, JournalFull, openJournal } from "../../lib/journal/writer.ts";
import { readLines } from "../support/journal.ts";
import { checkJournal } from "../../lib/journal/check.ts";
import { type Frame, openJournalReader } from "../../lib/journal/reader.ts";
import { tempDir } from "../support/programs.ts";

const line = (text: string) => Buffer.from(`${text}\n`);

/** The real disk with some calls replaced, and a list of the calls that were made. */
function strangeDisk(
  strange: Partial<
    Record<keyof JournalFile, (file: JournalFile, bytes?: Uint8Array) => Promise<void>>
  >,
) {
  const calls: string[] = [];
  const wrapped: Disk = {
    ...disk,
    async syncDirectory(path) {
      calls.push("syncDirectory");
      await disk.syncDirectory(path);
    },
    async openForAppend(path) {
      const file = await disk.openForAppend(path);
      const call = (name: "append" | "sync" | "truncate" | "close") => async (bytes?: never) => {
        calls.push(name);
        await (strange[name]?.(file, bytes) ?? file[name](bytes as never));
      };
      return {
        ...file,
        append: call("append"),
        sync: call("sync"),
        truncate: call("truncate"),
        close: call("close"),
      } as unknown as JournalFile;
    },
  };
  return { disk: wrapped, calls, strange };
}

async function withJournal(use: (journal: Journal, path: string) => Promise<unknown>) {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path });
  await use(journal, dir.file("eventsPost.jsonl"));
  await journal.close();
}

/** Opens the journal again, and returns the lines that a reader then finds. */
async function reopen(
  directory: string,
  say: (line: string) => void = () => {},
): Promise<string[]> {
  await (await openJournal({ directory, say })).close();
  return readLines(`${directory}/eventsPost.jsonl`);
}

async function readFrames(path: string): Promise<Frame[]> {
  const reader = await openJournalReader(path);
  if (!reader) throw new Error("no journal");
  const all: Frame[] = [];
  for (let position = reader.start; ;) {
    const frames = await reader.read(position);
    if (frames.length === 0) return all;
    all.push(...frames);
    position = (frames.at(-1) as Frame).to;
  }
}

test("the file is a header line, then frames with the byte count and the CRC-32 of their lines", async () => {
  await withJournal(async (journal, path) => {
    const position = await journal.append(line('{"a":1}'));
    const text = readFileSync(path, "utf8");
    const [header, frame, event] = text.split("\n").map((part) => part && JSON.parse(part));
    expect(header).toEqual({ journal: journal.id, base: 0, version: 1 });
    expect(frame.frame).toMatchObject({
      bytes: 8,
      crc32: crc32('{"a":1}\n').toString(16).padStart(8, "0"),
    });
    expect(event).toEqual({ a: 1 });
    expect(position).toBe(text.length);
  });
});

test("a new file is synced, and its directory, before anything is appended", async () => {
  using dir = tempDir();
  const { disk, calls } = strangeDisk({});
  await (await openJournal({ directory: dir.path, disk })).close();
  expect(calls).toEqual(["truncate", "append", "sync", "syncDirectory", "close"]);
});

test("all waiting appends share the next sync", async () => {
  using dir = tempDir();
  const { disk, calls } = strangeDisk({});
  const journal = await openJournal({ directory: dir.path, disk });
  calls.length = 0;
  await Promise.all(Array.from({ length: 100 }, (_, i) => journal.append(line(`${i}`))));
  expect(calls).toEqual(["append", "sync"]);
  await journal.close();
  expect(await reopen(dir.path)).toEqual(Array.from({ length: 100 }, (_, i) => `${i}`));
});

test("an append resolves after the sync, not before", async () => {
  using dir = tempDir();
  const started = Promise.withResolvers<void>();
  const finish = Promise.withResolvers<void>();
  const { disk, strange } = strangeDisk({});
  const journal = await openJournal({ directory: dir.path, disk });
  strange.sync = () => (started.resolve(), finish.promise);
  let answered = false;
  const appended = journal.append(line("a")).then(() => (answered = true));
  await started.promise;
  await setImmediate(); // whatever does not wait for the sync has run
  expect(answered).toBe(false);
  finish.resolve();
  await appended;
  await journal.close();
});

test("after a failed sync the journal acknowledges nothing more and never syncs again", async () => {
  using dir = tempDir();
  const { disk, strange, calls } = strangeDisk({});
  const journal = await openJournal({ directory: dir.path, disk });
  await journal.append(line("before"));
  strange.sync = () => Promise.reject(Object.assign(new Error("bad"), { code: "EIO" }));
  const answers = await Promise.allSettled([journal.append(line("a")), journal.append(line("b"))]);
  expect(answers.map(({ status }) => status)).toEqual(["rejected", "rejected"]);
  delete strange.sync;
  calls.length = 0;
  await expect(journal.append(line("c"))).rejects.toThrow("check the disk, then restart");
  expect(journal.trouble()).toContain("cannot sync");
  expect(calls).toEqual([]);
  await journal.close();
  expect((await reopen(dir.path))[0]).toBe("before");
});

test("a full disk rejects what does not fit and keeps the file whole; appends resume once there is room", async () => {
  using dir = tempDir();
  const { disk, strange } = strangeDisk({});
  const journal = await openJournal({ directory: dir.path, disk });
  await journal.append(line("before"));
  strange.append = async (file, bytes) => {
    await file.append((bytes as Uint8Array).subarray(0, 20));
    throw Object.assign(new Error("full"), { code: "ENOSPC" });
  };
  await expect(journal.append(line("refused"))).rejects.toThrow("no room (ENOSPC)");
  expect(journal.trouble()).toContain("no room");
  delete strange.append;
  await journal.append(line("after"));
  expect(journal.trouble()).toBeNull();
  await journal.close();
  expect(await reopen(dir.path)).toEqual(["before", "after"]);
});

test.each([
  ["removed", (path: string) => rmSync(path)],
  ["moved away", (path: string) => renameSync(path, `${path}.old`)],
  ["replaced", (path: string) => (rmSync(path), writeFileSync(path, "x"))],
  ["cut", (path: string) => truncateSync(path, 80)],
])("a journal that another program has %s acknowledges nothing more", async (_what, change) => {
  await withJournal(async (journal, path) => {
    await journal.append(line("before"));
    change(path);
    await expect(journal.append(line("after"))).rejects.toThrow("another program changed it");
    await expect(journal.append(line("later"))).rejects.toThrow("no more events are accepted");
  });
});

test("the real disk syncs: a file that cannot be synced is an error", async () => {
  // Linux and macOS answer EINVAL or ENOTSUP; a call that is never made answers nothing.
  const refused = /EINVAL|ENOTSUP|EOPNOTSUPP|ENOTTY/;
  const file = await disk.openForAppend("/dev/null");
  await expect(file.sync()).rejects.toThrow(refused);
  await file.close();
  await expect(disk.syncFile("/dev/null")).rejects.toThrow(refused);
  await expect(disk.syncDirectory("/dev/null")).rejects.toThrow(refused);
});

test("creating a directory syncs its parent", async () => {
  using dir = tempDir();
  const synced: string[] = [];
  const { syncDirectory } = disk;
  disk.syncDirectory = async (path) => {
    await syncDirectory(path);
    synced.push(path);
  };
  try {
    await disk.makeDirectory(dir.file("a/b"));
  } finally {
    disk.syncDirectory = syncDirectory;
  }
  expect(synced.toSorted()).toEqual([dir.path, dir.file("a")]);
});

test("nobody else can read the journal, whatever the modes were before", async () => {
  using dir = tempDir();
  const modeOf = (path: string) => statSync(path).mode & 0o7777;
  for (const path of [dir.file("new"), dir.file("old")]) {
    if (path.endsWith("old")) {
      mkdirSync(path, { mode: 0o755 });
      writeFileSync(`${path}/eventsPost.jsonl`, "", { mode: 0o644 });
    }
    const journal = await openJournal({ directory: path });
    await journal.close();
    expect(modeOf(path)).toBe(0o700);
    expect(modeOf(`${path}/eventsPost.jsonl`)).toBe(0o600);
  }
  const shared = dir.file("shared");
  mkdirSync(shared);
  chmodSync(shared, 0o1777);
  await disk.makeDirectory(shared);
  expect(modeOf(shared)).toBe(0o1777); // as /tmp is
  // Not a device either: a copy of /dev/null, since the real one belongs to everybody.
  const device = dir.file("null");
  if (Bun.spawnSync(["mknod", "-m", "666", device, "c", "1", "3"]).success) {
    await (await disk.openForAppend(device)).close();
    expect(modeOf(device)).toBe(0o666);
  }
});

test("a file system that syncs no directories is named, with what to do", async () => {
  if (process.platform !== "linux") return;
  const error = await disk.syncDirectory("/proc").catch((error: Error) => error);
  expect(String(error)).toMatch(
    /cannot sync the folder \/proc: .*EINVAL.*use a DATA_DIR on a local disk/,
  );
});

test("a start finds the end of a large file and truncates nothing", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path });
  const large = line("x".repeat(13 * 1024 * 1024));
  for (let i = 0; i < 4; i++) await journal.append(large); // more than the start reads
  const end = await journal.append(line("last"));
  await journal.close();
  const said: string[] = [];
  const again = await openJournal({ directory: dir.path, say: (text) => said.push(text) });
  expect(again.end()).toBe(end);
  expect(said).toEqual([]);
  await again.close();
});

test("if the disk has no room for a new journal, the error names the file and what to do", async () => {
  using dir = tempDir();
  const { disk } = strangeDisk({
    append: () => Promise.reject(Object.assign(new Error("write"), { code: "ENOSPC" })),
  });
  const opening = openJournal({ directory: dir.path, disk });
  await expect(opening).rejects.toThrow(
    `cannot begin ${dir.file("eventsPost.jsonl")}: no room (ENOSPC); free some space and start again`,
  );
  await (await openJournal({ directory: dir.path })).close(); // once there is room, it starts
});

test.each(["rename", "syncDirectory"] as const)(
  "a rotation that fails at %s leaves no file open",
  async (call) => {
    using dir = tempDir();
    const { disk, calls } = strangeDisk({});
    let opened = 0;
    let isBroken = false;
    const breaking = {
      ...disk,
      openForAppend: (path: string) => (opened++, disk.openForAppend(path)),
      async [call](...paths: [string, string]) {
        if (isBroken) throw Object.assign(new Error("broken"), { code: "EIO" });
        await (disk[call] as (...paths: string[]) => Promise<void>)(...paths);
      },
    };
    const journal = await openJournal({ directory: dir.path, disk: breaking, segmentBytes: 100 });
    await journal.append(line("first"));
    isBroken = true;
    await expect(journal.append(line("second"))).rejects.toThrow(
      /begin the file after|cannot rename/,
    );
    await journal.close();
    // A file that nobody closes ends the process when it is collected as garbage.
    expect(opened).toBe(2);
    expect(calls.filter((name) => name === "close")).toHaveLength(2);
  },
);

test.each(["open", "rename"] as const)(
  "no room at the %s of the next file rejects the append as a full disk does, and the next append succeeds",
  async (call) => {
    using dir = tempDir();
    let isFull = false;
    const refuse = () => {
      if (isFull) throw Object.assign(new Error("no space left"), { code: "ENOSPC" });
    };
    const filling = {
      ...disk,
      async openForAppend(path: string) {
        if (call === "open") refuse();
        return disk.openForAppend(path);
      },
      async rename(from: string, to: string) {
        if (call === "rename") refuse();
        return disk.rename(from, to);
      },
    };
    const journal = await openJournal({ directory: dir.path, disk: filling, segmentBytes: 300 });
    const add = () => journal.append(Buffer.from(`${"x".repeat(200)}\n`));
    const first = await add();
    isFull = true;
    await expect(add()).rejects.toBeInstanceOf(JournalFull);
    isFull = false;
    expect(await add()).toBeGreaterThan(first);
    await journal.close();
  },
);

for (const code of ["EMFILE", "ENFILE", "ENOMEM", "EINTR", "EAGAIN", "EACCES", "EIO"]) {
  const failing = () => Promise.reject(Object.assign(new Error(code), { code }));

  test(`${code} before anything is synced passes: the next append works, and nothing of the failed one stays`, async () => {
    using dir = tempDir();
    const { disk, strange } = strangeDisk({});
    const journal = await openJournal({ directory: dir.path, disk });
    await journal.append(line("before"));
    for (const written of [0, 20]) {
      strange.append = async (file, bytes) => {
        await file.append((bytes as Uint8Array).subarray(0, written));
        await failing();
      };
      await expect(journal.append(line("refused"))).rejects.toBeInstanceOf(JournalBusy);
      expect(journal.trouble()).toContain(code);
    }
    delete strange.append;
    await journal.append(line("after"));
    expect(journal.trouble()).toBeNull();
    await journal.close();
    expect(await reopen(dir.path)).toEqual(["before", "after"]);
  });

  for (const call of ["openForAppend", "rename"] as const)
    test(`${code} at ${call} of a rotation passes`, async () => {
      using dir = tempDir();
      let isFailing = false;
      const failingDisk = {
        ...disk,
        [call]: (...paths: [string, string]) =>
          isFailing ? failing() : (disk[call] as (...paths: string[]) => Promise<never>)(...paths),
      };
      const options = { directory: dir.path, disk: failingDisk, segmentBytes: 100 };
      const journal = await openJournal(options);
      await journal.append(line("before"));
      isFailing = true;
      await expect(journal.append(line("refused"))).rejects.toBeInstanceOf(JournalBusy);
      isFailing = false;
      await journal.append(line("after"));
      await journal.close();
      expect(await reopen(dir.path)).toEqual(["before", "after"]);
    });
}

test("a rotation waits for the descriptor of its directory", async () => {
  using dir = tempDir();
  let failures = 0;
  const scarce = {
    ...disk,
    async syncDirectory(path: string) {
      if (failures-- > 0) throw Object.assign(new Error("EMFILE"), { code: "EMFILE" });
      await disk.syncDirectory(path);
    },
  };
  const journal = await openJournal({ directory: dir.path, disk: scarce, segmentBytes: 100 });
  await journal.append(line("1"));
  failures = 2;
  await journal.append(line("2"));
  expect(failures).toBeLessThan(0);
  await journal.close();
  expect(await reopen(dir.path)).toEqual(["1", "2"]);
});

/** Clocks that are wrong, and the time that a frame then states. */
const WRONG_CLOCKS: [what: string, nowMs: number, at: number][] = [
  ["before 1970", -1, 0],
  ["long before 1970", -62_135_596_800_000, 0],
  ["a fraction before 1970", -0.5, 0],
  ["with fractions of milliseconds", 1_700_000_000_000.75, 1_700_000_000_000],
  ["at the largest time of 15 digits", 999_999_999_999_999, 999_999_999_999_999],
  ["behind it", 1e15, 999_999_999_999_999],
  ["so far ahead that it is written with an exponent", 1e22, 999_999_999_999_999],
  ["that says nothing", Number.NaN, 0],
  ["without an end", Infinity, 999_999_999_999_999],
  ["without a beginning", -Infinity, 0],
];

for (const [what, nowMs, at] of WRONG_CLOCKS)
  test(`what is written by a clock ${what} can be read, and the next start finds it`, async () => {
    using dir = tempDir();
    const wrong = { ...disk, now: () => nowMs };
    const journal = await openJournal({ directory: dir.path, disk: wrong, segmentBytes: 200 });
    const stated: number[] = [];
    journal.onCommit(({ atMs }) => stated.push(atMs));
    const expected = ["1", "2", "3", "4", "5"];
    for (const text of expected) await journal.append(line(text));
    await journal.close();
    expect(await readLines(journal.journals.name)).toEqual(expected);
    expect(await reopen(dir.path)).toEqual(expected);
    const { files } = await checkJournal(journal.journals.name, disk);
    expect(files.length).toBeGreaterThan(1);
    expect(files.flatMap(({ damage }) => damage)).toEqual([]);
    expect(stated).toEqual(expected.map(() => at));
    const headers = (await readFrames(journal.journals.name)).map(({ header }) =>
      JSON.parse(header),
    );
    expect(headers.map(({ frame }) => frame.at)).toEqual(stated);
  });

test("a clock that jumps in both directions makes no frame unreadable", async () => {
  using dir = tempDir();
  const times = [1e12, -5, 2e15, 1e12, Number.NaN, 1, -1e15, 1e12 + 1];
  const jumping = { ...disk, now: () => times[journal.end() % times.length] as number };
  const journal = await openJournal({ directory: dir.path, disk: jumping });
  const expected = Array.from({ length: 40 }, (_, i) => "x".repeat(i + 1));
  for (const text of expected) await journal.append(line(text));
  await journal.close();
  expect(await reopen(dir.path)).toEqual(expected);
});

test("a clock that jumps back while the disk is full does not keep the journal full", async () => {
  using dir = tempDir();
  const { disk, strange } = strangeDisk({});
  let nowMs = 1_700_000_000_000;
  const journal = await openJournal({ directory: dir.path, disk: { ...disk, now: () => nowMs } });
  strange.append = () => Promise.reject(Object.assign(new Error("full"), { code: "ENOSPC" }));
  for (const jumped of [-1, Number.NaN, 1]) {
    nowMs = 1_700_000_000_000;
    await expect(journal.append(line("refused"))).rejects.toThrow("no room");
    nowMs = jumped;
    expect(journal.trouble()).toBeNull();
  }
  await journal.close();
});

test("a full disk is reported as full for a limited time", async () => {
  using dir = tempDir();
  const { disk, strange } = strangeDisk({});
  let nowMs = 1_000_000;
  const journal = await openJournal({ directory: dir.path, disk: { ...disk, now: () => nowMs } });
  strange.append = () => Promise.reject(Object.assign(new Error("full"), { code: "ENOSPC" }));
  await expect(journal.append(line("refused"))).rejects.toThrow("no room");
  expect(journal.trouble()).toContain("no room");
  nowMs += 6_000;
  expect(journal.trouble()).toBeNull();
  await journal.close();
});

test("a tail torn at any byte is truncated, and whole frames stay", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path });
  await journal.append(line("first"));
  const whole = await journal.append(line("second"));
  const end = await journal.append(line('{"userId":"third"}'));
  await journal.close();
  const path = dir.file("eventsPost.jsonl");
  const bytes = readFileSync(path);
  for (let cut = whole + 1; cut < end; cut++) {
    writeFileSync(path, bytes.subarray(0, cut));
    const said: string[] = [];
    expect(await reopen(dir.path, (line) => said.push(line))).toEqual(["first", "second"]);
    expect(said).toEqual([
      `${path}: cut off ${cut - whole} bytes of a frame that was never acknowledged`,
    ]);
    expect(readFileSync(path).length).toBe(whole);
  }
});

test("a journal whose creation was interrupted starts empty, whatever part of its header was written", async () => {
  using dir = tempDir();
  const path = dir.file("eventsPost.jsonl");
  const header = '{"journal":"3f5bd0c6-5cf3-4f0e-9a0c-0a6d7f6a2b11","base":0,"version":1}';
  for (const begun of ["", header.slice(0, 1), header.slice(0, 40), header, "\0\0\0\0"]) {
    writeFileSync(path, begun);
    expect(await reopen(dir.path)).toEqual([]);
  }
});

test("damage before the tail names the file and the byte, and nothing is changed", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path });
  const start = readFileSync(dir.file("eventsPost.jsonl")).length;
  const first = await journal.append(line("first"));
  await journal.append(line("second"));
  await journal.close();
  const path = dir.file("eventsPost.jsonl");
  const good = readFileSync(path);
  for (let at = start; at < first; at++) {
    const bad = Buffer.from(good);
    bad[at] = (bad[at] as number) ^ 1;
    writeFileSync(path, bad);
    const opened = openJournal({ directory: dir.path });
    // Only reports depend on the time of a frame: a flipped digit in it goes unnoticed.
    if (JSON.parse(good.toString().split("\n")[1] ?? "").frame.at !== frameTime(bad)) {
      await (await opened.catch(() => null))?.close();
      continue;
    }
    await expect(opened).rejects.toThrow(`${path} is damaged at byte ${start}`);
    expect(readFileSync(path).equals(bad)).toBe(true);
  }
});

function frameTime(bytes: Buffer): number | null {
  return Number(/"at":(\d+)\}\}$/.exec(bytes.toString("latin1").split("\n")[1] ?? "")?.[1] ?? null);
}

test("a file that is not a journal is refused and not changed", async () => {
  using dir = tempDir();
  const path = dir.file("eventsPost.jsonl");
  const events = readFileSync(`${import.meta.dir}/../fixtures/assignment.jsonl`);
  writeFileSync(path, events);
  await expect(openJournal({ directory: dir.path })).rejects.toThrow(
    "does not begin with the header",
  );
  expect(readFileSync(path).equals(events)).toBe(true);
});

test("a second writer is refused while the first one lives", async () => {
  using dir = tempDir();
  const journal = await openJournal({ directory: dir.path });
  await expect(openJournal({ directory: dir.path })).rejects.toThrow("written by another process");
  await journal.close();
  expect(await reopen(dir.path)).toEqual([]);
});

test("a reader stops before an incomplete frame until it is complete", async () => {
  await withJournal(async (journal, path) => {
    await journal.append(line("first"));
    const whole = readFileSync(path);
    await journal.append(line("second"));
    const grown = readFileSync(path);
    for (let bytes = whole.length; bytes < grown.length; bytes++) {
      writeFileSync(path, grown.subarray(0, bytes));
      expect(await readLines(path)).toEqual(["first"]);
    }
    writeFileSync(path, grown);
    expect(await readLines(path)).toEqual(["first", "second"]);
  });
});

test("a reader reports damage as soon as something follows it", async () => {
  await withJournal(async (journal, path) => {
    const end = await journal.append(line("first"));
    appendFileSync(path, "garbage\n");
    expect(await readLines(path)).toEqual(["first"]);
    truncateSync(path, end);
    await journal.append(line("second"));
    await journal.append(line("third"));
    const bytes = readFileSync(path, "utf8").replace("second", "sEcond");
    writeFileSync(path, bytes);
    await expect(readLines(path)).rejects.toThrow(`damaged at byte ${end}`);
  });
});

test("frames larger than a block are read whole", async () => {
  await withJournal(async (journal, path) => {
    const large = Array.from({ length: 5 }, (_, i) => `${i}`.repeat(3 << 20));
    for (const text of large) await journal.append(line(text));
    expect(await readLines(path)).toEqual(large);
  });
});
