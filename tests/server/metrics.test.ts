/** The metrics after all kinds of traffic and failures, and the alerting rules in deploy/. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { version } from "../../package.json";
import { openProxy } from "../support/network.ts";
import { testDatabase } from "../support/postgres.ts";
import { isInstalled, root, startApp, tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(30_000);

const NO_DATABASE = "postgres://daybook:x@127.0.0.1:1/daybook";
const hasPromtool = isInstalled("promtool");

/** Runs `promtool check` with these arguments, and returns its exit code and what it printed. */
function promtool(args: string[], stdin = "") {
  const check = Bun.spawnSync(["promtool", "check", ...args], { stdin: Buffer.from(stdin) });
  return { code: check.exitCode, output: check.stdout.toString() + check.stderr.toString() };
}

/** All samples, by name and labels. */
async function scrape(url: string): Promise<Record<string, number>> {
  const response = await fetch(`${url}/metrics`);
  expect(response.status).toBe(200);
  expect(response.headers.get("content-type")).toStartWith("text/plain; version=0.0.4");
  const samples = [...(await response.text()).matchAll(/^([a-z_]+(?:\{.*\})?) (\S+)$/gm)];
  return Object.fromEntries(samples.map(([, name, value]) => [name, Number(value)]));
}

/** Requests of all kinds; returns when everything is posted. */
async function causeTraffic(app: Awaited<ReturnType<typeof startApp>>): Promise<void> {
  for (const id of ["a", "a", "b"])
    expect((await app.post(event("ann", 1, { id }))).status).toBe(201);
  const bad = [
    ...['"name":"add"', '"value":"1"', '"userId":7', '"id":""'].map((field) =>
      line("ann").replace("}", `,${field}}`),
    ),
    ...["{\n", "[]\n", `${"x".repeat(70_000)}\n`],
  ];
  const lines = line("ann") + bad.join("") + line("ann", 2, { id: "b" }) + line("ann");
  expect(await (await app.postLines(lines)).json()).toMatchObject({ accepted: 3, rejected: 7 });
  for (const body of ["{", '{"userId":1,"name":"add_revenue","value":1}'])
    expect((await app.post(body)).status).toBeWithin(400, 423);
  const ask = async (path: string, init?: RequestInit) => {
    await (await fetch(app.url + path, init)).text();
  };
  await ask("/liveEvent", { method: "POST", headers: { authorization: "wrong" } });
  for (let i = 0; i < 50; i++) {
    await ask(`/nowhere/${i}`);
    await ask(`/userEvents/user${i}`);
    await ask("/liveEvent", { method: "PUT" });
  }
  await untilBalance(app, "ann", "4");
  await until(async () => {
    const found = await scrape(app.url);
    return found["daybook_events_posted_total"] === 4 && found["daybook_posting_lag_bytes"] === 0;
  });
}

test("after all kinds of traffic every metric is correct, and no label has an unbounded number of values", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await causeTraffic(app);
  const found = await scrape(app.url);
  expect(found).toMatchObject({
    daybook_events_accepted_total: 6,
    daybook_events_posted_total: 4,
    'daybook_events_quarantined_total{reason="conflict"}': 1,
    'daybook_events_quarantined_total{reason="invalid"}': 0,
    daybook_events_duplicate_total: 1,
    daybook_journal_writable: 1,
    daybook_database_up: 1,
    daybook_posting_lag_bytes: 0,
    daybook_posting_lag_seconds: 0,
    daybook_journal_frame_bytes_count: 4,
    'daybook_events_rejected_total{reason="json"}': 2,
    'daybook_events_rejected_total{reason="size"}': 1,
    'daybook_events_rejected_total{reason="event"}': 1,
    'daybook_events_rejected_total{reason="userId"}': 2,
    'daybook_events_rejected_total{reason="name"}': 1,
    'daybook_events_rejected_total{reason="value"}': 1,
    'daybook_events_rejected_total{reason="id"}': 1,
    'daybook_http_requests_total{method="POST",route="/liveEvent",status="401"}': 1,
    'daybook_http_requests_total{method="POST",route="/liveEvent",status="201"}': 3,
    'daybook_http_requests_total{method="GET",route="other",status="404"}': 50,
    'daybook_http_requests_total{method="PUT",route="/liveEvent",status="405"}': 50,
  });
  expect(found["daybook_journal_bytes"]).toBeGreaterThan(500);
  expect(found["process_resident_memory_bytes"]).toBeGreaterThan(1e7);
  expect(Object.keys(found).length).toBeLessThan(150);

  const text = await (await fetch(`${app.url}/metrics`)).text();
  expect(text).not.toMatch(/ann|user\d|nowhere/);
});

