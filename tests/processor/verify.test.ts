/** Reconciling: what was posted matches its sources, and what was changed behind their back is found. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, rmSync } from "node:fs";
import { join } from "node:path";

import { openDatabase } from "../../lib/ledger/database.ts";
import { openTally, tryWithRecountLock, withRecountLock } from "../../lib/ledger/reconcile.ts";
import { disk } from "../../lib/journal/disk.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { listSegmentFiles } from "../../lib/journal/segments.ts";
import { retryQuarantine } from "../../lib/processor/quarantine.ts";
import { snapshotUpTo } from "../../lib/processor/recount.ts";
import { deleteSegments } from "../../lib/processor/retention.ts";
import { Sums } from "../../lib/event/sums.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { seeded } from "../support/random.ts";

setDefaultTimeout(180_000);

const quiet = () => {};

/** A database, a folder, and the tools that work on both. */
async function openLedger() {
  const database = await testDatabase();
  const dir = tempDir();
  const dataDir = dir.file("data");
  const env = { DATA_DIR: dataDir, DATABASE_URL: database.url };
  const sql = connectTest(database.url);
  return {
    ...{ dir, env, sql, dataDir, url: database.url },
    tool: (...args: string[]) => run("processor.ts", { args, env }),
    async deleteSegments(keepDays: number) {
      const ledger = openDatabase(() => database.url, "test", 1);
      const path = join(dataDir, "eventsPost.jsonl");
      return deleteSegments({ database: ledger, path, keepDays }).finally(() => ledger.close());
    },
    async [Symbol.asyncDispose]() {
      await sql[Symbol.asyncDispose]();
      await database.drop();
      dir[Symbol.dispose]();
    },
  };
}

const event = (userId: string, value: number, more: object = {}) =>
  JSON.stringify({ userId, name: "add_revenue", value, ...more });
const file = (path: string, lines: string[]) => Bun.write(path, `${lines.join("\n")}\n`);

test(
  "a recount matches: repeated and conflicting ids, bad lines, sources and files, over two servers",
  seeded(async (random) => {
    await using ledger = await openLedger();
    using other = tempDir();
    const pick = (n: number) => Math.floor(random() * n);
    const line = () =>
      pick(20) === 0
        ? ["bad", "{}", event("", 1)][pick(3)]!
        : event(`u${pick(30)}`, pick(1000) / 100, pick(2) ? { id: `i${pick(60)}` } : {});
    const lines = (n: number) => Array.from({ length: n }, line);
    const path = ledger.dir.file("sent.jsonl");
    const moved = lines(300);
    {
      const app = { databaseUrl: ledger.url, env: { JOURNAL_SEGMENT_BYTES: "4000" } };
      await using one = await startApp({ ...app, dataDir: ledger.dataDir });
      await using two = await startApp({ ...app, dataDir: other.path });
      // Four rounds did not always notice when the note of repeated events was missing.
      for (let round = 0; round < 8; round++) {
        const body = lines(30).join("\n");
        await Promise.all([one.postLines(body), pick(2) ? two.postLines(body) : null]);
        // The source continues on either server, and some of it is stored by both.
        await file(path, moved.slice(0, 35 * (round + 1)));
        const to = [[one], [two], [one, two]][pick(3)]!;
        await Promise.all(
          to.map(({ url }) =>
            run("client.ts", { args: [path, "--wait"], env: { SERVER_URL: url } }),
          ),
        );
      }
      await file(ledger.dir.file("a.jsonl"), lines(200));
      await ledger.tool(ledger.dir.file("a.jsonl"));
      await Bun.write(ledger.dir.file("b.jsonl"), lines(50).join("\n")); // no newline
      await ledger.tool(ledger.dir.file("b.jsonl"));
      await Bun.write(
        ledger.dir.file("b.jsonl"),
        `${await Bun.file(ledger.dir.file("b.jsonl")).text()}\n${line()}\n`,
      );
      await ledger.tool(ledger.dir.file("b.jsonl"));
    }
    await ledger.tool(`${other.path}/eventsPost.jsonl`);
    await ledger.tool(`${ledger.dataDir}/eventsPost.jsonl`);
    const sources = [
      `${other.path}/eventsPost.jsonl`,
      ledger.dir.file("a.jsonl"),
      ledger.dir.file("b.jsonl"),
    ];
    const before = await balances(ledger.url);
    const { code, stdout, stderr } = await ledger.tool("--verify", ...sources);
    expect(stdout, stderr).toBe(`${Object.keys(before).length} balances match their sources\n`);
    expect(code).toBe(0);

    // The recount does not need the claims of ids, which are deleted after ID_DAYS.
    await ledger.sql`truncate event_ids`;
    await ledger.sql`update users_revenue set revenue = revenue * 2 where user_id < 'u2'`;
    await ledger.sql`delete from users_revenue where user_id = 'u3'`;
    await ledger.sql`insert into users_revenue values ('nobody', 7)`;
    expect((await ledger.tool("--rebuild", ...sources)).code).toBe(0);
    expect(await balances(ledger.url)).toEqual(before);
  }),
);

