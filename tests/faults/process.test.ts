/**
 * Processes that are killed or stopped, at named points and at random ones. Each event carries an id and
 * is sent until it is answered. The test adds up the expected balances in cents.
 *
 * FAULT_ROUNDS=N repeats it with other choices.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { rejectedFaults, writeEvents } from "../support/events.ts";
import { balances, select, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { FAULT_ROUNDS as ROUNDS, IS_LONG, longTest, seeded } from "../support/random.ts";
import { type Alteration, alteredCopy } from "./altered.ts";
import { count } from "./figures.ts";

setDefaultTimeout(120_000 * ROUNDS);

/** Kills its own process when it runs for the FAULT_PASS-th time. */
const DIE =
  'if ((globalThis.passes = (globalThis.passes ?? 0) + 1) == process.env.FAULT_PASS) process.kill(process.pid, "SIGKILL");';

const inJournal = (find: string, put: string) => ({ file: "lib/journal/writer.ts", find, put });
const inLedger = (find: string, put: string) => ({ file: "lib/ledger/ledger.ts", find, put });
const inPosting = (find: string, put: string) => ({ file: "lib/processor/posting.ts", find, put });

const POINTS: Record<string, Alteration> = {
  "after the write": inJournal("await write(frame);", `await write(frame); ${DIE}`),
  "after the sync": inJournal("await sync();", `await sync(); ${DIE}`),
  "before the answer": inJournal(
    "for (const { resolve } of group) resolve(header.base + end);",
    `${DIE} for (const { resolve } of group) resolve(header.base + end);`,
  ),
  "in a rotation, before the full file is renamed": inJournal(
    "await disk.rename(path, segmentPath(path, header.base))",
    `${DIE} await disk.rename(path, segmentPath(path, header.base))`,
  ),
  "in a rotation, while the journal has no active file": inJournal(
    "await disk.rename(nextPath, path);",
    `${DIE} await disk.rename(nextPath, path);`,
  ),
  "in a rotation, before the next file is written to": inJournal(
    "header = begun;",
    `${DIE} header = begun;`,
  ),
  "after the statement is sent": inLedger(
    "const { late, disputed, repeated } = await move(tx, batch, { hasOldIds, withLines });",
    `const moving = move(tx, batch, { hasOldIds, withLines }); setTimeout(() => { ${DIE} }, 1); const { late, disputed, repeated } = await moving;`,
  ),
  "after the statement, before COMMIT": inLedger(
    'return { state: "posted", events:',
    `${DIE} return { state: "posted", events:`,
  ),
  "before a segment is deleted whose snapshot is stored": {
    file: "lib/processor/retention.ts",
    find: "await disk.remove(segment.path);",
    put: `${DIE} await disk.remove(segment.path);`,
  },
  "after COMMIT": inPosting('if (outcome.state === "posted") {', `${DIE} if (true) {`),
};

test(
  "every event counts once if the server is killed at each of these points",
  seeded(async (random) => {
    for (let round = 0; round < ROUNDS; round++) await killAtEachPoint(random);
  }),
);

// In the normal run the server is stopped at random times (below), and killed at each point (above).
longTest(
  "every event counts once if the server is stopped for a while at each of these points",
  seeded(async (random) => {
    const stop = 'if (Math.random() < 0.02) process.kill(process.pid, "SIGSTOP");';
    const points = Object.values(POINTS).map((point) => ({
      ...point,
      put: point.put.replace(DIE, stop),
    }));
    await using database = await testDatabase();
    using dir = tempDir();
    using copy = alteredCopy(points);
    const app = { home: copy.path, dataDir: dir.file("data"), databaseUrl: database.url };
    const env = { JOURNAL_SEGMENT_BYTES: "1500", JOURNAL_KEEP_DAYS: "0" };
    await using server = await startApp({ ...app, env });
    const isStopped = () => /\) T /.test(readFileSync(`/proc/${server.pid}/stat`, "utf8"));
    let stops = 0;
    let done = false;
    const resuming = (async () => {
      for (; !done; await Bun.sleep(20)) {
        if (!isStopped()) continue;
        stops++;
        count("stops");
        await Bun.sleep(random() * 300);
        server.kill("SIGCONT");
      }
    })();
    const sender = openSender(random);
    try {
      await until(async () => (await sender.send(server), stops >= 10 * ROUNDS), 60_000 * ROUNDS);
      await until(() => sender.isPosted(database.url), 60_000).catch(() => {});
    } finally {
      done = true;
      await resuming;
      server.kill("SIGCONT");
    }
    expect(await exactBalances(database.url), server.stderr.text()).toEqual(sender.balances());
  }),
);

