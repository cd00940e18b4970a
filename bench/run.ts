/**
 * `bun run bench [--json FILE] [--large] [PART…]`: how fast Daybook is beside what one would use instead,
 * in one run on one machine. Each row and its reference are measured alternately, A B A B A B, and the
 * medians are compared. Every total is checked: a run with a wrong total has no figures. `--large` adds a
 * file of 2 GB, and tables that hold millions of users and ids. PART selects parts by the beginning of their
 * names: single, bulk, post, end, lag, viewers, ids, others, stream, known.
 */
import { closeSync, existsSync, mkdtempSync, openSync, rmSync, writeSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

import postgres from "postgres";

import { openTestCluster } from "../tests/support/cluster.ts";
import { openNats } from "../tests/support/nats.ts";

const EVENTS = 2_000_000;
const USERS = 100_000;
/** Of the same file, to make one of 1 GB. */
const BULK_COPIES = 9;
const ROUNDS = 3;
/** Of what differs by a few per cent. */
const PAIRS = 5;
const ID_EVENTS = 400_000;
/** Of one's own, as in use: for the default secret, the headers of each request are searched for a proxy. */
const SECRET = "a-secret-of-the-benchmark";
process.env["AUTH_SECRET"] = SECRET; // for the programs
const root = join(import.meta.dir, "..");

const { values: options, positionals: parts } = parseArgs({
  options: { json: { type: "string" }, large: { type: "boolean" } },
  allowPositionals: true,
});
const wants = (part: string) => parts.length === 0 || parts.some((begin) => part.startsWith(begin));
const folder = mkdtempSync(join(tmpdir(), "daybook-bench-"));
const cluster = await openTestCluster(join(folder, "postgres"));
const rows: { row: string; ratio: number | null; figures: string }[] = [];
const peaks = new Map<string, number>();

try {
  await bench();
} finally {
  await cluster.close();
  rmSync(folder, { recursive: true, force: true });
}

async function bench() {
  const startedMs = performance.now();
  if (!existsSync(join(root, "bench/node_modules")))
    await run(["bun", "install"], { cwd: join(root, "bench") });
  const file = join(folder, "events.jsonl");
  const total = writeEvents(file, EVENTS, (random) => Math.floor(random() * USERS));

  if (wants("single")) await single();
  if (wants("bulk")) await bulk(file);
  const postMs =
    wants("post") || wants("end") || wants("others") ? await post(file, total) : Number.NaN;
  if (wants("end")) await endToEnd(file, total, await sending(file), postMs);
  if (wants("lag")) await lag();
  if (wants("viewers")) await viewers();
  if (wants("ids")) await ids();
  if (wants("others")) await others(postMs);
  if (wants("stream")) await stream(file);
  if (options.large && wants("large")) await large();
  if (options.large && wants("known")) await known();
  for (const [name, bytes] of peaks)
    add(`memory: ${name}`, null, `at most ${Math.round(bytes / 1e6)} MB`);

  const width = Math.max(...rows.map(({ row }) => row.length));
  console.log(`\n${"row".padEnd(width)}   ratio   figures (medians of ${ROUNDS})`);
  for (const { row, ratio, figures } of rows)
    console.log(`${row.padEnd(width)}  ${(ratio?.toFixed(2) ?? "").padStart(6)}   ${figures}`);
  console.log(`${((performance.now() - startedMs) / 1000).toFixed(0)} s`);
  if (options.json) await Bun.write(options.json, `${JSON.stringify(rows, null, 2)}\n`);
}

/** Durable POST /liveEvent on 64 connections. */
async function single() {
  const ours: Load[] = [];
  const bare: Load[] = [];
  const posting: Load[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await using database = await openDatabase();
    await using server = await serve(database.url, "--no-processor");
    ours.push(await load(server.url));
    notePeak("server", server.pid);
    {
      await using whole = await serve(database.url);
      posting.push(await load(whole.url));
    }
    await using reference = await serveBare();
    bare.push(await load(reference.url));
  }
  const rate = median(ours.map(({ rate }) => rate));
  const bareRate = median(bare.map(({ rate }) => rate));
  const p99Ms = median(ours.map(({ p99Ms }) => p99Ms));
  const bareP99Ms = median(bare.map(({ p99Ms }) => p99Ms));
  add("single / bare server", rate / bareRate, `${many(rate)} vs. ${many(bareRate)} requests/s`);
  const p99s = `${p99Ms.toFixed(2)} vs. ${bareP99Ms.toFixed(2)} ms (less is better)`;
  add("single p99 / bare server's", p99Ms / bareP99Ms, p99s);
  const postingRate = median(posting.map(({ rate }) => rate));
  const rates = `${many(postingRate)} vs. ${many(rate)} requests/s`;
  add("single with the processor / without", postingRate / rate, rates);
}

/** What 200 viewers of the page cost "single": pairs on one server, with them and without. */
async function viewers() {
  const ratios: number[] = [];
  await using database = await openDatabase();
  await using server = await serve(database.url, "--no-processor");
  for (let pair = 0; pair < PAIRS; pair++) {
    const rates = { with: 0, without: 0 };
    for (const kind of pair % 2 ? (["with", "without"] as const) : (["without", "with"] as const)) {
      const hangUp = new AbortController();
      const view = async () => {
        const { body } = await fetch(`${server.url}/live`, { signal: hangUp.signal });
        body?.pipeTo(new WritableStream()).catch(() => {}); // hung up
      };
      if (kind === "with") await Promise.all(Array.from({ length: 200 }, view));
      rates[kind] = (await load(server.url)).rate;
      hangUp.abort();
    }
    ratios.push(rates.with / rates.without);
  }
  const shown = ratios.map((ratio) => ratio.toFixed(3)).join(", ");
  add("single with 200 viewers / without", median(ratios), `${PAIRS} pairs: ${shown}`);
}

/** client.ts until the last 201; a sender and a server that only write and sync. Their starts do not count. */
async function bulk(part: string) {
  const file = join(folder, "bulk.jsonl");
  const copies = Array.from({ length: BULK_COPIES }, () => part);
  await run(["sh", "-c", 'cat "$@" >"$0"', file, ...copies]);
  const events = BULK_COPIES * EVENTS;
  const ours: number[] = [];
  const bare: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await using database = await openDatabase();
    {
      await using server = await serve(database.url, "--no-processor");
      const env = { SERVER_URL: server.url };
      const sent = await run(["bun", "run", "client.ts", file], { env, peak: "client" });
      ours.push(Number(/(\d+) events\/s/.exec(sent)?.[1]));
      notePeak("server", server.pid);
    }
    await using reference = await serveBare();
    const ms = Number(await run(["bun", "bench/bare.ts", "send", reference.url, file]));
    bare.push(events / (ms / 1000));
  }
  rmSync(file);
  const [slowest, fastest] = [Math.min(...bare), Math.max(...bare)].map(many);
  const figures = `${many(median(ours))} vs. ${many(median(bare))} (${slowest} to ${fastest}) events/s`;
  add("bulk / bare writer", median(ours) / median(bare), figures);
}