test("--verify and --rebuild name a missing source, and compare and change nothing", async () => {
  await using ledger = await openLedger();
  using other = tempDir();
  const path = ledger.dir.file("a.jsonl");
  await file(path, [event("ann", 1)]);
  await ledger.tool(path);
  {
    await using server = await startApp({ dataDir: other.path, databaseUrl: ledger.url });
    await server.post(event("bob", 1));
    await until(async () => (await server.balance("bob")) === "1");
  }
  await ledger.sql`update users_revenue set revenue = 5`;
  for (const tool of ["--verify", "--rebuild"]) {
    const { code, stderr } = await ledger.tool(tool);
    expect(code).toBe(2);
    expect(stderr).toContain("bytes of file a.jsonl, which have been posted; add its path");
    expect(stderr).toContain("which has been posted; add the path of its eventsPost.jsonl");
  }
  // A file of that name with other bytes is another file.
  await file(ledger.dir.file("x/a.jsonl"), [event("ann", 2)]);
  const { code } = await ledger.tool(
    "--rebuild",
    ledger.dir.file("x/a.jsonl"),
    `${other.path}/eventsPost.jsonl`,
  );
  expect(code).toBe(2);
  expect(await balances(ledger.url)).toEqual({ ann: "5", bob: "5" });
  expect((await ledger.tool("--rebuild", path, `${other.path}/eventsPost.jsonl`)).code).toBe(0);
  expect(await balances(ledger.url)).toEqual({ ann: "1", bob: "1" });
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
  const path = ledger.dir.file("a.jsonl");
  await file(
    path,
    Array.from({ length: 100_000 }, (_, i) => event(`user${i}`, 1.25)),
  );
  await ledger.tool(path);
  await ledger.sql`update users_revenue set revenue = revenue + 0.01 where user_id = 'user777'`;
  const found = await ledger.tool("--verify", path);
  expect(found.code).toBe(1);
  expect(found.stdout).toBe(
    'user "user777": balance 1.26, expected 1.25; off by 0.01\n1 of 100000 balances differ from their sources\n',
  );

  await ledger.sql`update users_revenue set revenue = revenue + 0.01`;
  const sums = new Set<string>();
  let done = false;
  const reading = (async () => {
    while (!done) {
      const [row] =
        await ledger.sql`select trim_scale(sum(revenue))::text as sum from users_revenue`;
      sums.add(row?.["sum"]);
      await Bun.sleep(10);
    }
  })();
  expect((await ledger.tool("--rebuild", path)).code).toBe(0);
  done = true;
  await reading;
  sums.add("125000");
  expect([...sums]).toEqual(["126000.01", "125000"]);
  expect((await ledger.tool("--verify", path)).code).toBe(0);
});

