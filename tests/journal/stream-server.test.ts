/** Servers and processors whose journal is a stream, on a cluster of three real nats-servers. */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import { appendFileSync, cpSync, existsSync, rmSync } from "node:fs";

import { openStream } from "../../lib/journal/stream.ts";
import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
import { hasNats, type Nats, openNats, openTcpProxy } from "../support/nats.ts";
import { closedPort, run, untilBalance, until } from "../support/programs.ts";

setDefaultTimeout(120_000);
/** On a machine that runs other tests too. */
const PATIENCE_MS = 60_000;

let nats: Nats;
beforeAll(async () => {
  if (hasNats) nats = await openNats();
});
afterAll(() => nats?.[Symbol.asyncDispose]());
let streams = 0;
const newStream = () => nats.url(`s${++streams}`);

const digest = (text: string) => createHash("sha256").update(text).digest("hex");

/** PATCH of the bytes of `text` from `from` on to its end. */
function patch(app: { url: string }, name: string, text: string, from: number) {
  return fetch(`${app.url}/sources/${name}`, {
    method: "PATCH",
    headers: {
      authorization: "secret",
      "content-type": "application/x-ndjson",
      "upload-offset": `${from}`,
      "source-digest": digest(text),
    },
    body: Buffer.from(text).subarray(from),
  });
}

const head = (app: { url: string }, name: string) =>
  fetch(`${app.url}/sources/${name}`, { method: "HEAD", headers: { authorization: "secret" } });

test.if(hasNats)(
  "events are counted by whichever server they come to, without a disk",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    await using one = await ledger.start();
    await using two = await ledger.start();
    expect((await one.post(event("ann", 2))).status).toBe(201);
    expect((await two.post(event("ann", 3))).status).toBe(201);
    const bulk = await two.postLines(line("ann", 5) + line("ben", 7));
    const { position } = (await bulk.json()) as { position: string };
    const read = await fetch(`${one.url}/userEvents/ben?after=${position}`);
    expect(await read.json()).toEqual({ user_id: "ben", revenue: "7" });
    await untilBalance(one, "ann", "10", PATIENCE_MS);
    expect(existsSync(ledger.dataDir)).toBe(false);
    await until(async () =>
      /^daybook_posting_lag_bytes 0$/m.test(await (await fetch(`${one.url}/metrics`)).text()),
    );
    expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
  },
);

test.if(hasNats)("a source that moves between servers counts once", async () => {
  await using ledger = await openLedger({ JOURNAL_URL: newStream() });
  await using one = await ledger.start();
  await using two = await ledger.start();
  let text = "";
  for (let piece = 0; piece < 8; piece++) {
    const from = text.length;
    text += line("ann", 1) + line("ben", 2);
    const [here, there] = piece % 2 ? [one, two] : [two, one];
    expect((await patch(here, "f", text, from)).status).toBe(200);
    // Both at once, and once more to the other: only one of them counts.
    if (piece % 3 === 0) expect([200, 409]).toContain((await patch(there, "f", text, from)).status);
    expect((await head(there, "f")).headers.get("upload-offset")).toBe(`${text.length}`);
  }
  await untilBalance(one, "ann", "8", PATIENCE_MS);
  await untilBalance(one, "ben", "16", PATIENCE_MS);
  expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
});

test.if(hasNats)(
  "a body of 16 MiB of a source counts once, also from the middle of it",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    await using one = await ledger.start();
    await using two = await ledger.start();
    const many = (from: number, count: number) =>
      Array.from({ length: count }, (_, i) =>
        line(`u${(from + i) % 50}`, 1, { note: "é".repeat(40) }),
      )
        .join("")
        .replaceAll("}\n", (end, at: number) => (at % 7 === 0 ? "} \r\n" : end));
    const first = many(0, 100_000);
    expect((await patch(one, "big", first, 0)).status).toBe(200);
    const whole = first + many(0, 5000);
    // The second server has not seen the beginning.
    expect((await patch(two, "big", whole, Buffer.byteLength(first))).status).toBe(200);
    await untilBalance(one, "u7", "2100", PATIENCE_MS);
    expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
  },
);