test(
  "every event counts once if processors are killed after the statement, before COMMIT and after it, while the server accepts events",
  seeded(async (random) => {
    for (let round = 0; round < ROUNDS; round++) await killProcessors(random);
  }),
);

/** All balances, of which the sum is that of the points of revenue over time. */
async function exactBalances(url: string) {
  const differing = await select(
    url,
    `select * from (select sum(revenue) as balances from users_revenue) as ledger,
       (select sum(amount) as points from points) as chart
     where balances is distinct from points`,
  );
  expect(differing).toEqual([]);
  return balances(url);
}

/** Kills a processor at each point between a batch and its report, while one server accepts events. */
async function killProcessors(random: () => number) {
  await using database = await testDatabase();
  using dir = tempDir();
  const env = { DATA_DIR: dir.path, DATABASE_URL: database.url, JOURNAL_KEEP_DAYS: "0" };
  const app = { dataDir: dir.path, databaseUrl: database.url, args: ["--no-processor"] };
  await using server = await startApp({ ...app, env: { JOURNAL_SEGMENT_BYTES: "1500" } });
  const sender = openSender(random);
  const points = Object.entries(POINTS).filter(([, { file }]) => /ledger|posting/.test(file ?? ""));
  expect(points).toHaveLength(3);
  for (const [, point] of points) {
    using copy = alteredCopy([point]);
    const FAULT_PASS = `${1 + Math.floor(random() * 3)}`;
    await using processor = spawn("processor.ts", { home: copy.path, env: { ...env, FAULT_PASS } });
    while (processor.child.exitCode === null && processor.child.signalCode === null) {
      expect(await sender.send(server)).toBe(true);
      await Bun.sleep(random() * 20);
    }
    expect(processor.child.signalCode, processor.stderr.text()).toBe("SIGKILL");
    count("kills");
  }
  await using processor = spawn("processor.ts", { env });
  await until(() => sender.isPosted(database.url), 60_000).catch(() => {});
  expect(await exactBalances(database.url), processor.stderr.text()).toEqual(sender.balances());
}

test(
  "every event counts once if the Worker throws outside every promise or ends silently, and is restarted",
  seeded(async (random) => {
    await using database = await testDatabase();
    using dir = tempDir();
    const { file, find, put } = POINTS["after COMMIT"] as Alteration;
    const end = `if ((globalThis.passes = (globalThis.passes ?? 0) + 1) == 3) {
      if (Math.random() < 0.5) process.exit(0);
      setTimeout(() => { throw new Error("thrown by the test"); });
    }`;
    using copy = alteredCopy([{ file, find, put: put.replace(DIE, end) }]);
    const app = { home: copy.path, dataDir: dir.path, databaseUrl: database.url };
    await using server = await startApp(app);
    const sender = openSender(random);
    const deaths = () => server.stderr.text().split("restarting it").length - 1;
    const threw = () =>
      server.stderr.text().split('"processor: error: thrown by the test"').length - 1;
    await until(async () => {
      expect(await sender.send(server)).toBe(true);
      await Bun.sleep(random() * 20);
      return threw() > 0 && deaths() > threw();
    }, 60_000);
    await until(() => sender.isPosted(database.url), 60_000).catch(() => {});
    expect(await exactBalances(database.url), server.stderr.text()).toEqual(sender.balances());
    count("kills", deaths());
  }),
);

const CLIENT_POINTS: Record<string, Alteration> = {
  "before a chunk is sent": {
    find: "const answer = await api.send(source, piece, canShrink);",
    put: `${DIE} const answer = await api.send(source, piece, canShrink);`,
  },
  "before the rejected lines are written": {
    find: "rejected.add(piece, answer.errors);",
    put: `${DIE} rejected.add(piece, answer.errors);`,
  },
  "half-way through writing them": {
    find: "if (text && isKept) appendFileSync(path, text);",
    put: `if (text && isKept) { appendFileSync(path, text.slice(0, text.length / 2)); ${DIE} appendFileSync(path, text.slice(text.length / 2)); }`,
  },
};

