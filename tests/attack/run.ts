/**
 * `bun run attack [--seed N] [ROW…]`: attacks a running server, with its processor and embedded Postgres, as
 * a sender, a reader and a stranger would, and prints for each row by how much it delayed everybody else, and
 * the memory that it took. ROW selects rows by the beginning of their names. Exit code 1 if a row fails.
 *
 * The delay is the longest wait of another client for `/healthz`, less that of an idle server just before.
 * A row that fails by time alone is tried again: other programs of the machine take processors and disks.
 */
import { parseArgs } from "node:util";

import { type Row, ROWS } from "./rows.ts";
import { openTarget, type Target } from "./target.ts";

const MAX_DELAY_MS = 50;
const MAX_MEMORY_MB = 600;
const IDLE_MS = 2_000;
const TRIES = 3;

interface Result {
  name: string;
  delayMs: number;
  memoryMb: number;
  failure: string | null;
  notes: string;
}

async function main(): Promise<number> {
  const { values, positionals } = parseArgs({
    options: { seed: { type: "string" } },
    allowPositionals: true,
  });
  const seed = Number(values.seed ?? Math.floor(Math.random() * 2 ** 30));
  const isWanted = ({ name }: Row) =>
    positionals.length === 0 || positionals.some((begin) => name.startsWith(begin));
  console.log(`attack: seed ${seed}`);
  const results: Result[] = [];
  let shared: Target | null = null;
  try {
    for (const row of ROWS.filter(isWanted)) {
      if (row.env) {
        await using own = await openTarget(row.env);
        results.push(await tryRow(row, own, seed));
      } else {
        if (shared && !shared.isRunning()) shared = null;
        results.push(await tryRow(row, (shared ??= await openTarget()), seed));
      }
      console.log(format(results.at(-1) as Result));
    }
  } finally {
    await shared?.[Symbol.asyncDispose]();
  }

  const failed = results.filter(({ failure }) => failure !== null).length;
  console.log(`\n| row | longest wait beyond idle | memory | result |\n| --- | --- | --- | --- |`);
  for (const { name, delayMs, memoryMb, failure, notes } of results)
    console.log(
      `| ${name} | ${delayMs.toFixed(0)} ms | ${memoryMb.toFixed(0)} MB | ${failure ? "FAILED" : "held"}${notes && `: ${notes}`} |`,
    );
  console.log(`\n${results.length - failed} rows held, ${failed} failed, seed ${seed}`);
  return failed > 0 ? 1 : 0;
}

/** The best of some tries. */
async function tryRow(row: Row, target: Target, seed: number): Promise<Result> {
  let best: Result | null = null;
  for (let tries = 1; tries <= TRIES; tries++) {
    const result = await attack(row, target, seed + tries - 1);
    if (!best || result.delayMs < best.delayMs || result.failure === null) best = result;
    if (result.failure === null || !result.failure.startsWith("delayed")) return result;
  }
  return best as Result;
}

async function attack(row: Row, target: Target, seed: number): Promise<Result> {
  const { name, maxMemoryMb = MAX_MEMORY_MB, maxDelayMs = MAX_DELAY_MS } = row;
  await target.settled();
  await target.longestMs();
  await Bun.sleep(IDLE_MS);
  const idleMs = await target.longestMs();
  target.forgetPeak();
  const loggedBefore = target.log().length;
  let failure: string | null = null;
  let notes = "";
  try {
    notes = (await row.attack(target, seed)) ?? "";
    await target.settled();
  } catch (error) {
    failure = (error as Error).message;
  }
  const delayMs = Math.max(0, (await target.longestMs()) - idleMs);
  if (!target.isRunning()) failure = `the server ended: ${target.log().slice(-500)}`;
  const memoryMb = target.isRunning() ? target.peakMb() : 0;
  if (!failure && memoryMb > maxMemoryMb) failure = `took ${Math.round(memoryMb)} MB`;
  if (!failure && delayMs > maxDelayMs) failure = `delayed others by ${Math.round(delayMs)} ms`;
  const fault = target
    .log()
    .slice(loggedBefore)
    .split("\n")
    .find((line) => line.includes("internal error"));
  if (fault) failure ??= fault;
  return { name, delayMs, memoryMb, failure, notes };
}

function format({ name, delayMs, memoryMb, failure, notes }: Result): string {
  const figures = `${delayMs.toFixed(0).padStart(6)} ms ${memoryMb.toFixed(0).padStart(5)} MB`;
  return `${figures}  ${name}${notes && ` (${notes})`}${failure ? `\n  FAILED: ${failure}` : ""}`;
}

process.exit(await main());
