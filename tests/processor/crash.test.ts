/**
 * A process that is killed at any moment loses no acknowledged event and counts none twice. Real processes
 * are killed. Each event has a user of its own: if the event was lost, its user is missing; if it counted
 * twice, the balance is twice the value.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, appendFileSync, readFileSync, writeFileSync } from "node:fs";

import { parseJournalHeader } from "../../lib/journal/format.ts";
import { count } from "../faults/figures.ts";
import { line } from "../support/events.ts";
import { frame } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import {
  messages,
  root,
  run,
  startApp,
  tempDir,
  until,
  untilBalance,
} from "../support/programs.ts";
import { IS_LONG, longTest, seeded } from "../support/random.ts";

const KILLS = IS_LONG ? 5 : 2;
/** More batches than one processor posts before it is killed. */
const PARTS = IS_LONG ? 16 : 6;
const CUTS = 40;
const NO_PROCESSOR = ["--no-processor"];
setDefaultTimeout(120_000);

test(
  "a server that is killed under load loses no acknowledged event and counts none twice",
  seeded(async (random) => {
    await using ledger = await openWatched();
    const load = openLoad(random);
    for (let round = 0; round < KILLS; round++) {
      await using app = await ledger.start();
      const sending = load.start(app);
      await sending.underWay();
      await Bun.sleep(random() * 300);
      app.kill("SIGKILL");
      count("kills");
      await sending.end;
    }
    await ledger.postRest();
    expect(await faults(ledger, load)).toEqual(NONE);
  }),
);

test(
  "a processor that is killed while it posts a file resumes at the checkpoint",
  seeded(async (random) => {
    await using ledger = await openWatched();
    const parts = Array.from({ length: PARTS }, (_, part) => manyLines(part));
    const file = ledger.write("a.jsonl", parts.join(""));
    for (let kill = 0; kill < KILLS; kill++) {
      await using processor = ledger.process([file]);
      const from = await ledger.position();
      await until(async () => (await ledger.position()) > from || processor.child.exitCode);
      await Bun.sleep(random() * 80);
      processor.kill("SIGKILL");
      count("kills");
    }
    expect((await ledger.tool([file])).stderr).toBe("");
    const all = Object.entries(await ledger.balances());
    expect(all.filter(([user, sum]) => sum !== user.slice(4))).toEqual([]);
    expect(all).toHaveLength(PARTS * 4_000);
    expect(await ledger.countQuarantined()).toBe(PARTS * 1_000);
  }),
);

// In the normal run tests/faults/process.test.ts kills it at named points between two batches.
longTest(
  "a processor that is killed while it follows a journal resumes at the checkpoint",
  seeded(async (random) => {
    await using ledger = await openWatched();
    const load = openLoad(random);
    await using app = await ledger.start({}, NO_PROCESSOR);
    const sending = load.start(app);
    for (let kill = 0; kill < KILLS; kill++) {
      await using processor = ledger.process();
      const from = await ledger.position();
      await until(async () => (await ledger.position()) > from);
      await Bun.sleep(random() * 100);
      processor.kill("SIGKILL");
      count("kills");
    }
    await sending.stop();
    await ledger.postRest();
    expect(await faults(ledger, load)).toEqual(NONE);
  }),
);

// In the normal run tests/faults/postgres.test.ts terminates backends at random, and cuts at each packet.
longTest(
  `a server whose connections Postgres terminates ${CUTS} times keeps posting, and counts every event once`,
  seeded(async (random) => {
    await using ledger = await openWatched();
    await using app = await ledger.start();
    const load = openLoad(random);
    const sending = load.start(app);
    const reading = readOften(app.url, random);
    for (let cuts = 0; cuts < CUTS;) {
      const from = await ledger.position();
      for (let burst = Math.ceil(random() * 4); burst > 0; burst--) {
        cuts += await ledger.cutConnections();
        await Bun.sleep(random() * 60);
      }
      await until(async () => (await ledger.position()) > from, 30_000);
    }
    await sending.stop();
    const statuses = await reading.stop();
    expect(app.child.exitCode).toBeNull();
    expect([...statuses].filter((status) => ![200, 404, 503].includes(status))).toEqual([]);
    app.kill("SIGTERM");
    expect(await app.exit()).toBe(0);
    await ledger.postRest();
    expect(await faults(ledger, load)).toEqual(NONE);
  }),
);

test("events are accepted while the database is unavailable, and the ledger catches up by itself", async () => {
  await using ledger = await openWatched();
  await using proxy = await openProxy(ledger.url);
  await using app = await ledger.start({ DATABASE_URL: proxy.url });
  await app.post(line("ann", 1));
  await untilBalance(app, "ann", "1");

  proxy.cut();
  for (let i = 0; i < 20; i++) expect((await app.post(line("ann", 1))).status).toBe(201);
  const unavailable = await fetch(`${app.url}/userEvents/ann`);
  expect(unavailable.status).toBe(503);
  expect(Number(unavailable.headers.get("retry-after"))).toBeGreaterThan(0);
  expect((await fetch(`${app.url}/readyz?reads`)).status).toBe(503);
  expect((await fetch(`${app.url}/healthz`)).status).toBe(200);
  await until(() => proxy.refused() >= 5);

  proxy.mend();
  await untilBalance(app, "ann", "21");
  expect((await fetch(`${app.url}/readyz?reads`)).status).toBe(200);
});