test.if(hasNats)("another processor takes over within seconds of a kill", async () => {
  await using ledger = await openLedger({ JOURNAL_URL: newStream() });
  await using server = await ledger.start({}, ["--no-processor"]);
  await using first = ledger.process();
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1", PATIENCE_MS);
  await using _second = ledger.process();
  first.kill();
  await first.exit();
  await server.post(event("ann"));
  await untilBalance(server, "ann", "2", PATIENCE_MS);
});

test.if(hasNats)(
  "a journal whose checkpoint is locked is left alone, and no connection waits for it",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    await using server = await ledger.start({}, ["--no-processor"]);
    await server.post(event("ann"));
    await using first = ledger.process();
    await untilBalance(server, "ann", "1", PATIENCE_MS);
    await using holder = connectTest(ledger.url);
    const isWaiting = async () => {
      const waiting = await ledger.select(
        "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
      );
      return waiting.length > 0;
    };
    await holder.begin(async (tx) => {
      await tx`select from checkpoints where source like 'journal:%' for update`;
      expect((await server.post(event("ann"))).status).toBe(201);
      await using _second = ledger.process();
      await until(() => _second.stderr.text().includes("following stream"), PATIENCE_MS);
      // Longer than the 2 s after which a checkpoint that stands still is taken over.
      for (let looks = 0; looks < 40; looks++, await Bun.sleep(100))
        expect(await isWaiting()).toBe(false);
      expect(await server.balance("ann")).toBe("1");
    });
    await untilBalance(server, "ann", "2", PATIENCE_MS);
    expect(first.child.exitCode).toBeNull();
  },
);

test.if(hasNats)("the lag covers the journals of all servers", async () => {
  await using ledger = await openLedger({ JOURNAL_URL: newStream() });
  await using one = await ledger.start({}, ["--no-processor"]);
  await using two = await ledger.start({}, ["--no-processor"]);
  const lagOf = async (app: { url: string }) =>
    (await (await fetch(`${app.url}/readyz`)).json()) as { lagBytes: number; lagSeconds: number };
  await one.post(event("ann"));
  await until(
    async () => (await lagOf(two)).lagBytes > 0 && (await lagOf(two)).lagSeconds > 0,
    PATIENCE_MS,
  );
  await using _processor = ledger.process();
  await until(
    async () => (await lagOf(two)).lagBytes === 0 && (await lagOf(one)).lagBytes === 0,
    PATIENCE_MS,
  );
  expect(await lagOf(one)).toMatchObject({ lagBytes: 0, lagSeconds: 0 });
});

test.if(hasNats)(
  "METRICS_PORT of a processor shows the lag of all journals of the stream, also without servers",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    await using proxy = await openTcpProxy(() => Number(new URL(ledger.url).port));
    const via = new URL(ledger.url);
    via.port = `${proxy.port}`;
    const ends: number[] = [];
    {
      await using one = await ledger.start({}, ["--no-processor"]);
      await using two = await ledger.start({}, ["--no-processor"]);
      await using first = ledger.process([], { DATABASE_URL: via.href, METRICS_PORT: "0" });
      const url = await until(
        () => /metrics on (http:\S+)\/metrics/.exec(first.stderr.text())?.[1],
        PATIENCE_MS,
      );
      const lag = async () => {
        const text = await (await fetch(`${url}/metrics`)).text();
        const of = (name: string) =>
          Number(new RegExp(`^daybook_posting_lag_${name} (.*)$`, "m").exec(text)?.[1]);
        return { bytes: of("bytes"), seconds: of("seconds") };
      };
      await one.post(event("ann"));
      await until(async () => (await lag()).bytes === 0, PATIENCE_MS);
      await untilBalance(one, "ann", "1", PATIENCE_MS);
      proxy.cut();
      // As many bytes as the frames of both servers have, although neither of them posts.
      for (const server of [one, two]) {
        const before = (await lag()).bytes;
        const bulk = await server.postLines(line("ann", 1, { fill: "x".repeat(10_000) }));
        expect(bulk.status).toBe(201);
        await until(async () => (await lag()).bytes >= before + 10_000, PATIENCE_MS);
        ends.push((await lag()).bytes);
      }
      expect((await lag()).seconds).toBeGreaterThan(0);
      one.kill();
      two.kill();
      await Promise.all([one.exit(), two.exit()]);
      expect((await lag()).bytes).toBe(ends.at(-1)!);
      proxy.mend();
      await until(async () => (await lag()).bytes === 0, PATIENCE_MS);
      expect(await lag()).toEqual({ bytes: 0, seconds: 0 });
    }
    expect(await ledger.balances()).toEqual({ ann: "3" });
  },
);

