/** --verify and --rebuild: balances match their sources, and any other change to a balance is found. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { rmSync } from "node:fs";

import { CannotProceed, openDatabase } from "../../lib/ledger/database.ts";
import { openTally, withRecountLock } from "../../lib/ledger/reconcile.ts";
import { disk } from "../../lib/journal/disk.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { listSegmentFiles } from "../../lib/journal/segments.ts";
import { retryQuarantine } from "../../lib/processor/quarantine.ts";
import { snapshotUpTo } from "../../lib/processor/recount.ts";
import { openRetention } from "../../lib/processor/retention.ts";
import { Sums } from "../../lib/event/sums.ts";
import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
import { run, tempDir, until, untilBalance } from "../support/programs.ts";
import { seeded } from "../support/random.ts";

setDefaultTimeout(180_000);

const quiet = () => {};

type Ledger = Awaited<ReturnType<typeof openLedger>>;

/** Deletes the segments that are posted and older than `keepDays`. */
async function deleteOld({ url, journal: path }: Ledger, keepDays: number): Promise<string[]> {
  const database = openDatabase(() => url, "test", 1);
  const deleted = Array.fromAsync(openRetention({ database, path, keepDays })());
  return deleted.finally(() => database.close());
}

/** Waits until somebody holds the lock of a recount. */
function untilRecount(sql: ReturnType<typeof connectTest>): Promise<unknown> {
  const locks = () => sql`
    select from pg_locks
    where database = (select oid from pg_database where datname = current_database())
      and relation = to_regclass('removed') and mode = 'ShareUpdateExclusiveLock'`;
  return until(async () => (await locks()).length > 0);
}

test(
  "a recount matches: repeated and conflicting ids, bad lines, sources and files, over two servers",
  seeded(async (random) => {
    await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "4000" });
    await using sql = connectTest(ledger.url);
    using other = tempDir();
    const pick = (n: number) => Math.floor(random() * n);
    const someLine = () =>
      pick(20) === 0
        ? ["bad\n", "{}\n", line("")][pick(3)]!
        : line(`u${pick(30)}`, pick(1000) / 100, pick(2) ? { id: `i${pick(60)}` } : {});
    const someLines = (n: number) => Array.from({ length: n }, someLine).join("");
    const path = ledger.file("sent.jsonl");
    const moved = Array.from({ length: 300 }, someLine);
    {
      await using one = await ledger.start();
      await using two = await ledger.start({ DATA_DIR: other.path });
      // Four rounds did not always notice when the note of repeated events was missing.
      for (let round = 0; round < 8; round++) {
        const body = someLines(30).trimEnd();
        await Promise.all([one.postLines(body), pick(2) ? two.postLines(body) : null]);
        // The source continues on either server, and some of it is stored by both.
        await Bun.write(path, moved.slice(0, 35 * (round + 1)).join(""));
        const to = [[one], [two], [one, two]][pick(3)]!;
        await Promise.all(
          to.map(({ url }) =>
            run("client.ts", { args: [path, "--wait"], env: { SERVER_URL: url } }),
          ),
        );
      }
      await ledger.tool([ledger.write("a.jsonl", someLines(200))]);
      const incomplete = someLines(50).trimEnd();
      await ledger.tool([ledger.write("b.jsonl", incomplete)]);
      await ledger.tool([ledger.write("b.jsonl", `${incomplete}\n${someLine()}`)]);
    }
    const otherJournal = other.file("eventsPost.jsonl");
    await ledger.tool([otherJournal]);
    await ledger.tool([ledger.journal]);
    const sources = [otherJournal, ledger.file("a.jsonl"), ledger.file("b.jsonl")];
    const before = await ledger.balances();
    const { code, stdout, stderr } = await ledger.tool(["--verify", ...sources]);
    expect(stdout, stderr).toBe(`${Object.keys(before).length} balances match their sources\n`);
    expect(code).toBe(0);

    // The recount does not need the claims of ids, which are deleted after ID_DAYS.
    await sql`truncate ids`;
    await sql`update users_revenue set revenue = revenue * 2 where user_id < 'u2'`;
    await sql`delete from users_revenue where user_id = 'u3'`;
    await sql`insert into users_revenue values ('unknown', 7)`;
    expect((await ledger.tool(["--rebuild", ...sources])).code).toBe(0);
    expect(await ledger.balances()).toEqual(before);
  }),
);

