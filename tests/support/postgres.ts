/**
 * A database for each test that asks for one, all in one Postgres: the one at DATABASE_URL, or an embedded
 * one of this run, which the first test that needs it starts and the last one stops.
 */
import { existsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import postgres from "postgres";

import { afterRun } from "./cleanup.ts";
import { openTestCluster, type TestCluster } from "./cluster.ts";

let cluster: Promise<TestCluster> | null = null;
/** Creates and drops databases: a connection costs half as much as a database. */
let admin: ReturnType<typeof connectTest> | null = null;
/** The databases of this process. */
const created = new Set<string>();
/** Those that no test uses at the moment, empty: creating one takes seven times as long. */
const idle: string[] = [];
/** Balances are polled. With a connection for each look, connecting would cost most. */
const readers = new Map<string, ReturnType<typeof connectTest>>();

/** An empty database for one test. */
export async function testDatabase() {
  const url = new URL(await adminUrl());
  admin ??= connectTest(url.href);
  let name = idle.pop();
  if (!name) {
    name = `daybook_test_${crypto.randomUUID().replaceAll("-", "")}`;
    created.add(name);
    await admin.unsafe(`create database ${name}`);
  }
  url.pathname = `/${name}`;
  const drop = async () => {
    const sql = reader(url.href);
    await sql`
      select pg_terminate_backend(pid, 5000) from pg_stat_activity
      where datname = ${name} and pid <> pg_backend_pid()`;
    await sql`select pg_stat_reset()`; // tests count deadlocks
    await sql.unsafe("drop schema public cascade; create schema public");
    idle.push(name);
  };
  return { url: url.href, name, drop, [Symbol.asyncDispose]: drop };
}

/** A connection for one test. */
export function connectTest(url: string, max = 1) {
  const sql = postgres(url, { max, fetch_types: false, onnotice: () => {} });
  return Object.assign(sql, { [Symbol.asyncDispose]: () => sql.end({ timeout: 1 }) });
}

/** The rows of a query; `bigint` and `numeric` are strings. The connection is kept for the next query. */
export async function select<Row>(url: string, query: string): Promise<Row[]> {
  return [...(await reader(url).unsafe(query))] as Row[];
}

/** All balances, as exact decimals. */
export async function balances(url: string): Promise<Record<string, string>> {
  const rows = await select<{ user_id: string; revenue: string }>(
    url,
    "select user_id, trim_scale(revenue)::text as revenue from users_revenue order by user_id",
  );
  return Object.fromEntries(rows.map(({ user_id, revenue }) => [user_id, revenue]));
}

function reader(url: string) {
  const sql = readers.get(url) ?? connectTest(url);
  readers.set(url, sql);
  return sql;
}

async function adminUrl(): Promise<string> {
  return process.env["DATABASE_URL"] || (await (cluster ??= openRunCluster())).url();
}

/**
 * One Postgres for all test files of a run, whichever process they are in: creating one takes as much
 * processor time as starting a server four times, and there are 35 files.
 */
function openRunCluster(): Promise<TestCluster> {
  const runPid = process.env["BUN_TEST_WORKER_ID"] ? process.ppid : process.pid;
  const dir = join(tmpdir(), `daybook-test-run-${runPid}`);
  if (!existsSync(dir)) removeAfter(runPid, dir);
  return openTestCluster(join(dir, "postgres"));
}

/** Removes `dir` when process `pid` has ended: no test file knows whether another one still needs it. */
function removeAfter(pid: number, dir: string): void {
  // In the background of a shell that has ended, because Bun kills the children that a test file leaves.
  // Polling ten times a second took 3 % of the processor time of a run.
  const waiting = '(while kill -0 "$0"; do sleep 1; done; until rm -rf "$1"; do sleep 0.1; done) &';
  Bun.spawnSync(["sh", "-c", waiting, `${pid}`, dir], {
    cwd: "/",
    detached: true,
    stdio: ["ignore", "ignore", "ignore"],
  });
}

afterRun(async () => {
  try {
    await Promise.all(readers.values().map((sql) => sql.end({ timeout: 1 })));
    for (const name of created) await admin?.unsafe(`drop database if exists ${name} with (force)`);
    await admin?.end({ timeout: 1 });
  } finally {
    await (await cluster?.catch(() => null))?.close();
    readers.clear();
    created.clear();
    idle.length = 0;
    admin = cluster = null;
  }
});