test.if(hasNats)("a full stream answers 507, and resumes once there is room", async () => {
  const url = newStream();
  await using ledger = await openLedger({ JOURNAL_URL: url });
  await using app = await ledger.start();
  await app.post(event("ann"));
  const stream = url.split("/").at(-1)!;
  await nats.edit(stream, { max_bytes: 3_000_000 });
  const body = line("ben", 1, { fill: "x".repeat(1000) }).repeat(1000);
  await until(async () => (await app.postLines(body)).status === 507);
  const whole = line("cat", 1, { fill: "x".repeat(1000) }).repeat(15_000);
  expect((await app.postLines(whole)).status).toBe(507);
  expect((await patch(app, "f", whole, 0)).status).toBe(507);
  await nats.edit(stream, { max_bytes: -1 });
  expect((await app.post(event("ann"))).status).toBe(201);
  await untilBalance(app, "ann", "2", PATIENCE_MS);
  // A part of the source was stored: it continues where it stands, and counts once.
  const from = Number((await head(app, "f")).headers.get("upload-offset") ?? 0);
  expect((await patch(app, "f", whole, from)).status).toBe(200);
  const expected = async () => Number(await app.balance("cat")) >= 15_000;
  await until(expected, PATIENCE_MS);
  expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
});

test.if(hasNats)("without a quorum an event gets 503, and it resumes by itself", async () => {
  await using own = await openNats();
  await using ledger = await openLedger({ JOURNAL_URL: own.url() });
  await using app = await ledger.start();
  await app.post(event("ann"));
  await untilBalance(app, "ann", "1", PATIENCE_MS);
  const [, second, third] = own.nodes;
  await second!.kill();
  await third!.kill();
  const refused = await app.post(event("ben"));
  expect(refused.status).toBe(503);
  expect(refused.headers.get("retry-after")).toBe("1");
  expect((await fetch(`${app.url}/readyz`)).status).toBe(503);
  expect(await app.balance("ann")).toBe("1");
  second!.start();
  third!.start();
  await until(async () => (await app.post(event("ann"))).status === 201, PATIENCE_MS);
  await until(async () => (await app.balance("ann")) !== "1", PATIENCE_MS);
  expect((await fetch(`${app.url}/readyz`)).status).toBe(200);
});

test.if(hasNats)("a server that is cut off from its node finds another by itself", async () => {
  const url = newStream();
  await using proxy = await openTcpProxy(() => nats.nodes[0]!.port);
  const through = `nats://127.0.0.1:${proxy.port}/${url.split("/").at(-1)}`;
  await using ledger = await openLedger({ JOURNAL_URL: through });
  await using app = await ledger.start();
  const acknowledged: string[] = [];
  const send = async (user: string) => {
    const { status } = await app.post(event(user));
    expect([201, 503]).toContain(status);
    if (status === 201) acknowledged.push(user);
    return status === 201;
  };
  expect(await send("before")).toBe(true);
  // Server and processor have a connection each, through which they have learnt of the other nodes.
  await untilBalance(app, "before", "1", PATIENCE_MS);
  proxy.cut();
  for (let sent = 0; acknowledged.length < 5; sent++) await send(`u${sent}`);
  for (const user of acknowledged) await untilBalance(app, user, "1", PATIENCE_MS);
  const balances = Object.values(await ledger.balances());
  expect(balances.filter((revenue) => revenue !== "1")).toEqual([]);
});