test("--verify and --rebuild name a missing source, and compare and change nothing", async () => {
  await using ledger = await openLedger();
  using other = tempDir();
  const path = ledger.write("a.jsonl", line("ann"));
  const journal = other.file("eventsPost.jsonl");
  await ledger.tool([path]);
  {
    await using server = await ledger.start({ DATA_DIR: other.path });
    await server.post(event("bob"));
    await untilBalance(server, "bob", "1");
  }
  await ledger.select("update users_revenue set revenue = 5");
  for (const tool of ["--verify", "--rebuild"]) {
    const { code, stderr } = await ledger.tool([tool]);
    expect(code).toBe(2);
    expect(stderr).toContain("bytes of file a.jsonl, which have been posted; add its path");
    expect(stderr).toContain("which has been posted; add the path of its eventsPost.jsonl");
  }
  // A file of that name with other bytes is another file.
  const namesake = ledger.write("x/a.jsonl", line("ann", 2));
  expect((await ledger.tool(["--rebuild", namesake, journal])).code).toBe(2);
  expect(await ledger.balances()).toEqual({ ann: "5", bob: "5" });
  expect((await ledger.tool(["--rebuild", path, journal])).code).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "1", bob: "1" });
});

test("a tally that is summed now and then keeps the same sums", async () => {
  await using ledger = await openLedger();
  const database = openDatabase(() => ledger.url, "test", 1);
  const sums = await database.use(
    (sql) =>
      sql.begin(async (tx) => {
        const tally = await openTally(tx, 25);
        for (let round = 1; round <= 20; round++) {
          const changes = new Sums();
          for (let user = 0; user < 10; user++) changes.addTo(`u${user}`, BigInt(user * round));
          await tally.add(changes);
        }
        return tx`select user_id as user, (revenue * 1e9)::int as sum from (${tally.sums()}) t order by 1`;
      }),
    30_000,
  );
  await database.close();
  const expected = Array.from({ length: 10 }, (_, user) => ({ user: `u${user}`, sum: 210 * user }));
  expect([...sums]).toEqual(expected);
});

test("--verify finds 0.01 in one of 100,000 balances, and --rebuild corrects it in one step for readers", async () => {
  await using ledger = await openLedger();
  const lines = Array.from({ length: 100_000 }, (_, i) => line(`user${i}`, 1.25));
  const path = ledger.write("a.jsonl", lines.join(""));
  await ledger.tool([path]);
  await ledger.select(
    "update users_revenue set revenue = revenue + 0.01 where user_id = 'user777'",
  );
  const found = await ledger.tool(["--verify", path]);
  expect(found.code).toBe(1);
  expect(found.stdout).toBe(
    'user "user777": balance 1.26, expected 1.25; off by 0.01\n1 of 100000 balances differ from their sources\n',
  );

  await ledger.select("update users_revenue set revenue = revenue + 0.01");
  const sums = new Set<string>();
  let done = false;
  const reading = (async () => {
    while (!done) {
      const [row] = await ledger.select<{ sum: string }>(
        "select trim_scale(sum(revenue))::text as sum from users_revenue",
      );
      sums.add(row?.sum as string);
      await Bun.sleep(10);
    }
  })();
  expect((await ledger.tool(["--rebuild", path])).code).toBe(0);
  done = true;
  await reading;
  sums.add("125000");
  expect([...sums]).toEqual(["126000.01", "125000"]);
  expect((await ledger.tool(["--verify", path])).code).toBe(0);
});