test("while events are posted, --verify finds no difference and --rebuild loses none of them", async () => {
  await using ledger = await openLedger();
  await using server = await startApp({
    ...{ dataDir: ledger.dataDir, databaseUrl: ledger.url },
    env: { JOURNAL_SEGMENT_BYTES: "20000" },
  });
  let sent = 0;
  let done = false;
  const sending = (async () => {
    while (!done) {
      const body = Array.from({ length: 20 }, (_, i) => event(`u${i}`, 1)).join("\n");
      if ((await server.postLines(body)).status === 201) sent++;
    }
  })();
  using _ = { [Symbol.dispose]: () => void (done = true) };
  await until(async () => (await server.balance("u1")) !== null, 30_000);
  for (let i = 0; i < 2; i++) {
    const verified = await ledger.tool("--verify");
    expect(verified.stdout).toEndWith("balances match their sources\n");
    await ledger.sql`update users_revenue set revenue = revenue + 100 where user_id = 'u1'`;
    const both = await Promise.all([ledger.tool("--rebuild"), ledger.tool("--rebuild")]);
    expect(both.map(({ code }) => code)).toEqual([0, 0]);
    expect(both.map(({ stdout }) => stdout).join("")).toContain("balances corrected: 1");
  }
  done = true;
  await sending;
  await until(async () => (await server.balance("u1")) === `${sent}`, 30_000);
  expect(new Set(Object.values(await balances(ledger.url)))).toEqual(new Set([`${sent}`]));
});

test("segments are deleted once old and posted, never before, and a recount still matches", async () => {
  await using ledger = await openLedger();
  const segments = () =>
    readdirSync(ledger.dataDir).filter((name) => /^eventsPost\.\d+\.jsonl$/.test(name));
  const app = { dataDir: ledger.dataDir, databaseUrl: ledger.url };
  const env = { JOURNAL_SEGMENT_BYTES: "2000" };
  {
    await using server = await startApp({ ...app, args: ["--no-processor"], env });
    for (let i = 0; i < 100; i++) {
      await server.post(event(`u${i % 7}`, 1.5, i % 3 ? {} : { id: `i${i % 20}` }));
      if (i % 10 === 0)
        await server.postLines(`${event("x", 1)}\nbad\n${event("y", 2, { id: "y" })}`);
    }
  }
  const before = segments();
  expect(before.length).toBeGreaterThan(4);
  {
    await using server = await startApp({ ...app, env });
    await until(async () => (await server.balance("x")) === "10");
    expect(await ledger.deleteSegments(1)).toEqual([]); // posted, but not old
    expect(segments()).toEqual(before);
  }
  {
    await using server = await startApp({ ...app, env: { ...env, JOURNAL_KEEP_DAYS: "0" } });
    await until(() => segments().length === 0);
    expect((await ledger.tool("--verify")).stdout).toEndWith("balances match their sources\n");
    await server.post(event("x", 1));
    await until(async () => (await server.balance("x")) === "11");
  }
  const all = await balances(ledger.url);
  await ledger.sql`update users_revenue set revenue = revenue + 0.01 where user_id = 'u1'`;
  expect((await ledger.tool("--verify")).code).toBe(1);
  expect((await ledger.tool("--rebuild")).code).toBe(0);
  expect(await balances(ledger.url)).toEqual(all);
  expect((await ledger.tool("--check")).code).toBe(0);
});

test("a segment that is not wholly posted is never deleted", async () => {
  await using ledger = await openLedger();
  const app = { dataDir: ledger.dataDir, databaseUrl: ledger.url };
  const env = { JOURNAL_SEGMENT_BYTES: "500" };
  await using server = await startApp({ ...app, env });
  await server.post(event("ann", 1));
  await until(async () => (await server.balance("ann")) === "1");
  await ledger.sql.begin(async (tx) => {
    await tx`lock table users_revenue in exclusive mode`;
    for (let i = 0; i < 30; i++) await server.post(event("ann", 1));
    const segments = () => readdirSync(ledger.dataDir).filter((name) => /\.\d+\.jsonl$/.test(name));
    const before = segments();
    const deleted = await ledger.deleteSegments(0);
    expect(segments()).toHaveLength(before.length - deleted.length);
    expect(segments().length).toBeGreaterThan(4);
  });
  await until(async () => (await server.balance("ann").catch(() => null)) === "31", 30_000);
});