test.if(hasPromtool)("promtool accepts the metrics after all kinds of traffic", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await causeTraffic(app);
  const text = await (await fetch(`${app.url}/metrics`)).text();
  expect(promtool(["metrics"], text)).toEqual({ code: 0, output: "" });
});

// It mostly waits.
test.concurrent(
  "lag is reported in bytes and seconds, by /readyz too, and survives a restart",
  async () => {
    using dir = tempDir();
    await using database = await testDatabase();
    await using proxy = await openProxy(database.url);
    {
      await using app = await startApp({ dataDir: dir.path, databaseUrl: proxy.url });
      await until(async () => (await fetch(`${app.url}/readyz?reads`)).status === 200);
      proxy.cut();
      expect((await app.post(event("ann"))).status).toBe(201);
      const behind = await until(async () => {
        const found = await scrape(app.url);
        return found["daybook_posting_lag_seconds"]! > 1.5 && found;
      });
      expect(behind["daybook_posting_lag_bytes"]).toBeWithin(50, 300);
      expect(behind["daybook_database_up"]).toBe(0);
      expect((await fetch(`${app.url}/readyz?reads`)).status).toBe(503);
      app.kill("SIGTERM");
      await app.exit();
    }
    proxy.mend();
    const options = { dataDir: dir.path, databaseUrl: proxy.url };
    {
      await using app = await startApp({ ...options, args: ["--no-processor"] });
      const ready = (await (await fetch(`${app.url}/readyz?reads`)).json()) as Record<
        string,
        number
      >;
      expect(ready["lagSeconds"]).toBeWithin(1.5, 30);
      expect(ready["lagBytes"]).toBeGreaterThan(50);
      const found = await scrape(app.url);
      expect(found["daybook_posting_lag_seconds"]).toBeGreaterThanOrEqual(ready["lagSeconds"]!);
      app.kill("SIGTERM");
      await app.exit();
    }
    await using app = await startApp(options);
    const ready = () => fetch(`${app.url}/readyz?reads`).then((response) => response.json());
    await until(async () => ((await ready()) as { lagBytes?: number }).lagBytes === 0);
    expect(await ready()).toEqual({ status: "ready", reads: "ready", lagBytes: 0, lagSeconds: 0 });
    expect(await scrape(app.url)).toMatchObject({
      daybook_database_up: 1,
      daybook_posting_lag_bytes: 0,
      daybook_posting_lag_seconds: 0,
    });
  },
);

test.if(isInstalled("prlimit"))(
  "a full journal is reported as not writable until there is room",
  async () => {
    using dir = tempDir();
    await using app = await startApp({
      ...{ dataDir: dir.path, databaseUrl: NO_DATABASE },
      args: ["--no-processor"],
    });
    const limit = (bytes: string) =>
      Bun.spawnSync(["prlimit", `--pid=${app.pid}`, `--fsize=${bytes}:`]).exitCode;
    expect(limit("4000")).toBe(0);
    const send = async () => (await app.post(event("ann", 1, { note: "n".repeat(900) }))).status;
    await until(async () => (await send()) === 507);
    expect((await scrape(app.url))["daybook_journal_writable"]).toBe(0);
    limit("1000000");
    expect(await send()).toBe(201);
    expect((await scrape(app.url))["daybook_journal_writable"]).toBe(1);
  },
);

const ALERTS = join(root, "deploy", "alerts.yml");