test("while events are posted, --verify finds no difference and --rebuild loses none of them", async () => {
  await using ledger = await openLedger();
  await using server = await ledger.start({ JOURNAL_SEGMENT_BYTES: "20000" });
  let sent = 0;
  let done = false;
  const sending = (async () => {
    while (!done) {
      const body = Array.from({ length: 20 }, (_, i) => line(`u${i}`)).join("");
      if ((await server.postLines(body)).status === 201) sent++;
    }
  })();
  using _ = { [Symbol.dispose]: () => void (done = true) };
  await until(async () => (await server.balance("u1")) !== null, 30_000);
  for (let i = 0; i < 2; i++) {
    const verified = await ledger.tool(["--verify"]);
    expect(verified.stdout).toEndWith("balances match their sources\n");
    await ledger.select("update users_revenue set revenue = revenue + 100 where user_id = 'u1'");
    const both = await Promise.all([ledger.tool(["--rebuild"]), ledger.tool(["--rebuild"])]);
    expect(both.map(({ code }) => code)).toEqual([0, 0]);
    expect(both.map(({ stdout }) => stdout).join("")).toContain("balances corrected: 1");
  }
  done = true;
  await sending;
  await untilBalance(server, "u1", `${sent}`, 30_000);
  expect(new Set(Object.values(await ledger.balances()))).toEqual(new Set([`${sent}`]));
});

test("segments are deleted once old and posted, never before, and a recount still matches", async () => {
  await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "2000" });
  {
    await using server = await ledger.start({}, ["--no-processor"]);
    for (let i = 0; i < 100; i++) {
      await server.post(event(`u${i % 7}`, 1.5, i % 3 ? {} : { id: `i${i % 20}` }));
      if (i % 10 === 0) await server.postLines(`${line("x")}bad\n${line("y", 2, { id: "y" })}`);
    }
  }
  const before = segmentNames(ledger.dataDir);
  expect(before.length).toBeGreaterThan(4);
  {
    await using server = await ledger.start();
    await untilBalance(server, "x", "10");
    expect(await deleteOld(ledger, 1)).toEqual([]); // posted, but not old
    expect(segmentNames(ledger.dataDir)).toEqual(before);
  }
  {
    await using server = await ledger.start({ JOURNAL_KEEP_DAYS: "0" });
    await until(() => segmentNames(ledger.dataDir).length === 0);
    expect((await ledger.tool(["--verify"])).stdout).toEndWith("balances match their sources\n");
    await server.post(event("x"));
    await untilBalance(server, "x", "11");
  }
  const all = await ledger.balances();
  await ledger.select("update users_revenue set revenue = revenue + 0.01 where user_id = 'u1'");
  expect((await ledger.tool(["--verify"])).code).toBe(1);
  expect((await ledger.tool(["--rebuild"])).code).toBe(0);
  expect(await ledger.balances()).toEqual(all);
  expect((await ledger.tool(["--check"])).code).toBe(0);
});

test("a segment that is not wholly posted is never deleted", async () => {
  await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "500" });
  await using sql = connectTest(ledger.url);
  await using server = await ledger.start();
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1");
  await sql.begin(async (tx) => {
    await tx`lock table users_revenue in exclusive mode`;
    for (let i = 0; i < 30; i++) await server.post(event("ann"));
    const before = segmentNames(ledger.dataDir);
    const deleted = await deleteOld(ledger, 0);
    expect(segmentNames(ledger.dataDir)).toHaveLength(before.length - deleted.length);
    expect(segmentNames(ledger.dataDir).length).toBeGreaterThan(4);
  });
  await untilBalance(server, "ann", "31", 30_000);
});

test("--quarantine=retry posts a line once when its id is free again; other lines remain, with their reasons", async () => {
  await using ledger = await openLedger();
  await using server = await ledger.start();
  await server.post(event("ann", 1, { id: "a" }));
  await server.post(event("bob", 2, { id: "a" }));
  await server.post(event("bob", 3, { id: "b" }));
  const path = ledger.write("a.jsonl", `bad\n${line("bob", 4, { id: "b" })}`);
  await untilBalance(server, "bob", "3");
  await ledger.tool([path]);

  const listed = await ledger.tool(["--quarantine"]);
  expect(listed.code).toBe(1);
  expect(listed.stdout).toContain("its id belongs to another event, which came first");
  expect(listed.stdout).toContain('not JSON: "bad"');
  expect(listed.stdout).toEndWith("lines in quarantine: 3\n");

  const stayed = await ledger.tool(["--quarantine=retry"]);
  expect(stayed.stdout).toEndWith("lines posted: 0; remaining in quarantine: 3\n");
  await ledger.select("delete from ids where id = 'a'");
  const [again, once] = await Promise.all([
    ledger.tool(["--quarantine=retry"]),
    ledger.tool(["--quarantine=retry"]),
  ]);
  const posted = [again, once].map(({ stdout }) => /lines posted: (\d)/.exec(stdout)?.[1]);
  expect(posted.toSorted()).toEqual(["0", "1"]);
  expect(again.code).toBe(1);
  expect(await ledger.balances()).toEqual({ ann: "1", bob: "5" });
  expect((await ledger.tool(["--verify", path])).stdout).toEndWith(
    "2 balances match their sources\n",
  );
});