test("a line whose id is free again leaves the quarantine once; the others remain, with their reasons", async () => {
  await using ledger = await openLedger();
  await using server = await startApp({ dataDir: ledger.dataDir, databaseUrl: ledger.url });
  await server.post(event("ann", 1, { id: "a" }));
  await server.post(event("bob", 2, { id: "a" }));
  await server.post(event("bob", 3, { id: "b" }));
  const path = ledger.dir.file("a.jsonl");
  await file(path, ["bad", event("bob", 4, { id: "b" })]);
  await until(async () => (await server.balance("bob")) === "3");
  await ledger.tool(path);

  const listed = await ledger.tool("--quarantine");
  expect(listed.code).toBe(1);
  expect(listed.stdout).toContain("its id belongs to another event, which came first");
  expect(listed.stdout).toContain('not JSON: "bad"');
  expect(listed.stdout).toEndWith("lines in quarantine: 3\n");

  const stayed = await ledger.tool("--quarantine=retry");
  expect(stayed.stdout).toEndWith("lines posted: 0; remaining in quarantine: 3\n");
  await ledger.sql`delete from event_ids where id = 'a'`;
  const [again, once] = await Promise.all([
    ledger.tool("--quarantine=retry"),
    ledger.tool("--quarantine=retry"),
  ]);
  const posted = [again, once].map(({ stdout }) => /lines posted: (\d)/.exec(stdout)?.[1]);
  expect(posted.toSorted()).toEqual(["0", "1"]);
  expect(again.code).toBe(1);
  expect(await balances(ledger.url)).toEqual({ ann: "1", bob: "5" });
  expect((await ledger.tool("--verify", path)).stdout).toEndWith(
    "2 balances match their sources\n",
  );
});

test("an event of a file whose id belonged to another is posted by a retry after the id is free", async () => {
  await using ledger = await openLedger();
  const path = ledger.dir.file("a.jsonl");
  await file(path, [event("ann", 1, { id: "x" }), event("ann", 2.5, { id: "x" })]);
  expect((await ledger.tool(path)).code).toBe(1);
  await ledger.sql`delete from event_ids`;
  expect((await ledger.tool("--quarantine=retry", path)).stdout).toStartWith("lines posted: 1");
  expect(await balances(ledger.url)).toEqual({ ann: "3.5" });
});

test("a tool keeps its lock and its temporary tables while its connection is idle", async () => {
  await using ledger = await openLedger();
  const open = () => openDatabase(() => `${ledger.url}?idle_timeout=1&max_lifetime=1`, "tool", 1);
  const [one, two] = [open(), open()];
  const taken = await withRecountLock(one, quiet, async (sql) => {
    await sql`create temp table kept ()`;
    await Bun.sleep(2_500); // the driver would close it after 1 s
    const other = await tryWithRecountLock(two, async () => true);
    await sql`select from kept`;
    return other;
  });
  expect(taken).toBeNull();
  await Promise.all([one.close(), two.close()]);
});

test("a retry reads nothing of segments that are about to be deleted", async () => {
  await using ledger = await openLedger();
  const journal = await openJournal({ directory: ledger.dataDir, segmentBytes: 200 });
  for (let i = 0; i < 5; i++) await journal.append(Buffer.from(`${event(`user${i}`, 1)}\nbad\n`));
  await journal.close();
  const path = join(ledger.dataDir, "eventsPost.jsonl");
  await ledger.tool(path);
  const segments = await listSegmentFiles(path, disk);
  const [reader, database] = [
    await openJournalReader(path),
    openDatabase(() => ledger.url, "test", 1),
  ];
  if (!reader) throw new Error("no journal");
  expect(await snapshotUpTo(database, reader, segments[2]?.base ?? 0)).toBe(true);
  // It waits for a recount, and in this time they go.
  const waiting = Promise.withResolvers<void>();
  const recounting = Promise.withResolvers<void>();
  const recount = withRecountLock(database, quiet, () => recounting.promise);
  const tool = openDatabase(() => ledger.url, "tool", 1);
  await until(
    async () => (await ledger.sql`select from pg_locks where locktype = 'advisory'`).length > 0,
  );
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

test("SIGINT and SIGTERM end a tool that waits", async () => {
  await using ledger = await openLedger();
  const journal = await openJournal({ directory: ledger.dataDir });
  await journal.close();
  const database = openDatabase(() => ledger.url, "test", 1);
  const done = Promise.withResolvers<void>();
  const recount = withRecountLock(database, quiet, () => done.promise);
  await until(
    async () => (await ledger.sql`select from pg_locks where locktype = 'advisory'`).length > 0,
  );
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    await using tool = spawn("processor.ts", { args: ["--verify"], env: ledger.env });
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