/** client.ts until the last 201, from process start. */
async function sending(file: string): Promise<number> {
  const times: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await using database = await openDatabase();
    await using server = await serve(database.url, "--no-processor");
    times.push(await client(file, server.url));
  }
  return median(times);
}

/** processor.ts FILE, from process start to exit; COPY and SQL; DuckDB and one upsert. */
async function post(file: string, total: string): Promise<number> {
  const ours: number[] = [];
  const psql: number[] = [];
  const duckdb: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    ours.push(await posting(file, total));
    if (Bun.which("psql")) psql.push(await copying(file, total));
    await using database = await openDatabase();
    duckdb.push(
      await timed(["bun", "bench/duckdb.ts", file], { env: { DATABASE_URL: database.url } }),
    );
    await database.check(total);
  }
  const rates = [ours, psql, duckdb].map((times) => many(EVENTS / (median(times) / 1000)));
  const beside = (index: number) => `${rates[0]} vs. ${rates[index]} events/s`;
  if (psql.length > 0) add("post / COPY and SQL", median(psql) / median(ours), beside(1));
  else add("post / COPY and SQL", null, "not measured: psql is not installed");
  add("post / DuckDB", median(duckdb) / median(ours), beside(2));
  return median(ours);
}

/** Client, server and processor together, until everything is in the ledger. */
async function endToEnd(file: string, total: string, bulkMs: number, postMs: number) {
  const times: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await using database = await openDatabase();
    await using server = await serve(database.url);
    times.push(await client(file, server.url, "--wait"));
    notePeak("server with processor", server.pid);
    await database.check(total);
  }
  const ms = median(times);
  const slower = Math.max(bulkMs, postMs);
  const legs = `${seconds(ms)} vs. ${seconds(bulkMs)} and ${seconds(postMs)}`;
  add("end to end / the slower leg", ms / slower, `${legs} s (less is better)`);
  add("end to end / both legs", ms / (bulkMs + postMs), "(less is better)");
}

