/**
 * Servers whose journal is a stream, while nodes, servers, processors and clients are killed or stopped at random,
 * and Postgres is down for a while. Each event has a user of its own, so its balance says how often it counted.
 *
 * FAULT_ROUNDS=N makes it N times as long.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import { appendFileSync, readFileSync } from "node:fs";

import { openStream } from "../../lib/journal/stream.ts";
import { openStreamReader } from "../../lib/journal/stream-reader.ts";
import { openStreamJournal } from "../../lib/journal/stream-writer.ts";
import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { hasNats, type Nats, openNats, openTcpProxy } from "../support/nats.ts";
import { run, spawn, startApp, until } from "../support/programs.ts";
import { FAULT_ROUNDS as ROUNDS, IS_LONG, seeded } from "../support/random.ts";
import { type Alteration, alteredCopy } from "./altered.ts";
import { count } from "./figures.ts";

setDefaultTimeout(240_000 * ROUNDS);

const SERVERS = 2;
const SENDERS = 12;
const SOURCES = 3;
const FAULTS = 10 * ROUNDS;
const CLIENTS = 2;
/** The first outage of Postgres. */
const OUTAGE_MS = IS_LONG ? 30_000 : 5_000;

type Ledger = Awaited<ReturnType<typeof openLedger>>;
type Server = Awaited<ReturnType<Ledger["start"]>>;

test.if(hasNats)(
  "no acknowledged event is lost, and none counts twice, whatever is killed",
  seeded(async (random) => {
    await using nats = await openNats();
    await using ledger = await openLedger({ JOURNAL_URL: nats.url() });
    const database = new URL(ledger.url);
    const { port } = database;
    await using postgres = await openTcpProxy(() => Number(port));
    database.port = `${postgres.port}`;
    ledger.env.DATABASE_URL = database.href;
    const servers = await Promise.all(Array.from({ length: SERVERS }, () => ledger.start()));
    const processors = [ledger.process()];
    const pick = () => servers[Math.floor(random() * SERVERS)] as Server;
    const acknowledged: string[] = [];
    let isOver = false;
    let sent = 0;
    const sender = async () => {
      while (!isOver) {
        const user = `u${sent++}`;
        const status = await post(pick(), user);
        if (status === 201) acknowledged.push(user);
        else await Bun.sleep(20);
      }
    };
    /** Sends a source piece by piece, to any server; after a failure it asks where the source stands. */
    const sourceSender = async (_: unknown, number: number) => {
      let text = "";
      const pieces: { to: number; users: string[] }[] = [];
      for (let from = 0, isSure = true; !isOver || from < text.length;) {
        const server = pick();
        if (!isSure) {
          const offset = await askOffset(server, `f${number}`);
          if (offset === null) {
            await Bun.sleep(100);
            continue;
          }
          from = offset;
          isSure = true;
        }
        if (from === text.length) {
          const users = Array.from({ length: 5 }, (_, i) => `s${number}-${pieces.length}-${i}`);
          text += users.map((user) => line(user)).join("");
          pieces.push({ to: text.length, users });
        }
        isSure = (await patch(server, `f${number}`, text, from)) === 200;
        if (isSure) from = text.length;
        await Bun.sleep(20);
      }
      acknowledged.push(...pieces.flatMap(({ users }) => users));
    };
    const file = ledger.write("events.jsonl", "");
    const inFile: string[] = [];
    const fileWriter = async () => {
      for (; !isOver; await Bun.sleep(20)) {
        const users = Array.from({ length: 20 }, (_, i) => `c${inFile.length + i}`);
        appendFileSync(file, users.map((user) => line(user)).join(""));
        inFile.push(...users);
      }
    };
    /** Clients that send the same file at the same time, each to any server, until they are killed. */
    const clientKiller = async () => {
      while (!isOver) {
        const env = { SERVER_URL: pick().url };
        await using client = spawn("client.ts", { args: [file, "--follow"], env });
        await Bun.sleep(300 + random() * 2500);
        await killed("client", client);
      }
    };
    const outages = async () => {
      for (let ms = OUTAGE_MS; !isOver; ms = random() * 5000) {
        await Bun.sleep(2000 + random() * 8000);
        postgres.cut();
        await Bun.sleep(ms);
        postgres.mend();
      }
    };
    const senders = [
      ...Array.from({ length: SENDERS }, sender),
      ...Array.from({ length: SOURCES }, sourceSender),
      ...Array.from({ length: CLIENTS }, clientKiller),
      fileWriter(),
      outages(),
    ];
    for (let fault = 0; fault < FAULTS; fault++) {
      await Bun.sleep(300 + random() * 1500);
      await FAULT_KINDS[Math.floor(random() * FAULT_KINDS.length)]!({
        nats,
        ledger,
        servers,
        processors,
        random,
      });
    }
    await nats.ready();
    isOver = true;
    await Promise.all(senders);
    for (const { child, stderr } of servers)
      expect(child.exitCode, stderr.text().slice(-3_000)).toBeNull();
    const ends = servers.map(({ url }) =>
      run("client.ts", { args: [file], env: { SERVER_URL: url } }),
    );
    for (const { code, stderr } of await Promise.all(ends))
      expect({ code, stderr }).toMatchObject({ code: 0 });
    acknowledged.push(...inFile);
    const counted = async () => {
      const rows = await ledger.select<{ user: string; revenue: string }>(
        `select user_id as user, revenue::text from users_revenue`,
      );
      const balances = new Map(rows.map(({ user, revenue }) => [user, revenue]));
      return { rows, missing: acknowledged.filter((user) => !balances.has(user)) };
    };
    const isPosted = async () => (await counted()).missing.length === 0;
    await until(isPosted, 60_000).catch(() => {});
    const { rows, missing } = await counted();
    for (const one of [...servers, ...processors]) await one[Symbol.asyncDispose]();
    count("events acknowledged by a stream", acknowledged.length);
    count("faults of a stream", FAULTS);
    expect(missing).toEqual([]);
    expect(rows.filter(({ revenue }) => revenue !== "1")).toEqual([]);
    expect(acknowledged.length).toBeGreaterThan(FAULTS);
  }),
);

