/**
 * A damaged journal from the first check to the last event posted. Each kind of damage here once left a
 * journal that no tool could repair, or that needed another repair after every repair.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { repair } from "../../lib/processor/check.ts";
import { openRetention } from "../../lib/processor/retention.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { checkJournal } from "../../lib/journal/check.ts";
import { disk } from "../../lib/journal/disk.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { repairFile } from "../../lib/journal/repair.ts";
import { JournalDamage } from "../../lib/journal/format.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

/** Appends one frame for each of `users`; returns the positions behind them. */
async function append(
  directory: string,
  users: string,
  segmentBytes = Infinity,
): Promise<number[]> {
  const journal = await openJournal({ directory, segmentBytes });
  const ends: number[] = [];
  for (const user of users) ends.push(await journal.append(Buffer.from(line(user))));
  await journal.close();
  return ends;
}

function change(path: string, at: number, by = 2): void {
  const bytes = readFileSync(path);
  bytes[at] = (bytes[at] as number) ^ by;
  writeFileSync(path, bytes);
}

/** The position at which the file at `path` begins. */
function baseOf(path: string): number {
  const [header = ""] = readFileSync(path, "utf8").split("\n");
  return (JSON.parse(header) as { base: number }).base;
}

async function damageOf(path: string) {
  const { files } = await checkJournal(path, disk);
  return files.flatMap(({ damage }) => damage);
}

test("a rotation that was interrupted, or is in progress, is not damage", async () => {
  using dir = tempDir();
  await append(dir.path, "abcd", 200);
  const path = dir.file("eventsPost.jsonl");
  renameSync(path, dir.file(`eventsPost.${baseOf(path)}.jsonl`));
  expect(await damageOf(path)).toEqual([]);
});

test("--repair restores the damaged header of the active file, and leaves the segments alone", async () => {
  await using ledger = await openLedger();
  await append(ledger.dataDir, "abcd", 200);
  const before = readFileSync(ledger.journal);
  change(ledger.journal, 20);
  expect(await damageOf(ledger.journal)).toMatchObject([{ from: 0 }]);
  expect((await ledger.tool(["--check", "--repair"])).code).toBe(0);
  expect((await ledger.tool(["--check"])).code).toBe(0);
  expect(readFileSync(ledger.journal)).toEqual(before);
});