/** At 10,000 events a second: the time from the 201 until GET answers with the event. */
async function lag() {
  await using database = await openDatabase();
  await using server = await serve(database.url);
  add("lag at 10,000 events/s", null, await measureLag(server));
}

async function measureLag(server: { url: string }): Promise<string> {
  const headers = { authorization: SECRET, "content-type": "application/x-ndjson" };
  const lags: number[] = [];
  const startedMs = performance.now();
  const send = async (n: number) => {
    const body = Array.from({ length: 100 }, (_, i) => line(`user${(n * 100 + i) % 5_000}`, 100));
    const request = { method: "POST", headers, body: body.join("") };
    const accepted = await fetch(`${server.url}/liveEvents`, request);
    const { position } = (await accepted.json()) as { position: string };
    const answeredMs = performance.now();
    const user = `user${(n * 100) % 5_000}`;
    const balance = await fetch(`${server.url}/userEvents/${user}?after=${position}`);
    if (balance.status !== 200) throw new Error(`GET answered ${balance.status}`);
    await balance.arrayBuffer();
    if (n > 100) lags.push(performance.now() - answeredMs);
  };
  const sending: Promise<void>[] = [];
  for (let n = 0; n < 800; n++) {
    await Bun.sleep(Math.max(0, startedMs + n * 10 - performance.now()));
    sending.push(send(n));
  }
  await Promise.all(sending);
  const sorted = lags.toSorted((a, b) => a - b);
  const at = (part: number) => (sorted[Math.floor(sorted.length * part)] ?? 0).toFixed(0);
  return `p50 ${at(0.5)} ms, p99 ${at(0.99)} ms`;
}

/** The journal in a stream of three nodes on this machine, beside one on its disk. */
async function stream(file: string) {
  if (!Bun.which("nats-server"))
    return console.log("nats-server is not installed: the rows of the stream are left out");
  await using nats = await openNats();
  let streams = 0;
  const newStream = () => ({ JOURNAL_URL: nats.url(`bench${++streams}`) });
  for (const connections of [64, 256]) {
    const local: Load[] = [];
    const there: Load[] = [];
    for (let round = 0; round < ROUNDS; round++) {
      await using database = await openDatabase();
      for (const [loads, env] of [
        [local, {}],
        [there, newStream()],
      ] as const) {
        await using server = await serveWith(env, database.url, "--no-processor");
        loads.push(await load(server.url, connections));
      }
    }
    const rates = [there, local].map((loads) => median(loads.map(({ rate }) => rate)));
    const p99s = [there, local].map((loads) => median(loads.map(({ p99Ms }) => p99Ms)).toFixed(1));
    const figures = `${rates.map(many).join(" vs. ")} requests/s, p99 ${p99s.join(" vs. ")} ms`;
    add(`stream / disk: single on ${connections} connections`, rates[0]! / rates[1]!, figures);
  }
  await using database = await openDatabase();
  {
    const env = newStream();
    await using one = await serveWith(env, database.url, "--no-processor");
    await using two = await serveWith(env, database.url, "--no-processor");
    const loads = await Promise.all([load(one.url, 128), load(two.url, 128)]);
    const rate = loads.reduce((sum, { rate }) => sum + rate, 0);
    add("stream: single on two servers, 128 each", null, `${many(rate)} requests/s`);
  }
  const times = { local: [] as number[], there: [] as number[] };
  for (let round = 0; round < ROUNDS; round++) {
    await using local = await serve(database.url, "--no-processor");
    times.local.push(await client(file, local.url, "--again"));
    await using there = await serveWith(newStream(), database.url, "--no-processor");
    times.there.push(await client(file, there.url, "--again"));
  }
  const [there, local] = [median(times.there), median(times.local)];
  const figures = [there, local].map((ms) => many(EVENTS / (ms / 1000))).join(" vs. ");
  add("stream / disk: bulk", local / there, `${figures} events/s`);
  await using fresh = await openDatabase();
  await using server = await serveWith(newStream(), fresh.url);
  add("stream: lag at 10,000 events/s", null, await measureLag(server));
  notePeak("server with processor, on a stream", server.pid);
}

