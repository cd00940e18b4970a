/** `--backup DIR` and `--restore DIR`: under load, killed in between, and where something is in the way. */
import { expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  cpSync,
  existsSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
} from "node:fs";
import { join } from "node:path";

import { TABLES } from "../../lib/ledger/copy.ts";
import { event, line } from "../support/events.ts";
import { readLines, segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
import {
  isInstalled,
  root,
  run,
  startApp,
  tempDir,
  until,
  untilBalance,
} from "../support/programs.ts";

setDefaultTimeout(90_000);

const MATCH = "match their sources\n";
const SMALL = { JOURNAL_SEGMENT_BYTES: "4000" };

type Ledger = Awaited<ReturnType<typeof openLedger>>;

/** A backup of a ledger with segments, a file posted by path, ids and quarantine; and the balances in it. */
async function makeBackup() {
  const ledger = await openLedger(SMALL);
  const file = ledger.write("posted.jsonl", line("ben", 7) + line("zoë\t\\N", "0.5", { id: "f" }));
  await ledger.tool([file]);
  {
    await using server = await ledger.start();
    for (let i = 0; i < 60; i++)
      await server.post(event("ann", 1, { id: `${i}`, note: "n".repeat(99) }));
    await server.post(event("ben", 9, { id: "f" })); // in quarantine
    await untilBalance(server, "ann", "60");
    await until(async () => (await ledger.quarantine()).length === 1);
  }
  const folder = ledger.file("backup");
  const made = await ledger.tool(["--backup", folder]);
  expect(made, made.stderr).toMatchObject({ code: 0 });
  return { ledger, file, folder, balances: await ledger.balances() };
}

const manifestOf = (folder: string) => join(folder, "backup.json");

test("a backup that is made while events are posted and segments deleted restores all that was acknowledged before it", async () => {
  await using ledger = await openLedger({ ...SMALL, JOURNAL_KEEP_DAYS: "0" });
  await using restored = await openLedger(SMALL);
  const folder = ledger.file("backup");
  let before = 0;
  let sent = 0;
  {
    await using server = await ledger.start();
    let isDone = false;
    const sending = (async () => {
      for (; !isDone; sent += 20)
        await server.postLines(line("ann", 1, { note: "n".repeat(50) }).repeat(20));
    })();
    await until(async () => (await ledger.select("select from removed")).length > 0);
    before = sent;
    const made = await ledger.tool(["--backup", folder]);
    expect(made, made.stderr).toMatchObject({ code: 0 });
    expect(sent).toBeGreaterThan(before); // events are accepted meanwhile
    isDone = true;
    await sending;
  }
  const done = await restored.tool(["--restore", folder]);
  expect(done, done.stderr).toMatchObject({ code: 0 });
  expect(done.stdout).toContain(MATCH);
  await using server = await restored.start();
  await until(
    async () =>
      ((await (await fetch(`${server.url}/readyz?reads`)).json()) as { lagBytes: number })
        .lagBytes === 0,
  );
  const balance = Number(await server.balance("ann"));
  expect(balance).toBeGreaterThanOrEqual(before);
  expect(balance).toBeLessThanOrEqual(sent);
  expect(balance % 20).toBe(0);
  expect((await restored.tool(["--verify"])).stdout).toEndWith(MATCH);
  expect((await restored.tool(["--check"])).code).toBe(0);
});

test("the ledger of a backup is as of one moment, and never ahead of its journal", async () => {
  await using ledger = await openLedger(SMALL);
  await using server = await ledger.start();
  let isDone = false;
  const sending = (async () => {
    while (!isDone) await Promise.all([..."abcdefgh"].map((user) => server.post(event(user))));
  })();
  await until(async () => Number(await server.balance("a")) > 5);
  for (let i = 0; i < 3; i++) {
    const folder = ledger.file(`backup-${i}`);
    const made = await ledger.tool(["--backup", folder]);
    expect(made, made.stderr).toMatchObject({ code: 0 });
    await using restored = await openLedger(SMALL);
    const done = await restored.tool(["--restore", folder]);
    expect(done, done.stderr).toMatchObject({ code: 0 });
    expect(done.stdout).toContain(MATCH);
  }
  isDone = true;
  await sending;
});

test("a restored ledger has everything that the old one had, continues, and still knows ids and files", async () => {
  const { ledger: old, file, folder, balances } = await makeBackup();
  await using _ = old;
  await using ledger = await openLedger(SMALL);
  const { code, stdout, stderr } = await ledger.tool(["--restore", folder, file]);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  expect(stdout).toStartWith(`3 balances ${MATCH}`);
  expect(await ledger.balances()).toEqual(balances);
  expect(await ledger.quarantine()).toEqual(await old.quarantine());
  for (const table of TABLES) {
    const rows = `select ${table}::text as row from ${table} order by 1`;
    if (table !== "event_types") expect(await ledger.select(rows)).toEqual(await old.select(rows));
  }
  await using server = await ledger.start();
  await server.post(event("ann", 1, { id: "0", note: "n".repeat(99) })); // came before
  await server.post(event("ann", 2));
  await untilBalance(server, "ann", "62");
  expect((await ledger.tool([file])).stdout).toStartWith("posted 0 events");
  expect((await ledger.tool(["--verify", file])).stdout).toEndWith(MATCH);
});

test("segments are linked, not copied; on another file system they are copied", async () => {
  const { ledger, folder } = await makeBackup();
  await using _ = ledger;
  const [name = ""] = segmentNames(ledger.dataDir);
  const segment = statSync(join(ledger.dataDir, name));
  expect(statSync(join(folder, "journal", name)).ino).toBe(segment.ino);
  if (!existsSync("/dev/shm") || statSync("/dev/shm").dev === segment.dev)
    return console.warn("skipping a backup on another file system: /dev/shm is not one");
  const other = `/dev/shm/daybook-test-${crypto.randomUUID()}`;
  try {
    expect((await ledger.tool(["--backup", other])).code).toBe(0);
    const copy = join(other, "journal", name);
    expect(statSync(copy).dev).not.toBe(segment.dev);
    expect(readFileSync(copy)).toEqual(readFileSync(join(ledger.dataDir, name)));
    expect(readdirSync(join(other, "journal")).filter((each) => !each.endsWith(".jsonl"))).toEqual(
      [],
    );
  } finally {
    rmSync(other, { recursive: true, force: true });
  }
});

test("a backup that is killed at any moment is whole, or is refused by --restore, and is in nobody's way", async () => {
  const { ledger, file, balances } = await makeBackup();
  await using _ = ledger;
  const started = performance.now();
  await ledger.tool(["--backup", ledger.file("whole")]);
  const takesMs = performance.now() - started;
  let killed = 0;
  for (let i = 0; i < 10; i++) {
    const folder = ledger.file(`killed-${i}`);
    await using backup = ledger.process(["--backup", folder]);
    await Bun.sleep((takesMs * (i + 1)) / 10);
    backup.kill();
    await backup.exit();
    await using restored = await openLedger(SMALL);
    const { code, stderr } = await restored.tool(["--restore", folder, file]);
    if (existsSync(manifestOf(folder))) {
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
      expect(await restored.balances()).toEqual(balances);
    } else {
      killed++;
      expect({ code, stderr }).toEqual({
        code: 2,
        stderr: `${folder} has no backup.json: it is not a backup, or the backup was interrupted\n`,
      });
      expect(existsSync(restored.journal)).toBe(false);
      // Killed before anything was in it, the folder can still be used.
      if (!existsSync(folder) || readdirSync(folder).length === 0) continue;
      const again = await ledger.tool(["--backup", folder]);
      expect([again.code, again.stderr]).toEqual([2, expect.stringContaining("is not empty")]);
    }
  }
  expect(killed).toBeGreaterThan(0);
  expect((await ledger.tool(["--backup", ledger.file("whole")])).stderr).toContain(
    "holds a backup",
  );
  // The lock of a dead backup is free: segments are deleted again.
  await using server = await ledger.start({ JOURNAL_KEEP_DAYS: "0" });
  await until(() => segmentNames(ledger.dataDir).length === 0);
  expect(await server.balance("ann")).toBe("60");
});

test("a restore that is killed at any moment is begun again, and gives the same", async () => {
  const { ledger: old, file, folder, balances } = await makeBackup();
  await using _ = old;
  const restore = ["--restore", folder, file];
  const started = performance.now();
  {
    await using first = await openLedger(SMALL);
    await first.tool(restore);
  }
  const takesMs = performance.now() - started;
  await using ledger = await openLedger(SMALL);
  for (let i = 0; i < 10; i++) {
    await using killed = ledger.process(restore);
    await Bun.sleep((takesMs * (i + 2)) / 12);
    killed.kill();
    await killed.exit();
    const found = await ledger.balances().catch(() => ({}));
    // All of the ledger, or nothing of it.
    if (Object.keys(found).length > 0) break;
  }
  if (Object.keys(await ledger.balances().catch(() => ({}))).length === 0)
    expect(await ledger.tool(restore)).toMatchObject({ code: 0, stderr: "" });
  expect(await ledger.balances()).toEqual(balances);
  expect(await readLines(ledger.journal)).toEqual(
    await readLines(join(folder, "journal/eventsPost.jsonl")),
  );
  expect((await ledger.tool(["--verify", file])).stdout).toEndWith(MATCH);
});

test("a journal of which a restore has placed only the newest files is completed by the next one", async () => {
  const { ledger: old, file, folder } = await makeBackup();
  await using _ = old;
  await using ledger = await openLedger(SMALL);
  cpSync(join(folder, "journal"), ledger.dataDir, { recursive: true });
  for (const name of segmentNames(ledger.dataDir).slice(0, 2)) rmSync(join(ledger.dataDir, name));
  expect((await ledger.tool(["--restore", folder, file])).stdout).toContain(MATCH);
  expect(segmentNames(ledger.dataDir)).toEqual(segmentNames(join(folder, "journal")));
});

test("an empty ledger is restored beside a journal that has grown since, and posting catches up", async () => {
  const { ledger, file, folder } = await makeBackup();
  await using _ = ledger;
  {
    await using server = await ledger.start();
    for (let i = 0; i < 60; i++) await server.post(event("ann", 1, { note: "n".repeat(99) }));
    await untilBalance(server, "ann", "120");
  }
  await using lost = await openLedger(SMALL);
  const env = { DATA_DIR: ledger.dataDir };
  const { code, stderr } = await lost.tool(["--restore", folder, file], env);
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  await using server = await lost.start(env);
  await untilBalance(server, "ann", "120");
  expect((await lost.tool(["--verify", file], env)).stdout).toEndWith(MATCH);
});

test("a ledger that is not empty, which may be ahead of the backup, is refused by name", async () => {
  const { ledger, file, folder, balances } = await makeBackup();
  await using _ = ledger;
  const { code, stdout, stderr } = await ledger.tool(["--restore", folder, file]);
  expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
  expect(stderr).toStartWith("the ledger is not empty, and may be ahead of this backup");
  expect(stderr).toMatch(/^ {2}journal:\S+, posted up to \d+$/m);
  expect(stderr).toContain("  file:posted.jsonl#1, posted up to");
  expect(await ledger.balances()).toEqual(balances);
  // Nothing is put into a DATA_DIR either.
  using empty = tempDir();
  expect((await ledger.tool(["--restore", folder], { DATA_DIR: empty.path })).code).toBe(2);
  expect(existsSync(empty.file("eventsPost.jsonl"))).toBe(false);
});

test("another journal, one that is behind the backup, and a running server are in the way, and are left as they are", async () => {
  const { ledger: old, folder } = await makeBackup();
  await using _ = old;
  const refusal = async (ledger: Ledger) => {
    const { code, stderr } = await ledger.tool(["--restore", folder]);
    expect([code, await ledger.balances()]).toEqual([2, {}]);
    return stderr;
  };
  await using running = await openLedger();
  {
    await using server = await running.start({}, ["--no-processor"]);
    expect(await refusal(running)).toContain("is in use by another process: stop it first");
    await server.post(event("ann"));
  }
  const before = readFileSync(running.journal);
  expect(await refusal(running)).toMatch(/is there, and is journal \S+, not \S+ of the backup/);
  expect(readFileSync(running.journal)).toEqual(before);

  await using behind = await openLedger();
  cpSync(join(folder, "journal"), behind.dataDir, { recursive: true });
  const last = segmentNames(behind.dataDir).at(-1) as string;
  rmSync(behind.journal);
  cpSync(join(behind.dataDir, last), behind.journal);
  rmSync(join(behind.dataDir, last));
  expect(await refusal(behind)).toContain("behind the backup");
});

test("files that are not given are named, do not fail the restore, and are retired only with --yes", async () => {
  const { ledger: old, file, folder, balances } = await makeBackup();
  await using _ = old;
  const restore = async (...args: string[]) => {
    const ledger = await openLedger(SMALL);
    return { ledger, ...(await ledger.tool(["--restore", folder, ...args])) };
  };
  const without = await restore();
  await using __ = without.ledger;
  expect(without.code).toBe(0);
  expect(without.stdout).toContain("file:posted.jsonl#1: added 7.5 to 2 balances\n");
  expect(without.stdout).not.toContain("retired");
  expect(without.stderr).toContain("missing: the first");
  expect(await without.ledger.balances()).toEqual(balances);
  expect((await without.ledger.tool(["--verify"])).code).toBe(2);
  expect((await without.ledger.tool(["--verify", file])).stdout).toEndWith(MATCH);

  const retired = await restore("--yes");
  await using ___ = retired.ledger;
  expect(retired.code).toBe(0);
  expect(retired.stdout).toContain("retired: file:posted.jsonl#1\n");
  expect(await retired.ledger.balances()).toEqual(balances);
  expect((await retired.ledger.tool(["--verify"])).stdout).toEndWith(MATCH);
});

test("a damaged backup is refused, by the name of the file, and restores nothing to the ledger", async () => {
  const { ledger: old, folder } = await makeBackup();
  await using _ = old;
  await using ledger = await openLedger();
  const [segment = ""] = segmentNames(join(folder, "journal"));
  const damage = async (path: string, at: number) => {
    const copy = ledger.file("damaged");
    rmSync(copy, { recursive: true, force: true });
    cpSync(folder, copy, { recursive: true });
    const bytes = readFileSync(join(copy, path));
    bytes[at]! ^= 1;
    rmSync(join(copy, path));
    appendFileSync(join(copy, path), bytes);
    const { code, stderr } = await ledger.tool(["--restore", copy]);
    expect([code, stderr]).toEqual([3, expect.stringContaining(`${join(copy, path)} is damaged`)]);
    expect(await ledger.balances()).toEqual({});
  };
  await damage("ledger/users_revenue", 4);
  await damage(`journal/${segment}`, 200);
  rmSync(join(ledger.file("damaged"), "journal", segment));
  expect((await ledger.tool(["--restore", ledger.file("damaged")])).stderr).toContain(
    "has 0 bytes",
  );
});

test.if(isInstalled("prlimit"))(
  "a backup that finds no room says so and ends, also in the midst of a large table; with room the next one is whole",
  async () => {
    await using ledger = await openLedger();
    await ledger.tool(["--verify"]);
    await ledger.select(
      "insert into users_revenue select 'user-' || i, 0.5 from generate_series(1, 200000) as i",
    );
    const folder = ledger.file("full");
    const script = `prlimit --pid $$ --fsize=1000000; exec ${process.execPath} run ${root}/processor.ts --backup ${folder}`;
    const child = Bun.spawn(["bash", "-c", script], {
      env: { ...process.env, ...ledger.env },
      stdio: ["ignore", "pipe", "pipe"],
    });
    expect([await new Response(child.stderr).text(), await child.exited]).toEqual([
      expect.stringMatching(/EFBIG/),
      3,
    ]);
    expect(existsSync(manifestOf(folder))).toBe(false);
    const made = await ledger.tool(["--backup", ledger.file("whole")]);
    expect(made, made.stderr).toMatchObject({ code: 0 });
    const lines = readFileSync(join(ledger.file("whole"), "ledger/users_revenue"), "utf8");
    expect(lines.match(/\n/g)).toHaveLength(200_000);
  },
);

test("a journal that lacks what the ledger needs is not backed up as if it were whole", async () => {
  const { ledger } = await makeBackup();
  await using _ = ledger;
  const [first = ""] = segmentNames(ledger.dataDir);
  rmSync(join(ledger.dataDir, first));
  const early = await ledger.tool(["--backup", ledger.file("early")]);
  expect([early.code, early.stderr]).toEqual([
    2,
    expect.stringContaining("restore its older segments"),
  ]);
  await ledger.select("update checkpoints set position = 99999 where source like 'journal:%'");
  const behind = await ledger.tool(["--backup", ledger.file("behind")]);
  expect([behind.code, behind.stderr]).toEqual([
    3,
    expect.stringContaining("is behind the ledger"),
  ]);
  for (const name of ["early", "behind"])
    expect(existsSync(manifestOf(ledger.file(name)))).toBe(false);
});

test("an embedded Postgres is backed up while it runs, and restored into an empty DATA_DIR", async () => {
  using dir = tempDir();
  {
    await using server = await startApp({ dataDir: dir.file("old") });
    await server.post(event("ann", 5));
    await untilBalance(server, "ann", "5");
    const made = await run("processor.ts", {
      args: ["--backup", dir.file("backup")],
      env: { DATA_DIR: dir.file("old") },
    });
    expect(made, made.stderr).toMatchObject({ code: 0 });
  }
  const env = { DATA_DIR: dir.file("new") };
  const done = await run("processor.ts", { args: ["--restore", dir.file("backup")], env });
  expect(done, done.stderr).toMatchObject({ code: 0 });
  await using server = await startApp({ dataDir: dir.file("new") });
  expect(await server.balance("ann")).toBe("5");
  await server.post(event("ann", 1));
  await untilBalance(server, "ann", "6");
});

test("every table of the ledger is in a backup, and its columns", async () => {
  await using ledger = await openLedger();
  await ledger.tool(["--verify"]);
  const rows = await ledger.select<{ name: string }>(
    "select relname as name from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'",
  );
  expect(rows.map(({ name }) => name).toSorted()).toEqual([...TABLES, "ledger_version"].toSorted());
});

test("further columns and partitions of users_revenue are backed up; the table is created before a restore", async () => {
  await using ledger = await openLedger();
  await using restored = await openLedger();
  for (const { url } of [ledger, restored]) {
    await using sql = connectTest(url);
    await sql.unsafe(`
      create table users_revenue (user_id text primary key, revenue numeric not null, note text)
        partition by hash (user_id);
      create table part_0 partition of users_revenue for values with (modulus 2, remainder 0);
      create table part_1 partition of users_revenue for values with (modulus 2, remainder 1)`);
  }
  await ledger.tool([ledger.write("a.jsonl", line("ann", 1) + line("ben", 2))]);
  await ledger.select("update users_revenue set note = 'of ' || user_id");
  const folder = ledger.file("backup");
  expect((await ledger.tool(["--backup", folder])).code).toBe(0);
  const done = await restored.tool(["--restore", folder, ledger.file("a.jsonl")]);
  expect(done, done.stderr).toMatchObject({ code: 0 });
  const rows = "select * from users_revenue order by user_id";
  expect(await restored.select(rows)).toEqual(await ledger.select(rows));
});

test("--backup and --restore name what they need, and what they do not read", async () => {
  await using ledger = await openLedger();
  const refusal = async (args: string[], env = {}) => {
    const { code, stderr } = await ledger.tool(args, env);
    expect(code).toBe(2);
    return stderr;
  };
  expect(await refusal(["--backup"])).toContain("--backup");
  expect(await refusal(["--backup="])).toContain("--backup requires a folder");
  expect(await refusal(["--backup", "a", "--restore", "b"])).toContain("use only one of");
  expect(await refusal(["--backup", "a", "--yes"])).toContain("--yes requires");
  expect(await refusal(["--restore", root])).toContain("has no backup.json");
  for (const name of ["--backup", "--restore"])
    expect(await refusal([name, "a"], { JOURNAL_URL: "nats://127.0.0.1:1/daybook" })).toContain(
      "a stream has its own backup",
    );
  const newer = ledger.write("newer/backup.json", '{"format":2,"ledger":9,"daybook":"7.0.0"}');
  expect(await refusal(["--restore", join(newer, "..")])).toContain("was made by Daybook 7.0.0");
});
