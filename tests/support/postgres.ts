/**
 * A database for each test that asks, all in one Postgres: the one at DATABASE_URL, or else an embedded
 * one of this run, which the first test that needs it starts and the last one stops.
 */
import { afterAll } from "bun:test";
import { existsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import postgres from "postgres";

import { type Cluster, openCluster } from "../../lib/postgres/cluster.ts";

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
