/**
 * Postgres cuts the connection of a posting at any packet, loses the answer to a COMMIT, holds a lock, fails
 * with a deadlock or a serialization failure, runs out of disk, or restarts. Afterwards the totals are exact
 * without anybody's help.
 *
 * FAULT_ROUNDS=N tries more packets, and locks for longer.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, writeFileSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";

import { event, line, writeEvents } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { run, tempDir, until, untilBalance } from "../support/programs.ts";
import { FAULT_ROUNDS as ROUNDS, IS_LONG, longTest, seeded } from "../support/random.ts";
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
    lines.push(line(userId, 1.25, { id: `id${i}` }));
    if (i % 3 === 0) lines.push(lines.at(-1) as string);
    lines.push(line(userId, 0.25, { name: "subtract_revenue" }));
    wanted[userId] = "10";
  }
  lines.push("no event\n");
  writeFileSync(path, lines.join(""));
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
      await using proxy = await openJudge(database.url, judge);
      const env = { DATA_DIR: dir.file("data"), DATABASE_URL: proxy.url };
      const { code, stderr, stdout } = await run("processor.ts", { args: [file], env });
      expect(stdout).toStartWith(
        "posted 600 events (1 line quarantined, 100 events had come before)",
      );
      expect(code, stderr).toBe(1); // one line is in quarantine
      expect(await balances(database.url)).toEqual(wanted);
      await using sql = connectTest(database.url);
      const [row] = await sql`select count(*)::int as lines from quarantine`;
      expect(row).toEqual({ lines: 1 });
      return proxy.packets();
    };
    // First the connection is cut after the first COMMIT.
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
  await using ledger = await openLedger();
  let commits = 0;
  const isCommit = commitFinder();
  await using proxy = await openJudge(ledger.url, (packet) =>
    isCommit(packet) && ++commits <= 5 * ROUNDS ? "cut behind" : "pass",
  );
  await using server = await ledger.start({ DATABASE_URL: proxy.url });
  let sent = 0;
  while (commits <= 5 * ROUNDS) {
    const { status } = await server.post(event("ann"));
    expect(status).toBe(201);
    sent++;
    await Bun.sleep(20);
  }
  await untilBalance(server, "ann", `${sent}`, 30_000);
});

longTest(
  "every event counts once if the answer to a COMMIT never arrives and its connection stays open",
  async () => {
    await using ledger = await openLedger();
    let swallowed = 0;
    const isCommit = commitFinder();
    await using proxy = await openJudge(ledger.url, (packet) =>
      isCommit(packet) && ++swallowed <= 2 ? "swallow the answers" : "pass",
    );
    await using server = await ledger.start({ DATABASE_URL: proxy.url });
    let sent = 0;
    const add = async () => {
      const { status } = await server.post(event("ann"));
      expect(status).toBe(201);
      sent++;
    };
    // Until the deadline of a posting, and once more.
    await until(async () => (await add(), swallowed > 2), 90_000, 50);
    await untilBalance(server, "ann", `${sent}`, 60_000);
  },
);

test(
  "every event counts once if a processor is killed between its COMMIT and the answer",
  seeded(async (random) => {
    await using ledger = await openLedger();
    await using server = await ledger.start({}, ["--no-processor"]);
    let sent = 0;
    const add = async () => {
      const { status } = await server.post(event("ann"));
      expect(status).toBe(201);
      sent++;
    };
    for (let life = 0; life < (IS_LONG ? 6 : 2); life++) {
      const last = 1 + Math.floor(random() * 3);
      let commits = 0;
      const isCommit = commitFinder();
      await using proxy = await openJudge(ledger.url, (packet) =>
        isCommit(packet) && ++commits === last ? "swallow the answers" : "pass",
      );
      await using processor = ledger.process([], { DATABASE_URL: proxy.url });
      await until(async () => (await add(), commits >= last), 30_000);
      await Bun.sleep(20); // the COMMIT has reached Postgres
      processor.kill("SIGKILL");
      count("kills");
    }
    await using processor = ledger.process();
    await untilBalance(server, "ann", `${sent}`, 30_000).catch(() => {});
    expect(await ledger.balances(), processor.stderr.text()).toEqual({ ann: `${sent}` });
  }),
);

test("while the table is locked, events are accepted and GET answers 503; afterwards the ledger catches up", async () => {
  await using ledger = await openLedger();
  await using server = await ledger.start();
  const add = () => server.post(event("ann"));
  await add();
  await untilBalance(server, "ann", "1", 30_000);
  await using sql = connectTest(ledger.url);
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
  await untilBalance(server, "ann", `${sent}`, 60_000);
});

/** A serialization failure, a deadlock, no room on the disk, no memory, a shutdown. */
const STATES = ["40001", "40P01", "53100", "53200", "57P01"];

test("every event counts once if one of three postings fails, each time for another transient reason", async () => {
  await using ledger = await openLedger();
  const file = ledger.file("a.jsonl");
  const { balances: wanted } = writeEvents(file, 3_000, () => 0.5);
  await using server = await ledger.start();
  await server.post(event("first"));
  await untilBalance(server, "first", "1", 30_000);
  await using sql = connectTest(ledger.url);
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
    await server.post(event("second"));
    second++;
    return (await refused()) >= STATES.length;
  };
  await until(post, 60_000, 50);
  const { stdout, stderr } = await run("client.ts", {
    args: [file, "--wait"],
    env: { SERVER_URL: server.url },
  });
  expect(stderr + stdout).toContain("all of it is in the ledger");
  // A run that posts a file retries a statement that failed for a transient reason.
  const other = ledger.file("b.jsonl");
  const before = await refused();
  let third = 0;
  while ((await refused()) < before + (IS_LONG ? STATES.length : 2)) {
    appendFileSync(other, line("third"));
    third++;
    const posted = await ledger.tool([other]);
    expect(posted.code, posted.stderr).toBe(0);
  }
  count("refused statements", await refused());
  const others = { first: "1", second: `${second}`, third: `${third}` };
  expect(await ledger.balances()).toEqual({ ...wanted, ...others });
});

test(
  "every event counts once if backends are terminated at random",
  seeded(async (random) => {
    await using ledger = await openLedger();
    const file = ledger.file("a.jsonl");
    const { balances: wanted } = writeEvents(file, 20_000, random);
    await using sql = connectTest(ledger.url);
    await using processor = ledger.process([file]);
    let cuts = 0;
    // With growing pauses: a busy machine posts nothing between two cuts that follow each other closely.
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
    expect(await ledger.balances()).toEqual(wanted);
  }),
);
