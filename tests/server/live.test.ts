/** GET /live: what happens each second, for many viewers at once. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { connect } from "node:net";

import { type Message, openLive } from "../../lib/server/live.ts";
import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import { until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

/** Reads a stream. */
async function view(url: string, headers: Record<string, string> = {}) {
  const abort = new AbortController();
  const response = await fetch(`${url}/live`, { headers, signal: abort.signal });
  const messages: Message[] = [];
  const end = (async () => {
    let text = "";
    for await (const chunk of response.body!.pipeThrough(new TextDecoderStream() as never)) {
      text += chunk as unknown as string;
      for (let at; (at = text.indexOf("\n\n")) >= 0; text = text.slice(at + 2))
        messages.push(JSON.parse(text.slice("data: ".length, at)) as Message);
    }
  })();
  end.catch(() => {});
  const sum = (numbers: (number | null)[]) => numbers.reduce<number>((a, b) => a + (b ?? 0), 0);
  return {
    response,
    messages,
    end,
    last: () => messages.at(-1)!,
    /** Over all seconds; one that comes again is a correction. */
    total(name: "accepted" | "posted") {
      const rates = new Map<number | null, number | null>();
      for (const { seconds } of messages)
        for (const [i, at] of seconds.at.entries()) rates.set(at, seconds[name][i]!);
      return Math.round(sum([...rates.values()]));
    },
    rejected: () => sum(messages.flatMap((one) => Object.values(one.seconds.rejected).flat())),
    async [Symbol.asyncDispose]() {
      abort.abort();
      await end.catch(() => {});
    },
  };
}

test("seconds before the first viewer are complete, and each second follows", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  expect((await app.postLines(line("ann") + "[]\n" + line("ben"))).status).toBe(201);
  await untilBalance(app, "ann", "1");
  await using first = await view(app.url);
  expect(first.response.headers.get("content-type")).toBe("text/event-stream");
  expect(first.response.headers.get("cache-control")).toBe("no-store");
  await until(() => first.total("posted") === 2 && first.messages.length > 2);
  expect((await app.post(event("ann"))).status).toBe(201);
  await until(() => first.total("posted") === 3);
  expect([first.total("accepted"), first.rejected()]).toEqual([3, 1]);
  await using second = await view(app.url);
  await until(() => second.messages.length > 0);
  const [history] = second.messages;
  expect(history?.seconds.at.length).toBeGreaterThan(2);
  expect(history).toMatchObject({ accepted: 3, rejected: { event: 1 }, posted: 3 });
  expect(history).toMatchObject({ quarantined: 0, postedSince: null });
  expect(history?.health).toEqual({ isHealthy: true, sentence: "Healthy." });
  expect(history?.seconds.syncP99.some((ms) => ms !== null && ms >= 0)).toBe(true);
});

test("what other servers post is posted; it was accepted elsewhere", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  await using viewer = await view(app.url);
  await until(() => viewer.messages.length > 2);
  const file = ledger.write("events.jsonl", line("ann").repeat(50));
  expect(await ledger.tool([file])).toMatchObject({ code: 0 });
  await until(() => viewer.total("posted") === 50);
  expect(viewer.total("accepted")).toBe(0);
});

test("it says that posting lags, and since when the database has not answered", async () => {
  await using ledger = await openLedger();
  await using proxy = await openProxy(ledger.url);
  await using app = await ledger.start({ DATABASE_URL: proxy.url }, ["--no-processor"]);
  await using viewer = await view(app.url);
  expect((await app.post(event("ann"))).status).toBe(201);
  await until(() => /^Posting lags by \d+ s\.$/.test(viewer.last()?.health.sentence), 20_000);
  proxy.cut();
  const silent = /^The database has not answered since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\.$/;
  await until(() => silent.test(viewer.last().health.sentence), 20_000);
  proxy.mend();
  await until(() => viewer.last().health.sentence.startsWith("Posting lags"), 20_000);
});

test("it requires balances:read, ends at once on SIGTERM, and HEAD opens no stream", async () => {
  await using ledger = await openLedger({ READ_SECRET: "read" });
  await using app = await ledger.start();
  expect((await fetch(`${app.url}/live`)).status).toBe(401);
  expect((await fetch(`${app.url}/live`, { headers: { authorization: "no" } })).status).toBe(401);
  const authorization = "Bearer read";
  const head = await fetch(`${app.url}/live`, { method: "HEAD", headers: { authorization } });
  expect(head.headers.get("content-type")).toBe("text/event-stream");
  await using viewer = await view(app.url, { authorization });
  await until(() => viewer.messages.length > 1);
  app.kill("SIGTERM");
  await viewer.end;
  expect(await app.exit()).toBe(0);
});

test("200 viewers get each second", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await using stack = new AsyncDisposableStack();
  const viewers = await Promise.all(Array.from({ length: 200 }, () => view(app.url)));
  for (const viewer of viewers) stack.use(viewer);
  expect((await app.post(event("ann"))).status).toBe(201);
  await until(() => viewers.every(({ total }) => total("posted") === 1), 30_000);
});

test("a viewer that does not read is dropped, and no other", async () => {
  const nothing = () => Promise.reject(new Error("no database"));
  const parts = {
    journal: { onCommit() {}, end: () => 0, trouble: () => null },
    database: { use: nothing },
    posted: { lag: () => ({ bytes: 0, seconds: 0 }), paused: () => null },
    metrics: { totals: () => ({ accepted: 0, rejected: {} }) },
  };
  const live = openLive(parts as never);
  using server = Bun.serve({ port: 0, fetch: (request) => live.view(request) });
  await using viewer = await view(`http://127.0.0.1:${server.port}`);
  const socket = connect(server.port!, "127.0.0.1");
  socket.write("GET /live HTTP/1.1\r\nhost: x\r\n\r\n");
  socket.pause();
  await until(() => live.viewers() === 2);
  await until(async () => {
    const read = viewer.messages.length + 50;
    for (let i = 0; i < 50; i++) await live.tick(); // less than the limit
    await until(() => viewer.messages.length >= read);
    return live.viewers() === 1;
  }, 30_000);
  const seen = viewer.messages.length;
  await live.tick();
  await until(() => viewer.messages.length > seen);
  socket.destroy();
  live.close();
  await viewer.end;
});