async function post(server: Server, user: string): Promise<number> {
  try {
    const signal = AbortSignal.timeout(12_000);
    const response = await fetch(`${server.url}/liveEvent`, {
      method: "POST",
      headers: { authorization: "secret", "content-type": "application/json" },
      body: event(user),
      signal,
    });
    return response.status;
  } catch {
    return 0;
  }
}

async function patch(server: Server, name: string, text: string, from: number): Promise<number> {
  try {
    const response = await fetch(`${server.url}/sources/${name}`, {
      method: "PATCH",
      headers: {
        authorization: "secret",
        "content-type": "application/x-ndjson",
        "upload-offset": `${from}`,
        "source-digest": createHash("sha256").update(text).digest("hex"),
      },
      body: text.slice(from),
      signal: AbortSignal.timeout(12_000),
    });
    return response.status;
  } catch {
    return 0;
  }
}

/** How much of a source is stored; `null` if the server does not say. */
async function askOffset(server: Server, name: string): Promise<number | null> {
  try {
    const headers = { authorization: "secret" };
    const signal = AbortSignal.timeout(12_000);
    const { status, headers: found } = await fetch(`${server.url}/sources/${name}`, {
      method: "HEAD",
      headers,
      signal,
    });
    return status === 404 ? 0 : status === 204 ? Number(found.get("upload-offset")) : null;
  } catch {
    return null;
  }
}

/** Kills its own process when it runs for the FAULT_PASS-th time. */
const DIE =
  'if ((globalThis.passes = (globalThis.passes ?? 0) + 1) == process.env.FAULT_PASS) process.kill(process.pid, "SIGKILL");';
const inWriter = (find: string, put: string) => ({
  file: "lib/journal/stream-writer.ts",
  find,
  put,
});
const POINTS: Record<string, Alteration> = {
  "before the publish": inWriter(
    "const sentMs = performance.now();",
    `${DIE} const sentMs = performance.now();`,
  ),
  "after the publish and before its acknowledgement": {
    file: "lib/journal/stream.ts",
    find: "const message = await nc.request(`${name}.${id}`",
    put: `setTimeout(() => { ${DIE} }, 0); const message = await nc.request(\`\${name}.\${id}\``,
  },
  "after the acknowledgement and before the answer": inWriter(
    "for (const { append, isLast } of group)",
    `${DIE} for (const { append, isLast } of group)`,
  ),
};