test(
  "every event counts once and every bad line is reported once if the client is killed at each of these points",
  seeded(async (random) => {
    for (let round = 0; round < ROUNDS; round++) await killClients(random);
  }),
);

async function killClients(random: () => number) {
  await using database = await testDatabase();
  using dir = tempDir();
  const file = dir.file("a.jsonl");
  const { bad, balances: wanted } = writeEvents(file, 12_000, random);
  await using server = await startApp({ dataDir: dir.file("data"), databaseUrl: database.url });
  const env = { SERVER_URL: server.url };
  for (const [name, point] of Object.entries(CLIENT_POINTS)) {
    using copy = alteredCopy([point]);
    const FAULT_PASS = `${1 + Math.floor(random() * 2)}`;
    await using client = spawn("client.ts", {
      ...{ home: copy.path, args: [file], env: { ...env, FAULT_PASS } },
    });
    await client.exit();
    expect(client.child.signalCode, `${name}: ${client.stderr.text()}`).toBe("SIGKILL");
    count("kills");
  }
  const last = await run("client.ts", { args: [file, "--wait"], env });
  expect(last.stderr + last.stdout).toContain("all of it is in the ledger");
  expect(await exactBalances(database.url)).toEqual(wanted);
  expect(rejectedFaults(file, bad)).toEqual([]);
}

/** Kills a server at each of the points, in random order, then runs it until everything is posted. */
async function killAtEachPoint(random: () => number) {
  await using database = await testDatabase();
  using dir = tempDir();
  const app = { dataDir: dir.file("data"), databaseUrl: database.url };
  const rotating = { JOURNAL_SEGMENT_BYTES: "1500", JOURNAL_KEEP_DAYS: "0" };
  const sender = openSender(random);
  for (const [name, point] of Object.entries(POINTS).toSorted(() => random() - 0.5)) {
    using copy = alteredCopy([point]);
    const env = { ...rotating, FAULT_PASS: `${1 + Math.floor(random() * 4)}` };
    await using server = await startApp({ ...app, home: copy.path, env });
    await sender.sendUntilGone(server);
    expect(server.child.signalCode, `${name}: ${server.stderr.text()}`).toBe("SIGKILL");
    count("kills");
  }
  await using server = await startApp({ ...app, env: { JOURNAL_SEGMENT_BYTES: "1500" } });
  await sender.sendRest(server);
  await until(() => sender.isPosted(database.url), 30_000).catch(() => {});
  expect(await exactBalances(database.url)).toEqual(sender.balances());
  const tool = { env: { DATA_DIR: app.dataDir, DATABASE_URL: database.url } };
  const verified = await run("processor.ts", { ...tool, args: ["--verify"] });
  expect(verified.stdout, verified.stderr).toEndWith("balances match their sources\n");
}

test(
  "every event counts once if server, processor and client are killed or stopped at random times",
  seeded(async (random) => {
    for (let round = 0; round < ROUNDS; round++) await killAnywhere(random);
  }),
);

async function killAnywhere(random: () => number) {
  await using database = await testDatabase();
  using dir = tempDir();
  const dataDir = dir.file("data");
  const file = dir.file("a.jsonl");
  const { bad, balances: wanted } = writeEvents(file, IS_LONG ? 10_000 : 5_000, random);
  const app = { dataDir, databaseUrl: database.url, args: ["--no-processor"] };
  const env = { DATA_DIR: dataDir, DATABASE_URL: database.url };
  let server = await startApp({ ...app, env: { JOURNAL_SEGMENT_BYTES: "300000" } });
  const port = new URL(server.url).port;
  const restart = () => startApp({ ...app, env: { PORT: port, JOURNAL_SEGMENT_BYTES: "300000" } });
  for (let kill = 0; kill < (IS_LONG ? 4 : 2); kill++) {
    await using processor = spawn("processor.ts", { env });
    await using client = spawn("client.ts", { args: [file], env: { SERVER_URL: server.url } });
    await Bun.sleep(random() * 300);
    const stopped = [server, processor, client][Math.floor(random() * 3)];
    stopped?.kill("SIGSTOP");
    await Bun.sleep(random() * 500);
    stopped?.kill("SIGCONT");
    count("stops");
    await Bun.sleep(random() * 100);
    if (random() < 0.6) {
      server.kill("SIGKILL");
      await server.exit();
      server = await restart();
      count("kills");
    }
    processor.kill("SIGKILL");
    client.kill("SIGKILL");
    count("kills", 2);
  }
  await using processor = spawn("processor.ts", { env });
  const last = await run("client.ts", {
    args: [file, "--wait"],
    env: { SERVER_URL: server.url },
  });
  expect(last.stderr + last.stdout).toContain("all of it is in the ledger");
  expect(await exactBalances(database.url)).toEqual(wanted);
  expect(rejectedFaults(file, bad)).toEqual([]);
  processor.kill("SIGTERM");
  await server[Symbol.asyncDispose]();
}