test("a start truncates a torn last frame and reports it, and the journal continues", async () => {
  await using ledger = await openWatched();
  const whole = frame(line("torn", 1));
  const wrong = Buffer.from(whole);
  wrong[wrong.length - 5]! ^= 1;
  await withApp(ledger, (app) => app.post(line("ann", 1)));
  for (const tail of [whole.subarray(0, 30), whole.subarray(0, whole.length - 1), wrong]) {
    appendFileSync(ledger.journal, tail);
    const said = await withApp(ledger, (app) => app.post(line("ann", 1)));
    expect(messages(said)[1]).toBe(
      `info: ${ledger.journal}: cut off ${tail.length} bytes of a frame that was never acknowledged`,
    );
  }
  await ledger.postRest();
  expect(await ledger.balances()).toEqual({ ann: "4" });
});

test("a server whose journal has a flipped byte before the last frame refuses to start, naming file and byte", async () => {
  await using ledger = await openWatched();
  await withApp(ledger, async (app) => {
    for (const user of ["ann", "ben", "cid"]) await app.post(line(user, 1));
  });
  const bytes = readFileSync(ledger.journal);
  const at = parseJournalHeader(bytes)!.bytes;
  for (const flipped of [at + 3, bytes.indexOf('"ann"') + 1]) {
    const damaged = Buffer.from(bytes);
    damaged[flipped]! ^= 1;
    writeFileSync(ledger.journal, damaged);
    const { code, stdout, stderr } = await run("app.ts", { env: ledger.env });
    expect({ code, stdout }).toEqual({ code: 1, stdout: "" });
    expect(stderr).toMatch(/^.* is damaged at byte \d+: .*\n$/);
    expect(stderr).toStartWith(`${ledger.journal} is damaged at byte ${at}: `);
  }
  writeFileSync(ledger.journal, bytes);
  await withApp(ledger, async (app) => expect((await app.post(line("dan", 1))).status).toBe(201));
});

// As in tests/server/http.test.ts, but down to the ledger.
longTest(
  "after SIGTERM under load every accepted event is on disk, the exit code is 0, and no connection stays open",
  seeded(async (random) => {
    await using ledger = await openWatched();
    await using app = await ledger.start();
    const load = openLoad(random);
    const sending = load.start(app);
    await sending.underWay();
    app.kill("SIGTERM");
    expect(await app.exit()).toBe(0);
    await sending.end;
    await until(async () => (await ledger.connections()) === 0, 2_000);
    await ledger.postRest();
    expect(await faults(ledger, load)).toEqual(NONE);
  }),
);

test("SIGTERM stops the embedded Postgres, a start after kill -9 resumes, and processor.ts starts and stops it by itself", async () => {
  using folder = tempDir();
  const dataDir = folder.file("data");
  /** Postgres removes this file when it stops. */
  const isRunning = () => existsSync(`${dataDir}/postgres/cluster/postmaster.pid`);
  // A path as the default ./data is: relative.
  const relative = { dataDir: "data", cwd: folder.path };
  await using killed = await startApp(relative);
  expect((await killed.post(line("ann", 1))).status).toBe(201);
  killed.kill("SIGKILL");
  await killed.exit();

  await using app = await startApp(relative);
  await untilBalance(app, "ann", "1");
  expect(isRunning()).toBe(true);
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  expect(isRunning()).toBe(false);

  const file = folder.file("a.jsonl");
  writeFileSync(file, line("ben", 2));
  for (const [args, said] of [
    [[file], "posted 1 event ("],
    [["--verify", file], "2 balances match their sources"],
  ] as const) {
    const { code, stdout } = await run("processor.ts", {
      args: [...args],
      env: { DATA_DIR: dataDir },
    });
    expect({ code, stdout }).toEqual({ code: 0, stdout: expect.stringContaining(said) });
    expect(isRunning()).toBe(false);
  }
});

const NONE = { lost: [], wrong: [], unlikeJournal: [], unlikePoints: [] };

/**
 * Acknowledged events that are missing; balances that are not the value of the one event that was
 * sent for the user; users whose balance is not what the journal says; and the sums of balances and of
 * points of revenue over time, where they differ.
 */