test("a damaged frame followed by another frame is damage, not a torn tail, whichever byte is damaged", async () => {
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

test("--repair replaces damage of any length with frames that every reader accepts", async () => {
  for (const mib of [15, 17, 30, 33]) {
    using dir = tempDir();
    const journal = await openJournal({ directory: dir.path });
    await journal.append(Buffer.from(line("a")));
    const lines = Buffer.from(line("b").repeat(20_000));
    const from = journal.end();
    while (journal.end() - from < mib * 1024 * 1024) await journal.append(lines);
    const to = journal.end();
    await journal.append(Buffer.from(line("c")));
    await journal.close();
    const path = dir.file("eventsPost.jsonl");
    const bytes = readFileSync(path);
    writeFileSync(path, bytes.fill(0, from, to - 1));
    const { id, files } = await checkJournal(path, disk);
    for (const file of files) await repairFile(file, id as string, disk);
    expect(await damageOf(path)).toEqual([]);
    const reader = await openJournalReader(path);
    expect((await reader?.read(to))?.[0]?.payload.toString()).toBe(line("c"));
  }
});

test("damage that was posted in part is reported in two parts, and the events after it are posted", async () => {
  await using ledger = await openLedger();
  const [, posted = 0] = await append(ledger.dataDir, "ab");
  expect((await ledger.tool([ledger.journal])).code).toBe(0);
  const [end = 0] = await append(ledger.dataDir, "cde");
  const bytes = readFileSync(ledger.journal);
  writeFileSync(ledger.journal, bytes.fill(0, posted - 30, posted + 30));
  const { code, stdout } = await ledger.tool(["--check", "--repair"]);
  expect(code).toBe(0);
  expect(stdout).toContain("they had been posted");
  expect(stdout).toContain("they had not been posted: 1 of their lines are still events");
  expect((await ledger.tool(["--check"])).code).toBe(0);
  expect(
    (await openJournalReader(ledger.journal).then((reader) => reader?.read(end)))?.length,
  ).toBe(2);
  await using server = await ledger.start();
  await server.post(event("f"));
  await untilBalance(server, "f", "1");
  expect(Object.keys(await ledger.balances())).toEqual([..."abdef"]);
});

test("a repair that is interrupted between its steps can be repeated", async () => {
  await using ledger = await openLedger();
  await append(ledger.dataDir, "abc");
  expect((await ledger.tool([ledger.journal])).code).toBe(0);
  change(ledger.journal, readFileSync(ledger.journal).length - 4);
  const database = openDatabase(() => ledger.url, "test", 1);
  const dying = repair(ledger.journal, database, () => {
    throw new Error("killed");
  });
  await expect(dying).rejects.toThrow("killed");
  await database.close();
  expect((await ledger.tool(["--check", "--repair"])).code).toBe(0);
  await append(ledger.dataDir, "d");
  expect(await ledger.tool([ledger.journal])).toMatchObject({ code: 0, stderr: "" });
  expect(Object.keys(await ledger.balances())).toEqual([..."abcd"]);
});

test("the command that --repair prints posts the events that it moved aside", async () => {
  await using ledger = await openLedger();
  const journal = await openJournal({ directory: ledger.dataDir });
  await journal.append(Buffer.from(line("a")));
  const end = await journal.append(Buffer.from(line("b") + line("c") + line("d")));
  await journal.append(Buffer.from(line("e")));
  await journal.close();
  change(ledger.journal, end - 20); // of the last event's value or name
  const { stdout } = await ledger.tool(["--check", "--repair"]);
  const [, command = ""] = /bun run processor\.ts (\S+) posts them/.exec(stdout) ?? [];
  expect((await ledger.tool([command])).code).toBe(0);
  await ledger.tool([ledger.journal]);
  expect(Object.keys(await ledger.balances())).toEqual([..."abce"]);
});

test("lost bytes prevent neither the deletion of segments nor --rebuild --yes", async () => {
  await using ledger = await openLedger();
  await append(ledger.dataDir, "abcdef", 300);
  expect((await ledger.tool([ledger.journal])).code).toBe(0);
  const [first = ""] = segmentNames(ledger.dataDir);
  const path = join(ledger.dataDir, first);
  change(path, readFileSync(path).indexOf("userId"));
  expect((await ledger.tool(["--check", "--repair"])).code).toBe(0);
  const { code, stderr, stdout } = await ledger.tool(["--rebuild"]);
  expect(stderr, stdout).toContain("--yes");
  expect(code).toBe(2);
  {
    await using server = await ledger.start({ JOURNAL_KEEP_DAYS: "0" });
    await server.post(event("g"));
    await until(() => !segmentNames(ledger.dataDir).includes(first), 20_000);
    await until(() => server.balance("g"));
  }
  expect((await ledger.tool(["--verify"])).stdout).toContain("1 of 7 balances differ");
  expect((await ledger.tool(["--rebuild", "--yes"])).code).toBe(0);
  expect((await ledger.tool(["--verify"])).code).toBe(0);
});

test("the only file that identifies a journal is never deleted", async () => {
  await using ledger = await openLedger();
  await append(ledger.dataDir, "abc", 100);
  expect((await ledger.tool([ledger.journal])).code).toBe(0);
  const last = `eventsPost.${baseOf(ledger.journal)}.jsonl`;
  renameSync(ledger.journal, join(ledger.dataDir, last));
  const id = (await openJournalReader(ledger.journal))?.id ?? "";
  const database = openDatabase(() => ledger.url, "test", 1);
  const deleteOld = openRetention({ database, path: ledger.journal, keepDays: 0 });
  const deleteAgain = () => Array.fromAsync(deleteOld());
  expect(await deleteAgain()).toHaveLength(2);
  expect(await deleteAgain()).toEqual([]);
  await database.close();
  expect(segmentNames(ledger.dataDir)).toEqual([last]);
  await using server = await ledger.start();
  expect(await (await server.post(event("d"))).text()).toContain(id);
});

test("files with numbers in their names are not mistaken for segments of the plain file beside them", async () => {
  await using ledger = await openLedger();
  const plain = ledger.write("events.jsonl", line("a"));
  ledger.write("events.1.jsonl", line("b"));
  ledger.write("events.20240101.jsonl", line("c"));
  expect(await ledger.tool([plain])).toMatchObject({ code: 0, stderr: "" });
  expect(await ledger.balances()).toEqual({ a: "1" });
  expect((await ledger.tool(["--verify", plain])).code).toBe(0);
});

test("all files of a journal, or one of its segments, name the journal, even while the active file is missing", async () => {
  await using ledger = await openLedger();
  await append(ledger.dataDir, "abc", 100);
  const names = [...segmentNames(ledger.dataDir), "eventsPost.jsonl"];
  const paths = names.map((name) => join(ledger.dataDir, name));
  expect((await ledger.tool([ledger.journal])).stdout).toStartWith("posted 3 events");
  for (const given of [paths, paths.slice(0, 1)])
    expect(await ledger.tool(given)).toMatchObject({ code: 0, stderr: "" });
  expect((await ledger.tool(["--verify", ...paths])).code).toBe(0);
  rmSync(ledger.journal);
  for (const tool of [[], ["--check"], ["--verify"]])
    expect((await ledger.tool([...tool, ledger.journal])).stderr).not.toContain("no such file");
});
