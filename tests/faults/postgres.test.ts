/**
 * What Postgres may do to a posting: cut the connection at any packet, lose the answer to a COMMIT, hold a
 * lock, refuse with a deadlock or a serialization failure, run out of disk, restart. Each time the totals
 * are exact once it is over, without help.
 *
 * FAULT_ROUNDS=N tries more packets, and locks for longer.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, writeFileSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";

import { writeEvents } from "../support/events.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { FAULT_ROUNDS as ROUNDS, IS_LONG, seeded } from "../support/random.ts";
import { count } from "./figures.ts";

const LOCKED_MS = IS_LONG ? 30_000 : 2_000;
setDefaultTimeout(120_000 * ROUNDS);

/** What happens to a packet from the client: it is forwarded, or ends its connection. */
type Verdict = "pass" | "cut" | "cut behind" | "swallow the answers";

/** Recognises a COMMIT: the driver prepares it, and then refers to it by a name. */
function commitFinder(): (packet: Buffer) => boolean {
  const names = new Set<string>();
  return (packet) => {
    const text = packet.toString("latin1");
    const [, name] = /(\w+)\0commit\0/i.exec(text) ?? [];
    if (name) names.add(name);
    return names.values().some((name) => text.includes(`${name}\0`));
  };
}

/** A proxy to the Postgres at `url` on which `judge` decides about each packet from the client. */
async function openJudge(url: string, judge: (packet: Buffer, number: number) => Verdict) {
  const target = new URL(url);
  const open = new Set<Socket>();
  let number = 0;
  const server = createServer((client) => {
    const postgres = connect(Number(target.port || 5432), target.hostname);
    for (const socket of [client, postgres]) {
      open.add(socket);
      socket
        .on("error", () => {})
        .on("close", () => {
          open.delete(socket);
          client.destroy();
          postgres.destroy();
        });
    }
    client.on("data", (packet: Buffer) => {
      const verdict = judge(packet, ++number);
      if (verdict !== "pass") count("cut connections");
      if (verdict === "cut") return void client.destroy();
      // The client never sees the answer; Postgres does the same with the packet.
      if (verdict !== "pass") postgres.removeAllListeners("data").resume();
      postgres.write(packet, () => {
        if (verdict === "cut behind") setTimeout(() => client.destroy(), 20);
      });
    });
    postgres.on("data", (packet: Buffer) => client.write(packet));
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const via = new URL(url);
  via.host = `127.0.0.1:${(server.address() as { port: number }).port}`;
  return {
    url: via.href,
    packets: () => number,
    async [Symbol.asyncDispose]() {
      for (const socket of open) socket.destroy();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** Writes events of a few users, some with ids and some of these twice. Returns the balances. */
function writeFew(path: string) {
  const wanted: Record<string, string> = {};
  const lines: string[] = [];
  for (let i = 0; i < 300; i++) {
    const userId = `user${String(i % 30).padStart(2, "0")}`;
    lines.push(JSON.stringify({ userId, name: "add_revenue", value: 1.25, id: `id${i}` }));
    if (i % 3 === 0) lines.push(lines.at(-1) as string);
    lines.push(JSON.stringify({ userId, name: "subtract_revenue", value: 0.25 }));
    wanted[userId] = "10";
  }
  lines.push("no event");
  writeFileSync(path, `${lines.join("\n")}\n`);
  return wanted;
}

test(
  "every event counts once if the connection is cut before or after any packet of a posting",
  seeded(async (random) => {
    using dir = tempDir();
    const file = dir.file("a.jsonl");
    const wanted = writeFew(file);
    const postThrough = async (judge: (packet: Buffer, number: number) => Verdict) => {
      await using database = await testDatabase();
      await using way = await openJudge(database.url, judge);
      const env = { DATA_DIR: dir.file("data"), DATABASE_URL: way.url };
      const { code, stderr, stdout } = await run("processor.ts", { args: [file], env });
      expect(stdout).toStartWith("posted 700 events (1 lines quarantined)");
      expect(code, stderr).toBe(1); // one line is in quarantine
      expect(await balances(database.url)).toEqual(wanted);
      await using sql = connectTest(database.url);
      const [row] = await sql`select count(*)::int as lines from quarantine`;
      expect(row).toEqual({ lines: 1 });
      return way.packets();
    };
    // The packet whose answer says what has been posted.
    let commits = 0;
    const isCommit = commitFinder();
    await postThrough((packet) => (isCommit(packet) && ++commits === 1 ? "cut behind" : "pass"));
    expect(commits).toBeGreaterThan(0);
    const packets = await postThrough(() => "pass");
    expect(packets).toBeGreaterThan(8);
    const all = Array.from({ length: 2 * packets }, (_, i) => i);
    const some = all.toSorted(() => random() - 0.5).slice(0, IS_LONG ? all.length : 4);
    for (const one of some) {
      const verdict = one % 2 === 0 ? "cut" : "cut behind";
      await postThrough((_, number) => (number === 1 + (one >> 1) ? verdict : "pass"));
    }
  }),
);

test("every event counts once if the connection is cut after each of the first COMMITs", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  let commits = 0;
  const isCommit = commitFinder();
  await using way = await openJudge(database.url, (packet) =>
    isCommit(packet) && ++commits <= 5 * ROUNDS ? "cut behind" : "pass",
  );
  await using server = await startApp({ dataDir: dir.path, databaseUrl: way.url });
  let sent = 0;
  while (commits <= 5 * ROUNDS) {
    const { status } = await server.post({ userId: "ann", name: "add_revenue", value: 1 });
    expect(status).toBe(201);
    sent++;
    await Bun.sleep(20);
  }
  await until(async () => (await server.balance("ann").catch(() => null)) === `${sent}`, 30_000);
});

test.if(IS_LONG)(
  "every event counts once if the answer to a COMMIT never arrives and its connection stays open",
  async () => {
    await using database = await testDatabase();
    using dir = tempDir();
    let swallowed = 0;
    const isCommit = commitFinder();
    await using way = await openJudge(database.url, (packet) =>
      isCommit(packet) && ++swallowed <= 2 ? "swallow the answers" : "pass",
    );
    await using server = await startApp({ dataDir: dir.path, databaseUrl: way.url });
    let sent = 0;
    const add = async () => {
      const { status } = await server.post({ userId: "ann", name: "add_revenue", value: 1 });
      expect(status).toBe(201);
      sent++;
    };
    // Until the deadline of a posting, and once more.
    await until(async () => (await add(), swallowed > 2), 90_000, 50);
    await until(async () => (await server.balance("ann").catch(() => null)) === `${sent}`, 60_000);
  },
);

test(
  "every event counts once if a processor is killed between its COMMIT and the answer",
  seeded(async (random) => {
    await using database = await testDatabase();
    using dir = tempDir();
    const app = { dataDir: dir.path, databaseUrl: database.url, args: ["--no-processor"] };
    await using server = await startApp(app);
    let sent = 0;
    const add = async () => {
      const { status } = await server.post({ userId: "ann", name: "add_revenue", value: 1 });
      expect(status).toBe(201);
      sent++;
    };
    for (let life = 0; life < (IS_LONG ? 6 : 2); life++) {
      const last = 1 + Math.floor(random() * 3);
      let commits = 0;
      const isCommit = commitFinder();
      await using way = await openJudge(database.url, (packet) =>
        isCommit(packet) && ++commits === last ? "swallow the answers" : "pass",
      );
      const env = { DATA_DIR: dir.path, DATABASE_URL: way.url };
      await using processor = spawn("processor.ts", { env });
      await until(async () => (await add(), commits >= last), 30_000);
      await Bun.sleep(20); // it has reached Postgres
      processor.kill("SIGKILL");
      count("kills");
    }
    await using processor = spawn("processor.ts", {
      env: { DATA_DIR: dir.path, DATABASE_URL: database.url },
    });
    await until(async () => (await server.balance("ann")) === `${sent}`, 30_000).catch(() => {});
    expect(await balances(database.url), processor.stderr.text()).toEqual({ ann: `${sent}` });
  }),
);

test("while the table is locked events are accepted and GET answers 503; afterwards the ledger catches up", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  const add = () => server.post({ userId: "ann", name: "add_revenue", value: 1 });
  await add();
  await until(async () => (await server.balance("ann")) === "1", 30_000);
  await using sql = connectTest(database.url);
  let sent = 1;
  await sql.begin(async (tx) => {
    await tx`lock table users_revenue in access exclusive mode`;
    const until = performance.now() + LOCKED_MS;
    while (performance.now() < until) {
      expect((await add()).status).toBe(201);
      sent++;
      const { status } = await fetch(`${server.url}/userEvents/ann`, {
        signal: AbortSignal.timeout(10_000),
      });
      expect(status).toBe(503);
    }
  });
  await until(async () => (await server.balance("ann").catch(() => null)) === `${sent}`, 60_000);
});

/** A serialization failure, a deadlock, no room on the disk, no memory, a shutdown. */
const STATES = ["40001", "40P01", "53100", "53200", "57P01"];

test("every event counts once if one of three postings is refused, each time for another reason", async () => {
  await using database = await testDatabase();
  using dir = tempDir();
  const file = dir.file("a.jsonl");
  const { balances: wanted } = writeEvents(file, 3_000, () => 0.5);
  await using server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  await server.post({ userId: "first", name: "add_revenue", value: 1 });
  await until(async () => (await server.balance("first")) === "1", 30_000);
  await using sql = connectTest(database.url);
  // Sequences do not roll back: each third statement fails, whichever transaction it is in.
  await sql.unsafe(`
    create sequence tries;
    create function fail() returns trigger language plpgsql as $$
    declare try bigint := nextval('tries') - 1;
    begin
      if try % 3 = 0 then
        raise exception 'refused by the test'
          using errcode = ('{${STATES.join()}}'::text[])[1 + try / 3 % ${STATES.length}];
      end if;
      return null;
    end $$;
    create trigger fail after insert on users_revenue for each statement execute function fail();`);
  const refused = async () => {
    const [row] =
      await sql`select case when is_called then last_value + 2 else 0 end / 3 as times from tries`;
    return Number(row?.["times"]);
  };
  let second = 0;
  const post = async () => {
    await server.post({ userId: "second", name: "add_revenue", value: 1 });
    second++;
    return (await refused()) >= STATES.length;
  };
  await until(post, 60_000, 50);
  const { stdout, stderr } = await run("client.ts", {
    args: [file, "--wait"],
    env: { SERVER_URL: server.url },
  });
  expect(stderr + stdout).toContain("all of it is in the ledger");
  // Posting a file fails when it is refused, but not for what is transient.
  const other = dir.file("b.jsonl");
  const before = await refused();
  let third = 0;
  while ((await refused()) < before + (IS_LONG ? STATES.length : 2)) {
    appendFileSync(other, '{"userId":"third","name":"add_revenue","value":1}\n');
    third++;
    const env = { DATA_DIR: dir.path, DATABASE_URL: database.url };
    const posted = await run("processor.ts", { args: [other], env });
    expect(posted.code, posted.stderr).toBe(0);
  }
  count("refused statements", await refused());
  const others = { first: "1", second: `${second}`, third: `${third}` };
  expect(await balances(database.url)).toEqual({ ...wanted, ...others });
});

test(
  "every event counts once if backends are terminated at random",
  seeded(async (random) => {
    await using database = await testDatabase();
    using dir = tempDir();
    const file = dir.file("a.jsonl");
    const { balances: wanted } = writeEvents(file, 20_000, random);
    const env = { DATA_DIR: dir.file("data"), DATABASE_URL: database.url };
    await using sql = connectTest(database.url);
    await using processor = spawn("processor.ts", { args: [file], env });
    let cuts = 0;
    // Less and less often: a busy machine posts nothing between two that follow each other closely.
    for (let turn = 0; processor.child.exitCode === null; turn++) {
      const ended = await sql`
        select pg_terminate_backend(pid) from pg_stat_activity
        where datname = current_database() and application_name like 'daybook%'`;
      cuts += ended.length;
      count("cut connections", ended.length);
      await Bun.sleep(random() * 150 + turn * 10);
    }
    expect(cuts).toBeGreaterThan(0);
    expect(processor.stderr.text() + processor.child.exitCode).toEndWith("1"); // quarantined lines
    expect(await balances(database.url)).toEqual(wanted);
  }),
);