/** "post" with other users and events: a single user, only new users, and an id on every event. */
async function others(postMs: number) {
  const events = EVENTS / 4;
  const eventsPerMs = EVENTS / postMs;
  const shapes: [string, ChooseUser, ChooseId?][] = [
    ["one hot user", () => 0],
    ["all users new", (_, i) => i],
    ["ids on every event", userOf(USERS), (i) => `event-${i}`],
  ];
  for (const [what, user, id] of shapes) {
    const file = join(folder, `${what}.jsonl`);
    const total = writeEvents(file, events, user, id);
    const times: number[] = [];
    for (let round = 0; round < ROUNDS; round++) times.push(await posting(file, total));
    const rate = events / median(times);
    add(`${what} / post`, rate / eventsPerMs, `${many(rate * 1000)} events/s`);
    rmSync(file);
  }
}

/** A random id on every event, all of them fresh, or 1 of 10,000 known; COPY and SQL. */
async function ids() {
  const file = join(folder, "ids.jsonl");
  const total = writeEvents(file, ID_EVENTS, userOf(50_000), randomId);
  const repeated = join(folder, "repeated.jsonl");
  const repeatedTotal = writeEvents(repeated, ID_EVENTS, userOf(50_000), randomId, true);
  const times: number[][] = [[], [], []];
  for (let round = 0; round < ROUNDS; round++) {
    times[0]?.push(await posting(file, total));
    if (Bun.which("psql")) times[1]?.push(await copying(file, total, true));
    times[2]?.push(await posting(repeated, repeatedTotal));
  }
  const [ours = 0, sql = 0, late = 0] = times.map(median);
  const rate = (ms: number) => many(ID_EVENTS / (ms / 1000));
  add("fresh ids / COPY and SQL", sql / ours, `${rate(ours)} vs. ${rate(sql)} events/s`);
  add("1 of 10,000 ids repeated / fresh ids", ours / late, `${rate(late)} events/s`);
}

/** Posting to tables that hold millions of users or ids already. */
async function known() {
  const shapes: [string, string, ChooseId?][] = [
    [
      "users",
      `alter table users_revenue drop constraint users_revenue_pkey;
       insert into users_revenue select 'user' || i, 0 from generate_series(0, $1::int - 1) i;
       set maintenance_work_mem = '512MB';
       alter table users_revenue add primary key (user_id)`,
    ],
    [
      "ascending ids",
      seedIds("convert_to('order-' || lpad(i::text, 12, '0'), 'UTF8')"),
      ascendingId,
    ],
    ["random ids", seedIds("'\\xff'::bytea || uuid_send(gen_random_uuid())"), randomId],
  ];
  for (const millions of [1, 10, 50])
    for (const [what, seed, id] of shapes) {
      const file = join(folder, "known.jsonl");
      const users = id ? 50_000 : millions * 1e6;
      const total = writeEvents(
        file,
        ID_EVENTS,
        userOf(users),
        id && ((i) => id(i + millions * 1e6)),
      );
      await using database = await openDatabase();
      await database.run(seed.replaceAll("$1", `${millions * 1e6}`));
      for (const statement of ["vacuum analyze", "checkpoint"]) await database.run(statement);
      const [before] = await database.run("select pg_current_wal_lsn() as lsn");
      const env = { DATABASE_URL: database.url, DATA_DIR: join(folder, "data") };
      const ms = await timed(["bun", "run", "processor.ts", file], { env });
      await database.check(total);
      const [after] = await database.run(`
        select (pg_wal_lsn_diff(pg_current_wal_lsn(), '${before?.["lsn"]}') / 1e6)::int as wal,
          pg_total_relation_size('ids') / greatest((select count(*) from ids), 1) as bytes`);
      const size = id ? `, ${after?.["bytes"]} bytes an id` : "";
      const figures = `${many(ID_EVENTS / (ms / 1000))} events/s, ${after?.["wal"]} MB of WAL${size}`;
      add(`${millions} M ${what} known`, null, figures);
    }
}