test(
  "every event counts once if the embedded Postgres is killed, stopped and shut down at random times",
  seeded(async (random) => {
    using dir = tempDir();
    await using server = await startApp({ dataDir: dir.path });
    const sender = openSender(random);
    // INT: a fast shutdown. QUIT: an immediate one, as after a crash.
    const signals = ["SIGKILL", "SIGSTOP", "SIGINT", "SIGQUIT"] as const;
    for (let round = 0; round < ROUNDS; round++) {
      for (const signal of signals.toSorted(() => random() - 0.5)) {
        for (let i = 0; i < 20; i++) await sender.send(server);
        const pid = await until(() => postmaster(dir.path), 60_000);
        process.kill(pid, signal);
        if (signal === "SIGSTOP") {
          await sender.send(server);
          await Bun.sleep(random() * 1_000);
          process.kill(pid, "SIGCONT");
          count("stops");
        } else count("kills");
        await Bun.sleep(random() * 300);
      }
    }
    await sender.sendRest(server);
    for (const [user, revenue] of Object.entries(sender.balances()))
      expect(
        await until(async () => {
          const found = await server.balance(user).catch(() => null);
          return found === revenue && found;
        }, 60_000),
      ).toBe(revenue);
  }),
);

/** The pid of the embedded Postgres below `dataDir`, once it is ready. */
function postmaster(dataDir: string): number | null {
  try {
    const pidFile = join(dataDir, "postgres", "cluster", "postmaster.pid");
    const lines = readFileSync(pidFile, "utf8").split("\n");
    if (!lines[7]?.startsWith("ready")) return null;
    process.kill(Number(lines[0]), 0);
    return Number(lines[0]);
  } catch {
    return null; // killed and not yet restarted
  }
}

type Server = Awaited<ReturnType<typeof startApp>>;

/** Sends events with ids, each until it is answered, and adds up the expected balances. */
function openSender(random: () => number) {
  const cents = new Map<string, number>();
  let unanswered: { id: string; userId: string; name: string; value: number }[] = [];
  let sent = 0;
  const prefix = `${Math.floor(random() * 1e9)}`;

  const sender = {
    /** Sends one more event; if it is not answered, `sendRest` sends it again. */
    async send(server: Server): Promise<boolean> {
      const userId = `user${Math.floor(random() * 20)}`;
      const value = Math.floor(random() * 100_000);
      cents.set(userId, (cents.get(userId) ?? 0) + value);
      const event = { id: `${prefix}.${sent++}`, userId, name: "add_revenue", value: value / 100 };
      const answered = await post(server, event);
      if (!answered) unanswered.push(event);
      return answered;
    },
    /** Sends on four connections until the server ends, for a minute at most. */
    async sendUntilGone(server: Server) {
      const giveUpMs = performance.now() + 60_000;
      const isGone = () => server.child.exitCode !== null || server.child.signalCode !== null;
      const lane = async () => {
        while (!isGone() && performance.now() < giveUpMs) {
          if (await sender.send(server)) await Bun.sleep(1);
          else await Promise.race([server.child.exited, Bun.sleep(100)]);
        }
      };
      await Promise.all([lane(), lane(), lane(), lane()]);
    },
    async sendRest(server: Server) {
      const rest = unanswered;
      unanswered = [];
      for (const event of rest) await until(() => post(server, event), 30_000);
    },
    balances: () =>
      Object.fromEntries(
        [...cents]
          .toSorted(([a], [b]) => (a < b ? -1 : 1))
          .map(([user, sum]) => [user, `${sum / 100}`]),
      ),
    isPosted: async (url: string) => Bun.deepEquals(await balances(url), sender.balances()),
  };
  return sender;
}

async function post(server: Server, event: unknown): Promise<boolean> {
  try {
    return (await server.post(event)).status === 201;
  } catch {
    return false;
  }
}
