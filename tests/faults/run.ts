/**
 * The long run of the fault suite: `bun run faults [--seed N] [--minutes N]`. Takes the parts in turn,
 * two at a time, with other seeds each time, until the time is up, and prints what that amounts to.
 * Exit code 0 when nothing failed, 1 otherwise; what failed is told with the command that repeats it.
 *
 * `bun run faults --breaks [NAME]` tests the suite itself: see breaks.ts.
 */
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { removeTemporary, root } from "./altered.ts";
import { killRuns, runTestProcess } from "./processes.ts";
import { tryBreaks } from "./try-breaks.ts";

const LANES = 2;
const PARTS: { name: string; files: string[]; env: Record<string, string> }[] = [
  { name: "disk", files: ["tests/faults/disk.test.ts"], env: { FAULT_SEEDS: "20000" } },
  { name: "process", files: ["tests/faults/process.test.ts"], env: { FAULT_ROUNDS: "3" } },
  { name: "fuzz", files: ["tests/faults/fuzz.test.ts"], env: { FAULT_CASES: "50000" } },
  { name: "postgres", files: ["tests/faults/postgres.test.ts"], env: {} },
  { name: "full", files: ["tests/faults/full.test.ts", "tests/faults/tail.test.ts"], env: {} },
  { name: "scan", files: ["tests/unit/scanner.test.ts"], env: { SCAN_RUNS: "300000" } },
  { name: "verify", files: ["tests/processor/verify.test.ts"], env: {} },
  {
    name: "kills",
    files: ["tests/processor/crash.test.ts", "tests/client/resume.test.ts"],
    env: {},
  },
  {
    name: "files",
    files: [
      "tests/processor/check.test.ts",
      "tests/processor/repair.test.ts",
      "tests/journal/rotation.test.ts",
    ],
    env: {},
  },
  { name: "load", files: ["tests/server/memory.test.ts", "tests/client/client.test.ts"], env: {} },
  {
    name: "posting",
    files: ["tests/processor/processor.test.ts", "tests/server/sources.test.ts"],
    env: {},
  },
  {
    name: "driver",
    files: ["tests/ledger/driver.test.ts", "tests/ledger/ledger.test.ts"],
    env: {},
  },
  { name: "events", files: ["tests/unit/event.test.ts", "tests/processor/ids.test.ts"], env: {} },
];

const { values, positionals } = readArgs();
// What a test that dies leaves goes with this folder: files, and what is mounted there.
const temporary = mkdtempSync(join(tmpdir(), "daybook-test-"));
process.env["TMPDIR"] = temporary;
process.on("exit", () => removeTemporary(temporary));
for (const signal of ["SIGINT", "SIGTERM"] as const)
  process.on(signal, () => {
    killRuns();
    process.exit(1);
  });
if (values.breaks) process.exit(await tryBreaks(positionals[0]));

const minutes = Number(values.minutes);
const firstSeed = Number(values.seed ?? Math.floor(Math.random() * 2 ** 30));
if (!(minutes > 0) || !Number.isSafeInteger(firstSeed)) usage();

const startedMs = performance.now();
const figures = new Map<string, number>();
const failures: string[] = [];
let runs = 0;

console.log(`faults: seed ${firstSeed}, ${minutes} minutes`);
await Promise.all(Array.from({ length: LANES }, lane));
const spent = (performance.now() - startedMs) / 60_000;
console.log(`\n${runs} runs in ${spent.toFixed(1)} minutes, from seed ${firstSeed}:`);
for (const [what, many] of [...figures].toSorted())
  console.log(`${many.toLocaleString("en").padStart(14)} ${what}`);
console.log(`${failures.length.toString().padStart(14)} failures`);
for (const failure of failures) console.log(failure);
process.exit(failures.length > 0 ? 1 : 0);

function readArgs() {
  const options = {
    seed: { type: "string" },
    minutes: { type: "string", default: "30" },
    breaks: { type: "boolean" },
  } as const;
  try {
    return parseArgs({ options, allowPositionals: true });
  } catch {
    return usage();
  }
}

function usage(): never {
  console.error("usage: bun run faults [--seed N] [--minutes N] | --breaks [NAME]");
  process.exit(2);
}

async function lane(): Promise<void> {
  while ((performance.now() - startedMs) / 60_000 < minutes) await runOne(runs++);
}

async function runOne(run: number): Promise<void> {
  const { name, files, env } = PARTS[run % PARTS.length] as (typeof PARTS)[0];
  // Seeds in a row would overlap: a run tries many of them.
  const seed = (firstSeed + run * 1_000_003) % 2 ** 31;
  const seeds = { FAULT_ROUNDS: "2", ...env, FAULT_SEED_FIRST: `${seed}`, TEST_SEED: `${seed}` };
  const beganMs = performance.now();
  const { passed, stdout, stderr } = await runTestProcess(files, root, {
    ...seeds,
    FAULT_FIGURES: "1",
  });
  for (const [, line] of stdout.matchAll(/^faults: (\{.*\})$/gm))
    for (const [what, many] of Object.entries(JSON.parse(line as string) as Record<string, number>))
      figures.set(what, (figures.get(what) ?? 0) + many);
  const seconds = Math.round((performance.now() - beganMs) / 1000);
  const at = new Date().toTimeString().slice(0, 8);
  console.log(`${at} ${name} from seed ${seed}: ${passed ? "passed" : "FAILED"} (${seconds} s)`);
  if (passed) return;
  const settings = Object.entries(seeds).map(([key, value]) => `${key}=${value}`);
  failures.push(`${settings.join(" ")} bun test ${files.join(" ")}\n${stderr.slice(-3_000)}`);
}