function seedIds(key: string): string {
  return `
    alter table ids drop constraint ids_pkey;
    insert into ids (id, event, day)
    select ${key}, gen_random_uuid(), daybook_day(current_date) from generate_series(0, $1 - 1) i;
    set maintenance_work_mem = '512MB';
    alter table ids add primary key (id)`;
}

async function large() {
  const file = join(folder, "large.jsonl");
  const total = writeEvents(file, 33_000_000, (random) => Math.floor(random() * USERS));
  await using database = await openDatabase();
  await using server = await serve(database.url);
  const ms = await client(file, server.url, "--wait");
  notePeak("server with processor, 2 GB", server.pid);
  await database.check(total);
  add("end to end, 2 GB", null, `${seconds(ms)} s`);
  await posting(file, total, "processor, 2 GB");
  rmSync(file);
}

/** Sends a file; returns how long that took. */
async function client(file: string, url: string, ...args: string[]): Promise<number> {
  const env = { SERVER_URL: url };
  return timed(["bun", "run", "client.ts", file, ...args], { env, peak: "client" });
}

async function posting(file: string, total: string, peak = "processor"): Promise<number> {
  await using database = await openDatabase();
  const env = { DATABASE_URL: database.url, DATA_DIR: join(folder, "data") };
  const ms = await timed(["bun", "run", "processor.ts", file], { env, peak });
  await database.check(total);
  return ms;
}

async function copying(file: string, total: string, hasIds = false): Promise<number> {
  await using database = await openDatabase();
  const counted = hasIds ? "fresh" : "events";
  const claims = `create table claims (id text primary key);
    create temp table fresh (event jsonb);
    with claimed as (
      insert into claims select event->>'id' from events on conflict do nothing returning id
    )
    insert into fresh select event from events join claimed on claimed.id = event->>'id';`;
  const script = `
    create temp table events (event jsonb);
    \\copy events from '${file}' with (format csv, quote e'\\x01', delimiter e'\\x02')
    ${hasIds ? claims : ""}
    insert into users_revenue as balance (user_id, revenue)
    select event->>'userId', sum(case event->>'name' when 'add_revenue' then 1 else -1 end
      * (event->>'value')::numeric)
    from ${counted} group by 1
    on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue;`;
  const path = join(folder, "copy.sql");
  await Bun.write(path, script);
  const ms = await timed(["psql", "-q", "-v", "ON_ERROR_STOP=1", "-f", path, database.url]);
  await database.check(total);
  return ms;
}

interface Load {
  rate: number;
  p99Ms: number;
}

/** Uses wrk where it is installed, else senders in this process, which are slower. */
async function load(url: string, connections = 64): Promise<Load> {
  const script = join(folder, "post.lua");
  await Bun.write(
    script,
    `wrk.method = "POST"
     wrk.body = '{"userId":"user1","name":"add_revenue","value":98}'
     wrk.headers["Authorization"] = "${SECRET}"
     wrk.headers["Content-Type"] = "application/json"`,
  );
  if (!Bun.which("wrk")) return loadByFetch(url, connections);
  const text = await run([
    "wrk",
    "-c",
    `${connections}`,
    "-t",
    "2",
    "-d",
    "5s",
    "--latency",
    "-s",
    script,
    `${url}/liveEvent`,
  ]);
  if (text.includes("Non-2xx")) throw new Error(text);
  const [, latency = "0", unit] = /99%\s+([\d.]+)(us|ms|s)/.exec(text) ?? [];
  const [, rate = "0"] = /Requests\/sec:\s+([\d.]+)/.exec(text) ?? [];
  return { rate: +rate, p99Ms: +latency * (unit === "us" ? 0.001 : unit === "s" ? 1000 : 1) };
}