test.if(hasNats)(
  "while the database is down, events are accepted, and a source that was not seen is not",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    const target = new URL(ledger.url);
    await using proxy = await openTcpProxy(() => Number(target.port));
    const via = new URL(ledger.url);
    via.port = `${proxy.port}`;
    await using app = await ledger.start({ DATABASE_URL: via.href });
    const seen = line("ann", 1);
    expect((await patch(app, "seen", seen, 0)).status).toBe(200);
    await untilBalance(app, "ann", "1", PATIENCE_MS);
    proxy.cut();
    expect((await app.post(event("ann", 2))).status).toBe(201);
    expect((await app.postLines(line("ann", 3))).status).toBe(201);
    expect((await patch(app, "seen", seen + seen, seen.length)).status).toBe(200);
    const unseen = await patch(app, "unseen", seen, 0);
    expect(unseen.status).toBe(503);
    expect(unseen.headers.get("retry-after")).toBe("1");
    proxy.mend();
    await untilBalance(app, "ann", "7", PATIENCE_MS);
  },
);

test.if(hasNats)(
  "SIGTERM finishes what was accepted, and the next server continues in the journal",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    for (let start = 0; start < 3; start++) {
      await using app = await ledger.start();
      expect((await app.post(event("ann"))).status).toBe(201);
      app.kill("SIGTERM");
      expect(await app.exit()).toBe(0);
    }
    await using app = await ledger.start();
    await untilBalance(app, "ann", "3", PATIENCE_MS);
    const rows = await ledger.select("select from checkpoints where source like 'journal:%'");
    expect(rows).toHaveLength(1);
  },
);

test.if(hasNats)("a start waits for servers that do not answer yet", async () => {
  const port = await closedPort();
  await using ledger = await openLedger({ JOURNAL_URL: `nats://127.0.0.1:${port}/s` });
  const starting = ledger.process();
  await until(() =>
    starting.stderr
      .text()
      .includes(`waiting for stream s at 127.0.0.1:${port}: connection refused`),
  );
  starting.kill("SIGTERM");
  await starting.exit();
});

test.if(hasNats)("JOURNAL_URL without DATABASE_URL is invalid", async () => {
  const env = { JOURNAL_URL: "nats://127.0.0.1/s", DATABASE_URL: "" };
  const { code, stderr } = await run("app.ts", { env });
  expect(code).toBe(2);
  expect(stderr).toStartWith("JOURNAL_URL is set and DATABASE_URL is not");
});

test.if(hasNats)(
  "what is posted and old is deleted, and still recounted; the rest is kept",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream(), JOURNAL_KEEP_DAYS: "0" });
    await using app = await ledger.start({}, ["--no-processor"]);
    for (let i = 0; i < 5; i++) await app.post(event("ann", 1));
    const processor = ledger.process();
    await until(
      () => /deleted journal \S+ up to position \d+/.exec(processor.stderr.text()),
      20_000,
    );
    await app.post(event("ann", 1));
    await untilBalance(app, "ann", "6", PATIENCE_MS);
    processor.kill("SIGTERM");
    await processor.exit();
    await app.post(event("ann", 1));
    expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
    await using _next = ledger.process();
    await untilBalance(app, "ann", "7", PATIENCE_MS);
    expect(await ledger.tool(["--check"])).toMatchObject({ code: 0 });
  },
);