test.if(hasNats).each(Object.keys(POINTS))(
  "an event counts once when the server is killed %s",
  async (point) => {
    await using nats = await openNats();
    await using ledger = await openLedger({ JOURNAL_URL: nats.url() });
    using copy = alteredCopy([POINTS[point]!]);
    const options = { home: copy.path, dataDir: ledger.dataDir, databaseUrl: ledger.url };
    let events = 0;
    for (const FAULT_PASS of ["1", "3", "7"]) {
      await using server = await startApp({ ...options, env: { ...ledger.env, FAULT_PASS } });
      while (server.child.exitCode === null && server.child.signalCode === null)
        await send(server, events++);
      expect(server.child.signalCode).toBe("SIGKILL");
      countKill("server");
    }
    await using server = await ledger.start();
    for (let n = 0; n < events; n++) expect(await send(server, n)).toBe(201);
    const balances = async () => Object.values(await ledger.balances());
    await until(async () => (await balances()).length === events);
    expect(await balances()).toEqual(Array.from({ length: events }, () => "1"));
  },
);

test.if(hasNats).each(["before the publish", "after the publish and before its acknowledgement"])(
  "a server that was stopped %s, and whose journal was adopted meanwhile, goes on",
  async (name) => {
    await using nats = await openNats();
    await using ledger = await openLedger({ JOURNAL_URL: nats.url() });
    // At the event with this id: a busy cluster has some publishes repeated.
    const stop = `if (!globalThis.isStopped && Buffer.from(${name === "before the publish" ? "message" : "data"}).includes('"id1"')) {
      globalThis.isStopped = true; process.kill(process.pid, "SIGSTOP"); }`;
    const point = POINTS[name] as Alteration;
    using copy = alteredCopy([{ ...point, put: point.put.replace(DIE, stop) }]);
    const options = { home: copy.path, dataDir: ledger.dataDir, databaseUrl: ledger.url };
    await using first = await startApp({ ...options, env: ledger.env });
    let others = 0;
    const journalOf = async (server: Server) => {
      const body = event("other", 1, { id: `other${others++}` });
      const answer = await until(async () => {
        const answer = await tryPost(server, body);
        return answer?.status === 201 && answer;
      }, 60_000);
      return ((await answer.json()) as { position: string }).position.split(":")[0];
    };
    const journal = await journalOf(first);
    await until(async () => (await send(first, 0)) === 201, 30_000);
    const sending = send(first, 1);
    await until(() => /\) T /.test(readFileSync(`/proc/${first.pid}/stat`, "utf8")));
    // A server that starts in a busy moment may begin a journal of its own.
    const adopt = async () => {
      const server = await ledger.start();
      if ((await journalOf(server)) === journal) return server;
      await server[Symbol.asyncDispose]();
      return null;
    };
    await using _second = await until(adopt, 60_000);
    first.kill("SIGCONT");
    await sending;
    // Whether or not it was answered: it counts once.
    await until(async () => (await send(first, 1)) === 201, 30_000);
    expect(await journalOf(first)).not.toBe(journal);
    const wanted = { other: `${others}`, user0: "1", user1: "1" };
    const isPosted = async () => Bun.deepEquals(await ledger.balances(), wanted);
    await until(isPosted, 30_000).catch(() => {});
    expect(await ledger.balances()).toEqual(wanted);
  },
);

test.if(hasNats)("a publish that is answered after it was given up is stored once", async () => {
  await using nats = await openNats({ nodes: 1 });
  const [node] = nats.nodes;
  const journal = await openStreamJournal(nats.url());
  const acknowledged: string[] = [];
  const append = (text: string) =>
    journal.append(Buffer.from(`${text}\n`)).then(
      () => acknowledged.push(text) > 0,
      () => false,
    );
  expect(await append("first")).toBe(true);
  // What is sent to the node now is in its socket, and is read and answered once it continues.
  await node!.kill("SIGSTOP");
  expect(await append("late")).toBe(false);
  // After more than two minutes JetStream has forgotten any Nats-Msg-Id.
  if (IS_LONG) await Bun.sleep(185_000);
  await node!.kill("SIGCONT");
  let n = 0;
  await until(() => append(`after${n++}`), 60_000);
  await journal.close();
  const stream = await openStream(nats.url());
  const reader = (await openStreamReader(stream, journal.id))!;
  const lines: string[] = [];
  for (let position = reader.start; ;) {
    const frames = await reader.read(position);
    if (frames.length === 0) break;
    for (const { payload } of frames) lines.push(...payload.toString().split("\n").filter(Boolean));
    position = frames.at(-1)!.to;
  }
  expect(lines).toEqual([...new Set(lines)]);
  expect(acknowledged.filter((text) => !lines.includes(text))).toEqual([]);
  await stream.close();
});