async function loadByFetch(url: string, connections: number): Promise<Load> {
  const latencies: number[] = [];
  const endMs = performance.now() + 5_000;
  const headers = { authorization: SECRET, "content-type": "application/json" };
  const sender = async () => {
    while (performance.now() < endMs) {
      const sentMs = performance.now();
      const body = line("user1", 9_800).trim();
      const { status } = await fetch(`${url}/liveEvent`, { method: "POST", headers, body });
      if (status !== 201) throw new Error(`answered ${status}`);
      latencies.push(performance.now() - sentMs);
    }
  };
  await Promise.all(Array.from({ length: connections }, sender));
  const sorted = latencies.toSorted((a, b) => a - b);
  return { rate: sorted.length / 5, p99Ms: sorted[Math.floor(sorted.length * 0.99)] ?? 0 };
}

/** An empty ledger. */
async function openDatabase() {
  const admin = postgres(cluster.url(), { max: 1, onnotice: () => {} });
  const name = `bench_${crypto.randomUUID().replaceAll("-", "")}`;
  await admin.unsafe(`create database ${name}`);
  const url = new URL(cluster.url());
  url.pathname = `/${name}`;
  const sql = postgres(url.href, { max: 1, onnotice: () => {} });
  await sql.unsafe(await Bun.file(join(root, "schema.sql")).text());
  return {
    url: url.href,
    run: (statements: string) =>
      sql
        .unsafe(statements)
        .then(
          (all) => (all.at(-1) instanceof Array ? all.at(-1) : all) as Record<string, unknown>[],
        ),
    async check(total: string) {
      const [row] = await sql`select trim_scale(sum(revenue))::text as total from users_revenue`;
      if (row?.["total"] !== total)
        throw new Error(`the balances add up to ${row?.["total"]}, expected ${total}`);
    },
    async [Symbol.asyncDispose]() {
      await sql.end();
      await admin.unsafe(`drop database ${name} with (force)`);
      // Otherwise the pages that this row wrote would be flushed in the middle of the next one.
      await admin.unsafe("checkpoint");
      await admin.end();
    },
  };
}

/** app.ts with an empty journal. */
function serve(databaseUrl: string, ...args: string[]) {
  return serveWith({}, databaseUrl, ...args);
}

function serveWith(more: Record<string, string>, databaseUrl: string, ...args: string[]) {
  const dataDir = mkdtempSync(join(folder, "data-"));
  const env = { PORT: "0", DATA_DIR: dataDir, DATABASE_URL: databaseUrl, ...more };
  return startServer(["bun", "run", "app.ts", ...args], dataDir, env);
}

function serveBare() {
  const directory = mkdtempSync(join(folder, "bare-"));
  return startServer(["bun", "bench/bare.ts", "serve", directory], directory);
}

/**
 * Starts a server and waits for its URL. Its log goes to a file, which is shown if it ends by itself. What it wrote
 * into `directory` is removed at its end: 1 GB in each round of "bulk".
 */
async function startServer(command: string[], directory: string, env: Record<string, string> = {}) {
  const logPath = join(mkdtempSync(join(folder, "log-")), "stderr");
  const child = Bun.spawn(command, {
    cwd: root,
    env: { ...process.env, ...env },
    stdio: ["ignore", "pipe", Bun.file(logPath)],
  });
  let stdout = "";
  for await (const chunk of child.stdout) {
    stdout += new TextDecoder().decode(chunk);
    if (stdout.includes("\n")) break;
  }
  const ended = async () => {
    const code = await child.exited;
    const log = await Bun.file(logPath).text();
    return new Error(`${command.join(" ")} ended with exit code ${code}:\n${log}`);
  };
  const [url] = /http:\S+/.exec(stdout) ?? [];
  if (!url) throw await ended();
  return {
    url,
    pid: child.pid,
    async [Symbol.asyncDispose]() {
      if (child.exitCode !== null || child.signalCode !== null) throw await ended();
      child.kill();
      await child.exited;
      rmSync(directory, { recursive: true });
    },
  };
}