test("--quarantine=retry posts an event of a file when its id, which belonged to another event, is free again", async () => {
  await using ledger = await openLedger();
  const lines = line("ann", 1, { id: "x" }) + line("ann", 2.5, { id: "x" });
  const path = ledger.write("a.jsonl", lines);
  expect((await ledger.tool([path])).code).toBe(1);
  await ledger.select("delete from ids");
  expect((await ledger.tool(["--quarantine=retry", path])).stdout).toStartWith("lines posted: 1");
  expect(await ledger.balances()).toEqual({ ann: "3.5" });
});

test("a tool has its lock until it ends, and then leaves no table behind", async () => {
  await using ledger = await openLedger();
  const open = () => openDatabase(() => ledger.url, "tool", 1);
  const [one, two] = [open(), open()];
  const refuse = (line: string) => {
    throw new CannotProceed(line);
  };
  await withRecountLock(one, quiet, async (sql) => {
    await openTally(sql);
    const other = withRecountLock(two, refuse, async () => {});
    await expect(other).rejects.toThrow("waiting for another recount");
  });
  await withRecountLock(two, refuse, async () => {});
  const left = () => ledger.select("select from pg_class where relpersistence = 't'");
  expect(await left()).toEqual([]);
  await one.close();
  await two.close();
});

test("--quarantine=retry reads no segment that is about to be deleted", async () => {
  await using ledger = await openLedger();
  await using sql = connectTest(ledger.url);
  const journal = await openJournal({ directory: ledger.dataDir, segmentBytes: 200 });
  for (let i = 0; i < 5; i++) await journal.append(Buffer.from(`${line(`user${i}`)}bad\n`));
  await journal.close();
  const path = ledger.journal;
  await ledger.tool([path]);
  const segments = await listSegmentFiles(path, disk);
  const [reader, database] = [
    await openJournalReader(path),
    openDatabase(() => ledger.url, "test", 1),
  ];
  if (!reader) throw new Error("no journal");
  await snapshotUpTo(database, reader, segments[2]?.base ?? 0);
  // The retry waits for a recount, and meanwhile the segments are deleted.
  const waiting = Promise.withResolvers<void>();
  const recounting = Promise.withResolvers<void>();
  const recount = withRecountLock(database, quiet, () => recounting.promise);
  const tool = openDatabase(() => ledger.url, "tool", 1);
  await untilRecount(sql);
  const retrying = retryQuarantine({
    ...{ database: tool, paths: [path], print: quiet },
    say: () => waiting.resolve(),
  });
  await waiting.promise;
  for (const { path } of segments.slice(0, 2)) rmSync(path);
  recounting.resolve();
  expect(await retrying).toBe(5);
  await recount;
  await Promise.all([tool.close(), database.close()]);
});

test("SIGINT and SIGTERM end a tool that waits for another recount", async () => {
  await using ledger = await openLedger();
  await using sql = connectTest(ledger.url);
  const journal = await openJournal({ directory: ledger.dataDir });
  await journal.close();
  const database = openDatabase(() => ledger.url, "test", 1);
  const done = Promise.withResolvers<void>();
  const recount = withRecountLock(database, quiet, () => done.promise);
  await untilRecount(sql);
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    await using tool = ledger.process(["--verify"]);
    await until(() => tool.stderr.text().includes("waiting"));
    tool.kill(signal);
    await until(() => tool.child.signalCode === signal, 2_000);
  }
  done.resolve();
  await recount;
  await database.close();
});

test("options that exclude each other are invalid use", async () => {
  for (const args of [["--verify", "--check"], ["--yes"], ["--quarantine=all"], ["--verify=x"]]) {
    const { code, stderr } = await run("processor.ts", { args });
    expect(code, args.join(" ")).toBe(2);
    expect(stderr).not.toBe("");
  }
});