/** Sends an event with an id of its own. */
async function send(server: Server, n: number): Promise<number> {
  return (await tryPost(server, event(`user${n}`, 1, { id: `id${n}` })))?.status ?? 0;
}

/** The answer; `null` without one. */
function tryPost(server: Server, body: string): Promise<Response | null> {
  const signal = AbortSignal.timeout(12_000);
  const headers = { authorization: "secret", "content-type": "application/json" };
  return fetch(`${server.url}/liveEvent`, { method: "POST", headers, body, signal }).catch(
    () => null,
  );
}

test.if(hasNats)(
  "however often servers start, and end, the journals stay as many as the servers",
  async () => {
    await using nats = await openNats({ nodes: 1 });
    await using ledger = await openLedger({ JOURNAL_URL: nats.url() });
    const starts = IS_LONG ? 200 : 15;
    let events = 0;
    const lane = async (_: unknown, lane: number) => {
      for (let n = lane; n < starts; n += 3) {
        const server = await ledger.start({}, ["--no-processor"]);
        expect(await send(server, events++)).toBe(201);
        if (n % 2) server.kill("SIGTERM");
        else await killed("server", server);
        await server.exit();
      }
    };
    await Promise.all(Array.from({ length: 3 }, lane));
    await using server = await ledger.start();
    const count = async () => Object.keys(await ledger.balances()).length;
    await until(async () => (await count()) === events, 30_000);
    const journals = await ledger.select("select from checkpoints where source like 'journal:%'");
    expect(journals.length).toBeLessThanOrEqual(6);
    expect((await fetch(`${server.url}/readyz`)).status).toBe(200);
  },
);

interface World {
  nats: Nats;
  ledger: Ledger;
  servers: Server[];
  processors: ReturnType<Ledger["process"]>[];
  random(): number;
}

const FAULT_KINDS: ((world: World) => Promise<void>)[] = [
  async ({ nats, random }) => {
    const node = nats.nodes[Math.floor(random() * nats.nodes.length)]!;
    await killed("nats-server", node);
    await Bun.sleep(random() * 2000);
    node.start();
    await nats.ready();
  },
  async ({ nats, random }) => {
    await Promise.all(nats.nodes.map((node) => killed("nats-server", node)));
    await Bun.sleep(random() * 1000);
    for (const node of nats.nodes) node.start();
    await nats.ready();
  },
  (world) => restart(world, "SIGKILL"),
  (world) => restart(world, "SIGKILL"),
  (world) => restart(world, "SIGTERM"),
  async ({ ledger, processors }) => {
    await killed("processor", processors[0]!);
    processors[0] = ledger.process();
  },
  async ({ servers, random }) => {
    const server = servers[Math.floor(random() * servers.length)] as Server;
    server.kill("SIGSTOP");
    count("stops");
    await Bun.sleep(random() * 4000);
    server.kill("SIGCONT");
  },
  async ({ nats, random }) => {
    const node = nats.nodes[Math.floor(random() * nats.nodes.length)]!;
    await node.kill("SIGSTOP");
    count("stops");
    await Bun.sleep(random() * 4000);
    await node.kill("SIGCONT");
  },
];

async function restart({ ledger, servers, random }: World, signal: "SIGKILL" | "SIGTERM") {
  const index = Math.floor(random() * servers.length);
  const server = servers[index] as Server;
  if (signal === "SIGKILL") await killed("server", server);
  else server.kill(signal);
  await server.exit();
  servers[index] = await ledger.start();
}

/** Kills a process, and waits for its end. One that has ended by itself is not counted. */
async function killed(
  what: string,
  process: { kill(): unknown; exit?(): Promise<unknown>; child?: Bun.Subprocess },
) {
  if (process.child && process.child.exitCode !== null) return;
  await process.kill();
  await process.exit?.();
  countKill(what);
}

function countKill(what: string): void {
  count("kills");
  count(`kills of a ${what}`);
}