interface Command {
  env?: Record<string, string>;
  cwd?: string;
  /** Notes the memory peak of the process under this name. */
  peak?: string | undefined;
}

/** Runs a command; returns the milliseconds from its start to its exit. */
async function timed(command: string[], options: Command = {}): Promise<number> {
  const startedMs = performance.now();
  await run(command, options);
  return performance.now() - startedMs;
}

/** Runs a command; returns what it printed. Throws with its output if it fails. */
async function run(command: string[], { env, cwd = root, peak }: Command = {}): Promise<string> {
  const child = Bun.spawn(command, {
    cwd,
    env: { ...process.env, ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  if ((await child.exited) !== 0) throw new Error(`${command.join(" ")}: ${stdout}${stderr}`);
  if (peak) keepPeak(peak, child.resourceUsage()?.maxRSS ?? 0);
  return stdout;
}

/** Notes the highest resident memory of a running process. */
function notePeak(name: string, pid: number): void {
  const status = new TextDecoder().decode(Bun.spawnSync(["cat", `/proc/${pid}/status`]).stdout);
  keepPeak(name, Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0) * 1024);
}

function keepPeak(name: string, bytes: number): void {
  peaks.set(name, Math.max(peaks.get(name) ?? 0, bytes));
}

/** The user of event `index`. */
type ChooseUser = (random: () => number, index: number) => number;
type ChooseId = (index: number) => string;

function userOf(users: number): ChooseUser {
  return (random) => Math.floor(random() * users);
}

function ascendingId(i: number): string {
  return `order-${`${i}`.padStart(12, "0")}`;
}

/** A UUIDv4, the same for the same index. */
function randomId(i: number): string {
  const hex = Bun.CryptoHasher.hash("sha256", `id ${i}`, "hex");
  return `${hex.slice(0, 8)}-${hex.slice(8, 12)}-4${hex.slice(12, 15)}-8${hex.slice(15, 18)}-${hex.slice(18, 30)}`;
}

/**
 * Writes `events` events; returns the sum of their balances. With `repeats`, one of 10,000 is one that came
 * 30,000 before.
 */
function writeEvents(
  path: string,
  events: number,
  user: ChooseUser,
  id?: ChooseId,
  repeats = false,
): string {
  const kept: string[] = [];
  let state = 1;
  const random = () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
  const fd = openSync(path, "w");
  let cents = 0;
  let text = "";
  for (let i = 0; i < events; i++) {
    const value = Math.floor(random() * 100_000);
    const change = random() < 0.6 ? value : -value;
    const written = line(`user${user(random, i)}`, change, id?.(i));
    if (i % 10_000 === 0) kept.push(written);
    const again = repeats && i % 10_000 === 9_999 ? kept.at(-4) : undefined;
    if (!again) cents += change;
    text += again ?? written;
    if (text.length > 1 << 20) {
      writeSync(fd, text);
      text = "";
    }
  }
  writeSync(fd, text);
  closeSync(fd);
  return `${cents / 100}`;
}

/** The event that changes a balance by `cents`. */
function line(userId: string, cents: number, id?: string): string {
  const name = cents < 0 ? "subtract_revenue" : "add_revenue";
  return `${JSON.stringify({ userId, name, value: Math.abs(cents) / 100, id })}\n`;
}

function add(row: string, ratio: number | null, figures: string): void {
  rows.push({ row, ratio, figures });
  console.log(`${row}: ${ratio === null ? "" : `${ratio.toFixed(2)}; `}${figures}`);
}

function median(numbers: number[]): number {
  return numbers.toSorted((a, b) => a - b)[Math.floor(numbers.length / 2)] ?? Number.NaN;
}

function many(rate: number): string {
  return Math.round(rate).toLocaleString("en");
}

function seconds(ms: number): string {
  return (ms / 1000).toFixed(2);
}
