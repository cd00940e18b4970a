/**
 * processor.ts as a program: files and journals in, balances out. Each event counts once, whatever else
 * runs at the same time.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, copyFileSync, renameSync } from "node:fs";
import { dirname, join } from "node:path";

import { encodeJournalHeader, isEventFile } from "../../lib/journal/format.ts";
import { tryLock } from "../../lib/lock.ts";
import { line } from "../support/events.ts";
import { frame } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import { connectTest } from "../support/postgres.ts";
import { root, tempDir, until, untilBalance } from "../support/programs.ts";
import { longTest, seeded } from "../support/random.ts";

setDefaultTimeout(20_000);

const fixture = (name: string) => join(root, "tests", "fixtures", name);
const FIXTURES = { user1: "27", user2: "58", user01: "2463", user02: "-1338", user03: "444" };

test("files are posted to the cent, and a second run finds nothing new", async () => {
  await using ledger = await openPosting();
  const files = [fixture("assignment.jsonl"), fixture("crlf.jsonl")];
  const first = await ledger.post(...files);
  expect(first.stdout).toMatch(
    /^posted 40 events \(0 lines quarantined\) from 2 files: 2500 bytes in [\d.]+ s, \d+ events\/s\n$/,
  );
  expect(await ledger.balances()).toEqual(FIXTURES);

  const second = await ledger.post(...files);
  expect(second.stdout).toStartWith("posted 0 events (0 lines quarantined) from 2 files: 0 bytes");
  expect(await ledger.balances()).toEqual(FIXTURES);
  expect([first.code, second.code]).toEqual([0, 0]);
});

test("only the new lines of a file that grew are posted", async () => {
  await using ledger = await openPosting();
  const file = ledger.write("a.jsonl", line("ann", 1) + line("ben", 2));
  await ledger.post(file);
  appendFileSync(file, line("ann", 10) + line("cid", 4));
  expect((await ledger.post(file)).stdout).toStartWith("posted 2 events");
  expect(await ledger.balances()).toEqual({ ann: "11", ben: "2", cid: "4" });
});

test("a file that begins with other bytes is another file, and is posted whole", async () => {
  await using ledger = await openPosting();
  const [old, other] = [line("ann", 1) + line("ben", 2), line("ann", 5) + line("ben", 2)];
  await ledger.post(ledger.write("a.jsonl", old));
  const posted = await ledger.post(ledger.write("a.jsonl", other));
  expect(posted.stdout).toStartWith("posted 2 events");
  expect(await ledger.balances()).toEqual({ ann: "6", ben: "4" });

  // Both are known now, and each resumes where it was left.
  await ledger.post(ledger.write("a.jsonl", old + line("cid", 7)));
  await ledger.post(ledger.write("a.jsonl", other + line("dan", 8)));
  expect(await ledger.balances()).toEqual({ ann: "6", ben: "4", cid: "7", dan: "8" });
});

test("a file counts once whatever its folder, and again under another name", async () => {
  await using ledger = await openPosting();
  const file = ledger.write("a.jsonl", line("ann", 3));
  const elsewhere = ledger.write("elsewhere/a.jsonl", line("ann", 3));
  await ledger.post(file, elsewhere);
  expect(await ledger.balances()).toEqual({ ann: "3" });
  await ledger.post(ledger.write("b.jsonl", line("ann", 3)));
  expect(await ledger.balances()).toEqual({ ann: "6" });
});

test("an incomplete last line is reported, and posted by the run that finds it complete", async () => {
  await using ledger = await openPosting();
  const last = line("ben", 2);
  const file = ledger.write("a.jsonl", line("ann", 1) + last.slice(0, 20));
  const torn = await ledger.post(file);
  expect(torn.code).toBe(1);
  expect(torn.stderr).toBe(
    `${file}: the last line (20 bytes) has no newline and is not a whole event: left for the next run\n`,
  );
  expect(await ledger.balances()).toEqual({ ann: "1" });

  appendFileSync(file, last.slice(20));
  expect(await ledger.post(file)).toMatchObject({ code: 0, stderr: "" });
  expect(await ledger.balances()).toEqual({ ann: "1", ben: "2" });
});

test("a last line without newline that is a whole event is posted once", async () => {
  await using ledger = await openPosting();
  const file = ledger.write("a.jsonl", line("ann", 1) + line("ben", 2).trimEnd());
  expect((await ledger.post(file)).stdout).toStartWith("posted 2 events");
  appendFileSync(file, `\n${line("ann", 4)}`);
  expect((await ledger.post(file)).stdout).toStartWith("posted 1 event (");
  expect(await ledger.balances()).toEqual({ ann: "5", ben: "2" });
});

test("a bad line is quarantined with its position and reason, and the lines around it are posted", async () => {
  await using ledger = await openPosting();
  const good = line("ann", 1);
  const file = ledger.write("a.jsonl", `${good}nonsense\n\n${good}${line("ann", '"98"')}${good}`);
  const posted = await ledger.post(file);
  expect(posted.code).toBe(1);
  expect(posted.stdout).toStartWith("posted 3 events (2 lines quarantined) from 1 file");
  expect(await ledger.balances()).toEqual({ ann: "3" });
  expect(await ledger.quarantine()).toEqual([
    { source: "file:a.jsonl#1", position: good.length, reason: "not JSON", line: "nonsense" },
    {
      source: "file:a.jsonl#1",
      position: 2 * good.length + 10,
      reason: "value must be a JSON number smaller than 10^15",
      line: line("ann", '"98"').trimEnd(),
    },
  ]);
  expect(await ledger.post(file)).toMatchObject({ code: 0 }); // nothing new, nothing bad
});

test("lines of 100 KB and 5 MB are quarantined, cut to 4 KiB, and the lines after them are posted", async () => {
  await using ledger = await openPosting();
  const [long, endless] = ["x".repeat(100_000), "y".repeat(5_000_000)];
  const before = line("ann", 1);
  const file = ledger.write("a.jsonl", `${before}${long}\n${endless}\n${line("ben", 2)}`);
  expect(await ledger.post(file)).toMatchObject({ code: 1 });
  expect(await ledger.balances()).toEqual({ ann: "1", ben: "2" });
  expect(await ledger.quarantine()).toEqual([
    quarantined({ position: before.length, line: long.slice(0, 4096) }),
    quarantined({ position: before.length + 100_001, line: endless.slice(0, 4096) }),
  ]);
  appendFileSync(file, line("cid", 3)); // the checkpoint includes the long lines
  expect((await ledger.post(file)).stdout).toStartWith("posted 1 event (0 lines quarantined)");
});

test("5 MB without a newline are quarantined once, and the lines after them are posted", async () => {
  await using ledger = await openPosting();
  const file = ledger.write("a.jsonl", line("ann", 1) + "y".repeat(5_000_000));
  expect(await ledger.post(file)).toMatchObject({ code: 1, stderr: "" });
  appendFileSync(file, `\n${line("ben", 2)}`);
  expect(await ledger.post(file)).toMatchObject({ code: 0 });
  expect(await ledger.balances()).toEqual({ ann: "1", ben: "2" });
  expect(await ledger.quarantine()).toHaveLength(1);
});

test("NUL bytes and invalid UTF-8 in bad lines are quarantined as U+FFFD", async () => {
  await using ledger = await openPosting();
  const bytes = Buffer.concat([
    Buffer.from("a\0b\n"),
    Buffer.from([0x63, 0xff, 0xfe, 0x64, 0x0a]),
    Buffer.from(line('n\0"\\', 1)),
    Buffer.from(line("ann", 1)),
  ]);
  expect(await ledger.post(ledger.write("a.jsonl", bytes))).toMatchObject({ code: 1 });
  expect(await ledger.balances()).toEqual({ ann: "1" });
  const lines = (await ledger.quarantine()).map(({ line }) => line);
  expect(lines).toEqual(["a\ufffdb", "c\ufffd\ufffdd", line('n\0"\\', 1).trimEnd()]);
});

test("a BOM, blank lines and CRLF are accepted, and positions count every byte", async () => {
  await using ledger = await openPosting();
  const head = `\ufeff${line("ann", 1).replace("\n", "\r\n")}\r\n  \n`;
  const file = ledger.write("a.jsonl", `${head}bad\r\n`);
  expect(await ledger.post(file)).toMatchObject({ code: 1 });
  appendFileSync(file, line("ben", 2));
  expect(await ledger.post(file)).toMatchObject({ code: 0 });
  expect(await ledger.balances()).toEqual({ ann: "1", ben: "2" });
  expect(await ledger.quarantine()).toMatchObject([
    { position: Buffer.byteLength(head), line: "bad" },
  ]);
});

test("amounts are exact, and any text can be a user id", async () => {
  await using ledger = await openPosting();
  const users = ["__proto__", "constructor", "NULL", "{}", 'a"b\\c', "d\n'e", "🦊", "é,e"];
  const lines = users.map((user) => line(user, 0.1) + line(user, 0.2) + line(user, "-0.000000001"));
  expect(await ledger.post(ledger.write("a.jsonl", lines.join("")))).toMatchObject({ code: 0 });
  const all = Object.entries(await ledger.balances());
  expect(all.map(([user]) => user).toSorted()).toEqual(users.toSorted());
  expect(new Set(all.map(([, revenue]) => revenue))).toEqual(new Set(["0.299999999"]));
});

test("if a FILE is missing, it is named, the exit code is 2, and nothing is posted", async () => {
  await using ledger = await openPosting();
  const there = ledger.write("a.jsonl", line("ann", 1));
  const missing = await ledger.post(there, ledger.file("none.jsonl"), dirname(there));
  expect(missing).toMatchObject({ code: 2, stdout: "" });
  expect(missing.stderr).toBe(
    `${ledger.file("none.jsonl")}: no such file\n${dirname(there)}: not a regular file\n`,
  );
  expect(await ledger.post(ledger.write("b.jsonl", ""))).toMatchObject({ code: 0, stderr: "" });
  expect(await ledger.balances()).toEqual({});
});

test("a journal is posted once, even if it is given as FILE, copied and followed", async () => {
  await using ledger = await openPosting();
  await using app = await ledger.start({}, ["--no-processor"]);
  await app.postLines(line("ann", 1) + line("ben", 2));
  const { journal } = ledger;
  expect((await ledger.post(journal)).stdout).toStartWith("posted 2 events");

  await app.post(line("ann", 10));
  await using follower = ledger.process();
  await untilBalance(app, "ann", "11");
  await app.post(line("cid", 4));
  await untilBalance(app, "cid", "4");
  const copy = ledger.file("copy.jsonl");
  copyFileSync(journal, copy);
  expect((await ledger.post(journal, copy)).stdout).toStartWith("posted 0 events");
  expect(await ledger.balances()).toEqual({ ann: "11", ben: "2", cid: "4" });
  expect(follower.child.exitCode).toBeNull();
});

test("a journal that is damaged before its end ends the run with exit code 3, naming file and byte", async () => {
  await using ledger = await openPosting();
  const header = encodeJournalHeader(crypto.randomUUID(), 0);
  const [first, second] = [frame(line("ann", 1)), frame(line("ben", 2))];
  const flipped = Buffer.from(first);
  flipped[flipped.length - 5]! ^= 1;
  const file = ledger.write("j.jsonl", Buffer.concat([header, first, flipped, second]));
  const posted = await ledger.post(file);
  expect(posted.code).toBe(3);
  expect(posted.stderr).toStartWith(`${file} is damaged at byte ${header.length + first.length}: `);
  expect(posted.stderr.trim().split("\n")).toHaveLength(1);
});

test.each([
  ["the first line", "", ""],
  ["the second line", line("ann", 1), ""],
  ["the third line", line("ann", 1).repeat(2), ""],
  ["behind a blank line", "\n", ""],
  ["behind a BOM", "\ufeff", ""],
  ["before the lines that it names", line("ann", 1), frame(line("ann", 1)).toString()],
])(
  "a line like the header of a frame, %s, is quarantined, and the other lines are posted",
  async (_, before, framed) => {
    await using ledger = await openPosting();
    const header = `{"frame":{"bytes":45,"crc32":"50af3868","at":1795661165461}}\n`;
    const file = ledger.write("a.jsonl", before + (framed || header) + line("ben", 2));
    const posted = await ledger.post(file);
    expect(posted).toMatchObject({ code: 1, stderr: "" });
    expect(await ledger.balances()).toMatchObject({ ben: "2" });
    expect(await ledger.quarantine()).toHaveLength(1);
    expect(await ledger.post("--verify", file)).toMatchObject({
      code: 0,
    });
  },
);

test("a piece of a journal and a compressed journal are named, with exit code 2", async () => {
  await using ledger = await openPosting();
  const journal = Buffer.concat([
    encodeJournalHeader(crypto.randomUUID(), 0),
    frame(line("ann", 1)),
  ]);
  const piece = ledger.write("piece.jsonl", frame(line("ann", 1)));
  const compressed = ledger.write("journal.gz", Bun.gzipSync(journal));
  const posted = await ledger.post(piece, compressed);
  expect(posted).toMatchObject({ code: 2, stdout: "" });
  expect(posted.stderr).toContain(`${piece}: this is a piece of a journal: `);
  expect(posted.stderr).toContain(`${compressed}: this is a compressed journal: `);
});

test("bytes of a journal that are not a whole frame are reported, with exit code 1", async () => {
  await using ledger = await openPosting();
  const header = encodeJournalHeader(crypto.randomUUID(), 0);
  const file = ledger.write("j.jsonl", header);
  expect(await ledger.post(file)).toMatchObject({ code: 0, stderr: "" });
  const bare = line("ann", 1);
  appendFileSync(file, bare);
  const reported = `${file}: the last ${bare.length} bytes are not a whole frame of the journal: left for the next run\n`;
  expect(await ledger.post(file)).toMatchObject({ code: 1, stderr: reported });
  ledger.write(
    "j.jsonl",
    Buffer.concat([header, frame(line("ann", 1)), frame(line("ben", 1)).subarray(0, 80)]),
  );
  expect((await ledger.post(file)).stderr).toContain("the last 80 bytes are not a whole frame");
  expect(await ledger.balances()).toEqual({ ann: "1" });
});

test("a journal whose header is damaged is not taken for a file of events", () => {
  const header = encodeJournalHeader(crypto.randomUUID(), 0);
  const events = frame(line("ann", 1));
  const damaged = Array.from(header, (_, index) => {
    const bytes = Buffer.from(header);
    bytes[index]! ^= 1;
    return bytes;
  });
  for (const bytes of [...damaged, Buffer.alloc(header.length), Buffer.from("nonsense\n")])
    expect(isEventFile(Buffer.concat([bytes, events]))).toBe(false);
});

test("a follower quarantines a bad line of the journal and posts the lines after it", async () => {
  await using ledger = await openPosting();
  const id = crypto.randomUUID();
  const header = encodeJournalHeader(id, 0);
  const lines = frame(`${line("ann", 1)}bad\n${line("ben", 2)}`);
  ledger.write("data/eventsPost.jsonl", Buffer.concat([header, lines]));
  await using _follower = ledger.process();
  await until(async () => (await ledger.balances().catch(() => null))?.["ben"] === "2");
  expect(await ledger.balances()).toEqual({ ann: "1", ben: "2" });
  expect(await ledger.quarantine()).toMatchObject([
    { source: `journal:${id}`, position: header.length + lines.indexOf("bad"), line: "bad" },
  ]);
});

test("four processors that post the same 3,000 new users in opposite orders do not deadlock", async () => {
  await using ledger = await openPosting();
  const forth = Array.from({ length: 3_000 }, (_, i) => line(`user${i}`, 1)).join("");
  const back = forth.trimEnd().split("\n").toReversed().join("\n");
  const files = [forth, back, forth, back].map((text, i) => ledger.write(`${i}.jsonl`, text));
  for (const round of [1, 2]) {
    const posted = await (round === 1 ? ledger.postAtOnce(files) : ledger.postEach(files));
    expect(posted.map(({ code, stderr }) => ({ code, stderr }))).toEqual(
      files.map(() => ({ code: 0, stderr: "" })),
    );
    const all = Object.values(await ledger.balances());
    expect(all).toEqual(Array(3_000).fill("4"));
  }
  expect(await ledger.deadlocks()).toBe(0);
});

// In the normal run the test above covers this: all users are new, and all are contended.
longTest(
  "four processors that post random overlapping sets of new users are exact",
  seeded(async (random) => {
    await using ledger = await openPosting();
    const total = new Map<string, number>();
    const files = Array.from({ length: 4 }, (_, i) => {
      const lines = Array.from({ length: 4_000 }, () => {
        const [user, value] = [`user${Math.floor(random() * 2_500)}`, Math.floor(random() * 1e6)];
        total.set(user, (total.get(user) ?? 0) + value);
        return line(user, value);
      });
      return ledger.write(`${i}.jsonl`, lines.join(""));
    });
    const posted = await ledger.postAtOnce(files);
    expect(posted.map(({ code }) => code)).toEqual([0, 0, 0, 0]);
    const wanted = Object.fromEntries([...total].map(([user, sum]) => [user, `${sum}`]));
    expect(await ledger.balances()).toEqual(wanted);
    expect(await ledger.deadlocks()).toBe(0);
  }),
);

test("three processors on the same file share its batches, and each batch counts once", async () => {
  await using ledger = await openPosting();
  // A batch ends with the block of 1 MiB that holds its thousandth bad line. Here that is each block.
  const note = "n".repeat(8_000);
  const group = line("ann", 1, { note }) + "x\n".repeat(20);
  const file = ledger.write("a.jsonl", group.repeat(700));
  const posted = await ledger.postEach([file, file, file]);
  for (const { code, stderr } of posted) expect([0, 1].includes(code!) && stderr === "").toBe(true);
  const counts = posted.map(({ stdout }) => stdout.match(/\d+/g)!.map(Number));
  expect(counts.reduce((sum, [events]) => sum + events!, 0)).toBe(700);
  expect(counts.reduce((sum, [, lines]) => sum + lines!, 0)).toBe(14_000);
  expect(await ledger.balances()).toEqual({ ann: "700" });
  expect(await ledger.countQuarantined()).toBe(14_000);
});

test("each event of a file counts once if another file takes its name while it is posted", async () => {
  await using ledger = await openPosting();
  // A batch ends with the block that holds its thousandth bad line. The processor reads two and waits.
  const content = (user: string) => line(user, 1).repeat(60_000) + "x\n".repeat(1_000);
  const file = ledger.write("a.jsonl", content("old").repeat(4));
  const next = ledger.write("next.jsonl", content("new").repeat(4));
  await ledger.post(ledger.write("empty.jsonl", "")); // creates the tables
  await using sql = connectTest(ledger.url, 2);
  await using first = ledger.process([file]);
  await sql.begin(async (tx) => {
    await tx`lock table users_revenue in exclusive mode`;
    const isWaiting = () => sql`
      select from pg_stat_activity
      where datname = current_database() and wait_event_type = 'Lock' and query like 'with move as%'`;
    await until(async () => (await isWaiting()).length > 0);
    renameSync(next, file);
  });
  expect(await first.exit(), first.stderr.text()).toBe(1);
  expect((await ledger.post(file)).code).toBe(1);
  expect(await ledger.balances()).toEqual({ new: "240000", old: "240000" });
});

test("three files of one name, each posted by two processors at once, count once", async () => {
  await using ledger = await openPosting();
  const files = ["one", "two", "three"].map((folder, i) =>
    ledger.write(`${folder}/a.jsonl`, line(folder, 1) + line("all", 10 ** i)),
  );
  const posted = await ledger.postEach([...files, ...files]);
  expect(posted.map(({ code }) => code)).toEqual([0, 0, 0, 0, 0, 0]);
  expect(await ledger.balances()).toEqual({ one: "1", two: "1", three: "1", all: "111" });
});

test("a processor waits for an unavailable database, and posts its file when the database returns", async () => {
  await using ledger = await openPosting();
  await using proxy = await openProxy(ledger.url);
  proxy.cut();
  const file = ledger.write("a.jsonl", line("ann", 1));
  await using posting = ledger.process([file], { DATABASE_URL: proxy.url });
  await until(() => proxy.refused() >= 3);
  expect(posting.child.exitCode).toBeNull();
  proxy.mend();
  expect(await posting.exit()).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "1" });
});

test("a follower at the end of the journal posts each event that is appended", async () => {
  await using ledger = await openPosting();
  await using app = await ledger.start({}, ["--no-processor"]);
  await using _follower = ledger.process();
  await app.post(line("first", 1));
  await untilBalance(app, "first", "1");
  for (const user of ["ann", "ben", "cid"]) {
    expect((await app.post(line(user, 1))).status).toBe(201);
    await untilBalance(app, user, "1");
  }
});

test("a lock is held even if nothing refers to it any longer", () => {
  using dir = tempDir();
  const release = (() => {
    tryLock(dir.file("forgotten.lock"));
    return tryLock(dir.file("kept.lock"))?.release;
  })();
  Bun.gc(true);
  for (const name of ["forgotten.lock", "kept.lock"]) expect(tryLock(dir.file(name))).toBeNull();
  release?.();
  expect(tryLock(dir.file("kept.lock"))).not.toBeNull();
});

test("a second follower stands by, and takes over when the first is killed", async () => {
  await using ledger = await openPosting();
  await using app = await ledger.start({}, ["--no-processor"]);
  await using first = ledger.process();
  await until(() => first.stderr.text().includes("following "));
  await using second = ledger.process();
  await until(() => second.stderr.text().includes("standing by"));
  await app.post(line("ann", 1));
  await untilBalance(app, "ann", "1");

  first.kill("SIGKILL");
  await app.post(line("ann", 10));
  await untilBalance(app, "ann", "11");
  expect(second.stderr.text()).toContain("following ");
});

test("SIGTERM and SIGINT end a follower with exit code 0: at work, standing by, or without a database", async () => {
  await using ledger = await openPosting();
  await using atWork = ledger.process();
  await until(() => atWork.stderr.text().includes("following "));
  await using standingBy = ledger.process();
  await until(() => standingBy.stderr.text().includes("standing by"));
  await using proxy = await openProxy(ledger.url);
  proxy.cut();
  ledger.write("other/eventsPost.jsonl", encodeJournalHeader(crypto.randomUUID(), 0));
  const settings = { DATA_DIR: ledger.file("other"), DATABASE_URL: proxy.url };
  await using without = ledger.process([], settings);
  await until(() => without.stderr.text().includes("waiting; database"));

  standingBy.kill("SIGINT");
  without.kill("SIGTERM");
  expect([await standingBy.exit(), await without.exit()]).toEqual([0, 0]);
  atWork.kill("SIGTERM");
  expect(await atWork.exit()).toBe(0);
  expect(atWork.stdout.text()).toBe("");
});

function quarantined(row: { position: number; line: string }) {
  return { source: "file:a.jsonl#1", reason: expect.stringMatching(/long/), ...row };
}

test("processor.ts FILE reports what it posted although the connection was lost during a slow COMMIT", async () => {
  await using ledger = await openLedger();
  await ledger.tool([ledger.write("first.jsonl", line("zoe", 1))]);
  await ledger.select(
    "create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(3); return null; end $$",
  );
  await ledger.select(
    "create constraint trigger slow after update on checkpoints deferrable initially deferred for each row execute function slow()",
  );
  await using proxy = await openProxy(ledger.url);
  const file = ledger.write("a.jsonl", `${line("ann", 1).repeat(3)}bad\n`);
  await using processor = ledger.process([file], { DATABASE_URL: proxy.url });
  const isCommitting = async () =>
    (await ledger.select("select from pg_stat_activity where wait_event = 'PgSleep'")).length > 0;
  await until(isCommitting);
  proxy.cut();
  proxy.mend();
  expect(await processor.exit()).toBe(1);
  expect(processor.stdout.text()).toStartWith("posted 3 events (1 line quarantined)");
  expect(await ledger.balances()).toEqual({ ann: "3", zoe: "1" });
});

/** A ledger, and the processors that post files to it. */
async function openPosting() {
  const ledger = await openLedger();
  const post = (...files: string[]) => ledger.tool(files);
  const postEach = (files: string[]) => Promise.all(files.map((file) => post(file)));
  return {
    ...ledger,
    /** One processor for all files. */
    post,
    /** A processor for each file, at the same time. */
    postEach,
    /** The same, but none changes balances before all of them are ready to. */
    async postAtOnce(files: string[]) {
      await using sql = connectTest(ledger.url, 2);
      await sql.file(join(root, "schema.sql"));
      const { posted } = await sql.begin(async (holding) => {
        await holding`lock table users_revenue in exclusive mode`;
        const posted = postEach(files);
        await until(async () => {
          const [row] = await sql<{ waiting: number }[]>`
            select count(*)::int as waiting from pg_locks
            where relation = 'users_revenue'::regclass and not granted`;
          return row?.waiting === files.length;
        });
        return { posted }; // in an object: a promise would be awaited while the lock is held
      });
      return posted;
    },
    async deadlocks() {
      const [row] = await ledger.select<{ deadlocks: number }>(
        "select deadlocks::int from pg_stat_database where datname = current_database()",
      );
      return row?.deadlocks;
    },
  };
}