async function faults(ledger: Ledger, { sent, acknowledged }: Load) {
  const found = await ledger.balances();
  const journal = journalEvents(ledger.journal);
  const users = new Set([...Object.keys(found), ...journal.keys()]);
  const unlikePoints = await ledger.select(`
    select * from (select sum(revenue) as balances from users_revenue) as ledger,
      (select sum(amount) as points from points) as chart
    where balances is distinct from points`);
  return {
    unlikePoints: [...unlikePoints],
    lost: [...acknowledged].filter((user) => !(user in found)),
    wrong: Object.entries(found).filter(([user, revenue]) => revenue !== `${sent.get(user)}`),
    unlikeJournal: [...users].filter((user) => found[user] !== `${journal.get(user)}`),
  };
}

/** The sums of the journal, read as plain text. */
function journalEvents(path: string): Map<string, number> {
  const sums = new Map<string, number>();
  for (const line of readFileSync(path, "utf8").split("\n")) {
    if (line === "" || /^\{"(journal|frame)":/.test(line)) continue;
    const { userId, value } = JSON.parse(line) as { userId: string; value: number };
    sums.set(userId, (sums.get(userId) ?? 0) + value);
  }
  return sums;
}

type App = Awaited<ReturnType<typeof startApp>>;
type Load = ReturnType<typeof openLoad>;
type Ledger = Awaited<ReturnType<typeof openWatched>>;

/** Events that are sent, each with a user of its own, and which of them were acknowledged. */
function openLoad(random: () => number) {
  const sent = new Map<string, number>();
  const acknowledged = new Set<string>();

  function invent(): { userId: string; line: string } {
    const userId = `user${sent.size}`;
    const value = 1 + Math.floor(random() * 1e6);
    sent.set(userId, value);
    return { userId, line: line(userId, value) };
  }

  /** One event, or many in one body. */
  async function send(app: App): Promise<void> {
    const many = Math.floor(random() * 40);
    const events = Array.from({ length: random() < 0.5 ? 1 : many + 2 }, invent);
    const text = events.map(({ line }) => line).join("");
    const response = await (events.length === 1 ? app.post(text) : app.postLines(text));
    await response.body?.cancel();
    if (response.status !== 201) throw new Error(`a POST was answered ${response.status}`);
    for (const { userId } of events) acknowledged.add(userId);
  }

  return {
    sent,
    acknowledged,
    /** Starts eight senders, which send until they are stopped or the server ends. */
    start(app: App) {
      const before = acknowledged.size;
      let stopped = false;
      const sender = async () => {
        while (!stopped && app.child.exitCode === null && app.child.signalCode === null) {
          await send(app).catch((error) => {
            if ((error as Error).message.startsWith("a POST")) throw error;
          });
          await Bun.sleep(random() * 10); // else the test measures the cores
        }
      };
      const end = Promise.all(Array.from({ length: 8 }, sender)).then(() => {});
      end.catch(() => {}); // its caller awaits it
      const stop = () => ((stopped = true), end);
      return { end, stop, underWay: () => until(() => acknowledged.size > before + 20) };
    },
  };
}

/** Reads balances until it is stopped. Each request may take 10 s. */
function readOften(url: string, random: () => number) {
  const statuses = new Set<number>();
  let stopped = false;
  const reader = async () => {
    while (!stopped) {
      const path = `${url}/userEvents/user${Math.floor(random() * 2_000)}`;
      const answer = await fetch(path, { signal: AbortSignal.timeout(10_000) });
      await answer.text();
      statuses.add(answer.status);
      await Bun.sleep(5);
    }
  };
  const end = Promise.all([reader(), reader(), reader()]);
  end.catch(() => {});
  return { stop: async () => ((stopped = true), await end, statuses) };
}

/** A part of about 1 MiB, which is one batch: 4,000 users, each worth its number, and bad lines. */
function manyLines(part: number): string {
  const note = "n".repeat(180);
  const good = Array.from({ length: 4_000 }, (_, i) => {
    const number = part * 4_000 + i + 1;
    return line(`user${number}`, number, { note });
  });
  return `${good.join("")}${"bad\n".repeat(1_000)}`;
}

/** Runs the server for `use`, stops it, and returns its stderr. */
async function withApp(ledger: Ledger, use: (app: App) => Promise<unknown>): Promise<string> {
  await using app = await ledger.start({}, NO_PROCESSOR);
  await use(app);
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  return app.stderr.text();
}

/** A ledger with its tables, and questions to its database. */
async function openWatched() {
  const ledger = await openLedger();
  await ledger.select(await Bun.file(`${root}/schema.sql`).text());
  const count = async (query: string) =>
    Number((await ledger.select<{ count: string | null }>(query))[0]?.count ?? 0);
  const ours = "datname = current_database() and application_name like 'daybook%'";
  return {
    ...ledger,
    /** How far the only journal or file has been posted. */
    position: () => count("select max(position) as count from checkpoints"),
    connections: () => count(`select count(*) from pg_stat_activity where ${ours}`),
    cutConnections: () =>
      count(`select count(pg_terminate_backend(pid)) from pg_stat_activity where ${ours}`),
    /** Posts the rest of the journal. */
    async postRest() {
      const { code, stderr } = await ledger.tool([ledger.journal]);
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    },
  };
}
