/**
 * What tests share: a database for each who asks, real processes, folders that vanish. Everything
 * is disposable (`await using`), and nothing is left behind.
 *
 * The databases lie in the Postgres at DATABASE_URL, or else in a private one of this run, that the
 * first test who needs it starts, and the last one stops.
 */
import { afterAll } from "bun:test";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createServer as createHttpServer, type IncomingMessage } from "node:http";
import { connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

import postgres from "postgres";

import { type Cluster, openCluster } from "../lib/cluster.ts";

const root = join(import.meta.dir, "..");
export const SECRET = "secret";
/** More than 1 in a long run: what takes time is done more often then. */
export const FAULT_ROUNDS = Number(process.env["FAULT_ROUNDS"] ?? 1);
export const IS_LONG = FAULT_ROUNDS > 1;

let cluster: Promise<Cluster> | null = null;
/** Makes and drops databases: a connection costs half as much as a database. */
let admin: ReturnType<typeof connectTest> | null = null;

/**
 * One Postgres for all files of a run, whichever process they are in: to make one takes as much
 * processor time as to start a server four times, and there are 35 files.
 */
function openTestCluster(): Promise<Cluster> {
  const runPid = process.env["BUN_TEST_WORKER_ID"] ? process.ppid : process.pid;
  const dir = join(tmpdir(), `daybook-test-run-${runPid}`);
  if (!existsSync(dir)) removeAfter(runPid, dir);
  return openCluster(join(dir, "postgres"), () => {});
}

/** Only when the run is over is it known that no file needs it any more. */
function removeAfter(pid: number, dir: string): void {
  // In the background of a shell that has ended: Bun ends the children that a test file leaves.
  // Ten looks a second took 3 % of the processor time of a run.
  const waiting = '(while kill -0 "$0"; do sleep 1; done; until rm -rf "$1"; do sleep 0.1; done) &';
  Bun.spawnSync(["sh", "-c", waiting, `${pid}`, dir], {
    ...{ cwd: "/", detached: true },
    stdio: ["ignore", "ignore", "ignore"],
  });
}

afterAll(async () => {
  try {
    await Promise.all(readers.values().map((sql) => sql.end({ timeout: 1 })));
    for (const name of made) await admin?.unsafe(`drop database if exists ${name} with (force)`);
    await admin?.end({ timeout: 1 });
  } finally {
    await (await cluster?.catch(() => null))?.close();
    readers.clear();
    made.clear();
    idle.length = 0;
    admin = cluster = null;
  }
});

async function adminUrl(): Promise<string> {
  if (process.env["DATABASE_URL"]) return process.env["DATABASE_URL"];
  return (await (cluster ??= openTestCluster())).url();
}

/** The databases of this file. */
const made = new Set<string>();
/** Those of them that no test has at the moment, empty: to make one takes seven times as long. */
const idle: string[] = [];

/** An empty database of its own. */
export async function testDatabase() {
  const url = new URL(await adminUrl());
  admin ??= connectTest(url.href);
  let name = idle.pop();
  if (!name) {
    name = `daybook_test_${crypto.randomUUID().replaceAll("-", "")}`;
    made.add(name);
    await admin.unsafe(`create database ${name}`);
  }
  url.pathname = `/${name}`;
  const drop = async () => {
    const sql = reader(url.href);
    await sql`
      select pg_terminate_backend(pid, 5000) from pg_stat_activity
      where datname = ${name} and pid <> pg_backend_pid()`;
    await sql`select pg_stat_reset()`; // deadlocks are counted
    await sql.unsafe("drop schema public cascade; create schema public");
    idle.push(name);
  };
  return { url: url.href, name, drop, [Symbol.asyncDispose]: drop };
}

/** A connection of the test's own. */
export function connectTest(url: string, max = 1) {
  const sql = postgres(url, { max, fetch_types: false, onnotice: () => {} });
  return Object.assign(sql, { [Symbol.asyncDispose]: () => sql.end({ timeout: 1 }) });
}

/** Who reads balances does so again and again: with a connection for each look, the looks cost most. */
const readers = new Map<string, ReturnType<typeof connectTest>>();

function reader(url: string) {
  const sql = readers.get(url) ?? connectTest(url);
  readers.set(url, sql);
  return sql;
}

/** All balances, as exact decimals. */
export async function balances(url: string): Promise<Record<string, string>> {
  const rows = await reader(url)<{ user_id: string; revenue: string }[]>`
    select user_id, trim_scale(revenue)::text as revenue from users_revenue order by user_id`;
  return Object.fromEntries(rows.map(({ user_id, revenue }) => [user_id, revenue]));
}

export function tempDir() {
  const path = mkdtempSync(join(tmpdir(), "daybook-test-"));
  const remove = () => rmSync(path, { recursive: true, force: true });
  return { path, file: (name: string) => join(path, name), [Symbol.dispose]: remove };
}

interface Run {
  args?: string[];
  env?: Record<string, string>;
  cwd?: string;
  stdin?: string;
  /** Where the programs are, when it is not these. */
  home?: string;
}

/** Starts one of the programs; killed, if it still runs, when the test is over. */
export function spawn(program: string, options: Run = {}) {
  const { args = [], env = {}, home = root, cwd = home, stdin } = options;
  const child = Bun.spawn([process.execPath, "run", join(home, program), ...args], {
    cwd,
    env: { ...process.env, PORT: "0", DATABASE_URL: "", AUTH_SECRET: SECRET, ...env },
    stdio: [stdin === undefined ? "ignore" : Buffer.from(stdin), "pipe", "pipe"],
  });
  const stderr = collect(child.stderr);
  const stdout = collect(child.stdout);
  return {
    pid: child.pid,
    child,
    stdout,
    stderr,
    kill: (signal: NodeJS.Signals = "SIGKILL") => child.kill(signal),
    /** The exit code, `null` when it was killed. */
    async exit() {
      await child.exited;
      await Promise.all([stdout.end, stderr.end]);
      return child.exitCode;
    },
    async [Symbol.asyncDispose]() {
      if (child.exitCode === null) child.kill("SIGTERM");
      const timer = setTimeout(() => child.kill("SIGKILL"), 8_000);
      await child.exited;
      clearTimeout(timer);
    },
  };
}

/** Runs one of the programs to its end. */
export async function run(program: string, options: Run = {}) {
  await using process = spawn(program, options);
  const code = await process.exit();
  return { code, stdout: process.stdout.text(), stderr: process.stderr.text() };
}

type AppOptions = Run & { dataDir: string; databaseUrl?: string };

/** Starts `app.ts` and returns when it listens. */
export async function startApp(options: AppOptions): ReturnType<typeof startOnce> {
  for (let tries = 50; ; tries--) {
    try {
      return await startOnce(options);
    } catch (error) {
      // A port that was left a moment ago may be that of another test's connection.
      if (tries === 0 || !/in use/.test((error as Error).message)) throw error;
      await Bun.sleep(100);
    }
  }
}

async function startOnce(options: AppOptions) {
  const { dataDir, databaseUrl = "", env = {} } = options;
  const process = spawn("app.ts", {
    ...options,
    env: { DATA_DIR: dataDir, DATABASE_URL: databaseUrl, ...env },
  });
  const url = await until(() => {
    const line = /^listening on (.*)$/m.exec(process.stdout.text());
    if (!line && process.child.exitCode !== null)
      throw new Error(`app.ts ended with ${process.child.exitCode}: ${process.stderr.text()}`);
    return line?.[1];
  }, 60_000);
  const send = (path: string, type: string, body: string | Uint8Array<ArrayBuffer>, headers = {}) =>
    fetch(url + path, {
      method: "POST",
      headers: { authorization: SECRET, "content-type": type, ...headers },
      body,
    });
  return {
    ...process,
    url,
    /** POST /liveEvent */
    post: (event: unknown) =>
      send(
        "/liveEvent",
        "application/json",
        typeof event === "string" ? event : JSON.stringify(event),
      ),
    /** POST /liveEvents */
    postLines: (lines: string | Uint8Array<ArrayBuffer>, headers = {}) =>
      send("/liveEvents", "application/x-ndjson", lines, headers),
    /** The balance that GET answers, `null` for 404. */
    async balance(userId: string): Promise<string | null> {
      const response = await fetch(`${url}/userEvents/${encodeURIComponent(userId)}`);
      if (response.status === 404) return null;
      if (response.status !== 200) throw new Error(`GET answered ${response.status}`);
      return ((await response.json()) as { revenue: string }).revenue;
    },
  };
}

/** What a program that stays has said: the messages of its log, each after its level. */
export function messages(stderr: string): string[] {
  const lines = stderr.split("\n").filter((line) => line !== "");
  return lines.map((line) => {
    const { level, msg } = JSON.parse(line) as { level: string; msg: string };
    return `${level}: ${msg}`;
  });
}

/** A way to the Postgres at `url` that can be cut and mended. */
export async function openProxy(url: string) {
  const target = new URL(url);
  const open = new Set<Socket>();
  let isCut = false;
  let refused = 0;
  const server = createServer((client) => {
    if (isCut) {
      refused++;
      client.destroy();
      return;
    }
    const postgres = connect(Number(target.port || 5432), target.hostname);
    for (const [from, to] of [
      [client, postgres],
      [postgres, client],
    ] as const) {
      open.add(from);
      from.on("error", () => {}).on("close", () => (open.delete(from), to.destroy()));
      from.pipe(to);
    }
  });
  const cut = () => {
    isCut = true;
    for (const socket of open) socket.destroy();
  };
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const via = new URL(url);
  via.host = `127.0.0.1:${(server.address() as { port: number }).port}`;
  return {
    url: via.href,
    cut,
    mend: () => (isCut = false),
    refused: () => refused,
    async [Symbol.asyncDispose]() {
      cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** What goes wrong with a request on its way to the server. */
export type Fault =
  | { answer: number; headers?: Record<string, string> } // instead of the server
  | "cut" // before the server hears of it
  | "lose" // the server's answer
  | "tear" // the server's answer, in the middle
  | { delayMs: number }
  | null;

/** A way to the HTTP server at `target`; `choose` says for each request what goes wrong. */
export async function openMeddler(
  target: string,
  choose: (request: IncomingMessage) => Fault | Promise<Fault>,
) {
  const server = createHttpServer(async (request, response) => {
    try {
      const fault = await choose(request);
      const chunks: Buffer[] = [];
      for await (const chunk of request) chunks.push(chunk as Buffer);
      if (fault === "cut") return void request.socket.destroy();
      if (fault && typeof fault === "object" && "answer" in fault)
        return void response.writeHead(fault.answer, fault.headers).end();
      const { method = "GET", url = "/" } = request;
      const headers = new Headers(request.headers as Record<string, string>);
      for (const name of ["host", "connection", "content-length"]) headers.delete(name);
      const body = chunks.length > 0 ? Buffer.concat(chunks) : null;
      const answer = await fetch(target + url, { method, headers, body });
      const bytes = await answer.bytes();
      if (fault === "lose") return void request.socket.destroy();
      if (fault && typeof fault === "object") await Bun.sleep(fault.delayMs);
      response.writeHead(answer.status, Object.fromEntries(answer.headers));
      if (fault !== "tear") return void response.end(bytes);
      response.write(bytes.subarray(0, bytes.length / 2), () => request.socket.destroy());
    } catch {
      request.socket.destroy(); // one of the two has gone
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as { port: number }).port}`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** A test with random choices: its seed is said when it fails, and `TEST_SEED` repeats it. */
export function seeded(body: (random: () => number) => Promise<void>) {
  return async () => {
    const seed = Number(process.env["TEST_SEED"] ?? Math.floor(Math.random() * 2 ** 32));
    let state = seed;
    const random = () => {
      state = (state + 0x6d2b79f5) | 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
    await body(random).catch((error) => {
      console.error(`TEST_SEED=${seed} repeats these choices`);
      throw error;
    });
  };
}

/** A bad line of a file: its number, the byte it begins at, and what it says. */
interface BadLine {
  line: number;
  at: number;
  text: string;
}

/** Writes a file of `lines` events, one in a hundred of them bad, and says what must come of it. */
export function writeEvents(path: string, lines: number, random: () => number) {
  const cents = new Map<string, number>();
  const good: string[] = [];
  const bad: BadLine[] = [];
  const parts: string[] = [];
  const note = "n".repeat(800);
  let at = 0;
  for (let line = 1; line <= lines; line++) {
    const user = `user${Math.floor(random() * (lines / 50))}`;
    const value = Math.floor(random() * 100_000);
    const name = random() < 0.4 ? "subtract_revenue" : "add_revenue";
    const event = { userId: user, name, value: value / 100, note: note.slice(random() * 800) };
    let text = JSON.stringify(event);
    if (random() < 0.01) {
      text = [text.slice(0, 30), text.replace("_", "-"), `bad ${line}`][line % 3] as string;
      bad.push({ line, at, text });
    } else {
      good.push(`${text}\n`);
      cents.set(user, (cents.get(user) ?? 0) + (name === "add_revenue" ? value : -value));
    }
    parts.push(`${text}\n`);
    at += text.length + 1;
  }
  writeFileSync(path, parts.join(""));
  // `value` has no more digits than a double is exact for.
  const balances = Object.fromEntries([...cents].map(([user, sum]) => [user, `${sum / 100}`]));
  return { good, bad, balances };
}

/** FILE.rejected.jsonl, without the reasons. */
export function readRejected(file: string): BadLine[] {
  const lines = readFileSync(`${file}.rejected.jsonl`, "utf8").trimEnd().split("\n");
  return lines.map((record) => {
    const { line, at, text } = JSON.parse(record) as BadLine;
    return { line, at, text };
  });
}

/** Bad lines that FILE.rejected.jsonl lacks, has once too often, or should not have. */
export function rejectedFaults(file: string, bad: readonly BadLine[]): string[] {
  const wanted = new Set(bad.map((line) => JSON.stringify(line)));
  const found = new Set<string>();
  const faults: string[] = [];
  for (const line of readRejected(file).map((record) => JSON.stringify(record))) {
    if (found.has(line)) faults.push(`twice: ${line}`);
    else if (!wanted.has(line)) faults.push(`not bad: ${line}`);
    found.add(line);
  }
  for (const line of wanted) if (!found.has(line)) faults.push(`missing: ${line}`);
  return faults;
}

/**
 * Asks until the answer is neither `undefined`, `null` nor `false`; throws after `withinMs`. Without
 * `everyMs` the pauses grow: what takes long is asked seldom.
 */
export async function until<T>(
  ask: () => T | Promise<T>,
  withinMs = 10_000,
  everyMs?: number,
): Promise<NonNullable<Exclude<T, false>>> {
  const deadline = performance.now() + withinMs;
  for (let pauseMs = everyMs ?? 5; ; pauseMs = everyMs ?? Math.min(pauseMs * 1.3, 100)) {
    const answer = await ask();
    if (answer !== undefined && answer !== null && answer !== false)
      return answer as NonNullable<Exclude<T, false>>;
    if (performance.now() > deadline) throw new Error(`not within ${withinMs} ms: ${ask}`);
    await Bun.sleep(pauseMs);
  }
}

function collect(stream: ReadableStream<Uint8Array>) {
  let text = "";
  const end = (async () => {
    const decoder = new TextDecoder();
    for await (const chunk of stream) text += decoder.decode(chunk, { stream: true });
  })();
  return { text: () => text, end };
}