test.if(hasNats)(
  "a server with a disk is followed by servers on a stream under load, and nothing counts twice",
  async () => {
    await using ledger = await openLedger();
    const file = ledger.write(
      "f.jsonl",
      Array.from({ length: 3000 }, (_, i) => line(`u${i}`)).join(""),
    );
    const old = await ledger.start();
    let isOver = false;
    let target: { post(event: string): Promise<Response> } = old;
    let sent = 0;
    const sending = (async () => {
      for (; !isOver; sent++) expect((await target.post(event("single"))).status).toBe(201);
    })();
    await run("client.ts", { args: [file], env: { SERVER_URL: old.url } });
    const settings = { JOURNAL_URL: newStream(), DATA_DIR: ledger.file("none") };
    await using one = await ledger.start(settings);
    await using two = await ledger.start(settings);
    target = one;
    const more = Array.from({ length: 3000 }, (_, i) => line(`u${i}`)).join("");
    appendFileSync(file, more);
    const client = await run("client.ts", { args: [file], env: { SERVER_URL: two.url } });
    expect(client.code).toBe(0);
    old.kill("SIGTERM");
    await old.exit();
    isOver = true;
    await sending;
    const posted = await ledger.tool([ledger.journal]);
    expect(posted.stdout).toContain("posted 0 events");
    await untilBalance(one, "single", `${sent}`, PATIENCE_MS);
    await until(async () => (await two.balance("u2999")) === "2");
    const found = Object.entries(await ledger.balances()).filter(([user]) => user !== "single");
    expect(found.filter(([, revenue]) => revenue !== "2")).toEqual([]);
    expect(await ledger.tool(["--verify", ledger.journal], settings)).toMatchObject({ code: 0 });
  },
);

test.if(hasNats)("a stream that is behind the ledger is named, and can be left", async () => {
  await using own = await openNats({ nodes: 1 });
  const [node] = own.nodes;
  await using ledger = await openLedger({ JOURNAL_URL: own.url() });
  const first = await ledger.start();
  await first.post(event("ann", 1));
  await untilBalance(first, "ann", "1", PATIENCE_MS);
  await node!.kill("SIGTERM");
  const copy = own.file("copy");
  cpSync(node!.store, copy, { recursive: true });
  node!.start();
  await until(async () => (await first.post(event("ann", 2))).status === 201, PATIENCE_MS);
  await untilBalance(first, "ann", "3", PATIENCE_MS);
  first.kill("SIGTERM");
  await first.exit();
  await node!.kill("SIGTERM");
  rmSync(node!.store, { recursive: true });
  cpSync(copy, node!.store, { recursive: true });
  node!.start();

  // It never listens: what it accepted would not be posted.
  const refused = await ledger.start().then(
    () => "it listens",
    (error: Error) => error.message,
  );
  expect(refused).toContain("is behind the ledger");
  expect(refused).toContain("nats stream purge daybook --subject=daybook.");
  const [{ id }] = (await ledger.select<{ id: string }>(
    "select substr(source, 9) as id from checkpoints where source like 'journal:%'",
  )) as [{ id: string }];
  await own.purge("daybook", id);
  expect(await ledger.tool(["--retire", `journal:${id}`, "--yes"])).toMatchObject({ code: 0 });
  await using app = await ledger.start();
  await app.post(event("ann", 4));
  await untilBalance(app, "ann", "7", PATIENCE_MS);
  expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
});

test.if(hasNats)("a damaged journal stops no other, and is named", async () => {
  const url = newStream();
  await using ledger = await openLedger({ JOURNAL_URL: url });
  await using app = await ledger.start();
  await app.post(event("ann"));
  const stream = await openStream(url);
  const junk = { expected: 0, writer: "nobody" };
  expect(await stream.publish("junk", Buffer.from("junk"), junk)).toMatchObject({
    state: "stored",
  });
  await stream.close();
  await until(() => app.stderr.text().includes("journal junk of stream"), PATIENCE_MS);
  await using other = await ledger.start();
  await other.post(event("ann"));
  expect((await patch(other, "f", line("ann"), 0)).status).toBe(200);
  await untilBalance(app, "ann", "3", PATIENCE_MS);
  const ready = (await (await fetch(`${app.url}/readyz`)).json()) as { paused?: string };
  expect(ready.paused).toContain("journal junk of stream");
});