test("the alerting rules in deploy/ use existing metrics", async () => {
  using dir = tempDir();
  await using app = await startApp({
    ...{ dataDir: dir.path, databaseUrl: NO_DATABASE },
    args: ["--no-processor"],
  });
  const names = new Set(Object.keys(await scrape(app.url)).map((name) => name.replace(/\{.*/, "")));
  const rules = readFileSync(ALERTS, "utf8");
  const used = [...rules.matchAll(/daybook_[a-z_]+/g)].map(([name]) => name);
  expect(used.length).toBeGreaterThanOrEqual(3);
  expect(used.filter((name) => !names.has(name))).toEqual([]);
});

test.if(hasPromtool)("promtool accepts the alerting rules in deploy/", () => {
  expect(promtool(["rules", ALERTS]).output).toContain("SUCCESS");
});

test("quarantine, memory, disk, duration and version are metrics of the server", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await causeTraffic(app);
  const found = await until(async () => {
    const found = await scrape(app.url);
    return found["daybook_quarantine_lines"] === 1 && found; // counted for the next scrape
  }, 20_000);
  expect(found["daybook_request_memory_bytes"]).toBe(0);
  expect(found["daybook_request_memory_limit_bytes"]).toBeGreaterThan(1e7);
  expect(found["daybook_disk_free_bytes"]).toBeGreaterThan(1e6);
  expect(found[`daybook_build_info{version="${version}",bun="${Bun.version}"}`]).toBe(1);
  const took = (name: string, more = "") =>
    found[`daybook_http_request_duration_seconds_${name}{route="/liveEvent"${more}}`];
  const answered = 6 + 50; // POST and PUT
  expect(took("count")).toBe(answered);
  expect(took("bucket", ',le="+Inf"')).toBe(answered);
  expect(took("bucket", ',le="0.005"')).toBeWithin(1, answered + 1);
  expect(took("sum")).toBeWithin(0.000_001, 60);
});

test("a processor without a server serves its metrics and probes on METRICS_PORT", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  await using proxy = await openProxy(ledger.url);
  await using processor = ledger.process([], { DATABASE_URL: proxy.url, METRICS_PORT: "0" });
  const url = await until(
    () => /metrics on (http:\S+)\/metrics/.exec(processor.stderr.text())?.[1],
  );
  for (const id of ["a", "a", "b"]) await app.post(event("ann", 1, { id }));
  await untilBalance(app, "ann", "2");
  const found = await until(async () => {
    const found = await scrape(url);
    return found["daybook_posting_lag_bytes"] === 0 && found;
  });
  expect(found).toMatchObject({
    daybook_events_posted_total: 2,
    daybook_events_duplicate_total: 1,
    daybook_posting_paused: 0,
    daybook_posting_lag_seconds: 0,
  });
  expect(found[`daybook_build_info{version="${version}",bun="${Bun.version}"}`]).toBe(1);
  const ask = async (path: string, init?: RequestInit) => {
    const answer = await fetch(url + path, init);
    return { status: answer.status, ...((await answer.json()) as { detail?: string }) };
  };
  expect(await ask("/healthz")).toMatchObject({ status: "ok", version });
  expect(await ask("/readyz")).toMatchObject({ status: "ready" });
  expect(await ask("/userEvents/ann")).toMatchObject({ status: 404 });
  expect(await ask("/nowhere", { method: "POST" })).toMatchObject({ status: 404 });
  for (const path of ["/healthz", "/readyz", "/metrics"]) {
    expect(await ask(path, { method: "POST" })).toMatchObject({ status: 405 });
    const refused = await fetch(url + path, { method: "DELETE" });
    expect(refused.headers.get("allow")).toBe("GET, HEAD");
    const head = await fetch(url + path, { method: "HEAD" });
    expect([head.status, await head.text()]).toEqual([200, ""]);
  }
  if (hasPromtool) {
    const text = await (await fetch(`${url}/metrics`)).text();
    expect(promtool(["metrics"], text)).toEqual({ code: 0, output: "" });
  }

  proxy.cut();
  await app.post(event("ann"));
  await until(async () => (await ask("/readyz")).detail?.startsWith("database: "));
  await until(async () => (await scrape(url))["daybook_posting_lag_seconds"]! > 0);
  proxy.mend();
  await untilBalance(app, "ann", "3");
  await until(async () => (await ask("/readyz")).detail === undefined);

  await using second = ledger.process([], { METRICS_PORT: new URL(url).port });
  expect(await second.exit()).toBe(3);
  expect(second.stderr.text()).toContain("the port is in use; set HOST or METRICS_PORT");
  processor.kill("SIGTERM");
  expect(await processor.exit()).toBe(0);
});
