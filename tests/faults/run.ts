/**
 * The long run of the fault suite: `bun run faults [--seed N] [--minutes N] [PART…]`. It runs the parts in turn, two
 * at a time, each time with other seeds, until the time is up, and prints what was tried. Exit code 0 if
 * nothing failed, else 1, with the command that repeats each failure.
 *
 * `bun run faults --breaks [NAME]` tests the suite itself: see breaks.ts. `bun run faults --soak HOURS
 * [--out DIR]` does everything at once, for long: see soak.ts.
 */
import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

import { removeTemporary, root } from "./altered.ts";
import { killRuns, runTestProcess } from "./processes.ts";
import { defaultOut, soak } from "./soak.ts";
import { tryBreaks } from "./try-breaks.ts";

const LANES = 2;
/** A run tries many seeds in a row: with a smaller step the next run would repeat some of them. */
const SEED_STEP = 1_000_003;

interface Part {
  name: string;
  /** Test files, below tests/ and without `.test.ts`. */
  tests: string[];
  /** How much it tries. */
  env?: Record<string, string>;
}

const PARTS: Part[] = [
  { name: "disk", tests: ["faults/disk"], env: { FAULT_SEEDS: "20000" } },
  { name: "process", tests: ["faults/process"], env: { FAULT_ROUNDS: "3" } },
  { name: "fuzz", tests: ["faults/fuzz"], env: { FAULT_CASES: "50000" } },
  { name: "postgres", tests: ["faults/postgres"] },
  { name: "full", tests: ["faults/full", "faults/tail"] },
  { name: "scan", tests: ["unit/scanner"], env: { SCAN_RUNS: "300000" } },
  { name: "verify", tests: ["processor/verify"] },
  { name: "kills", tests: ["processor/crash", "client/resume"] },
  { name: "files", tests: ["processor/check", "processor/repair", "journal/rotation"] },
  { name: "load", tests: ["server/memory", "client/client"] },
  { name: "posting", tests: ["processor/processor", "server/sources"] },
  { name: "driver", tests: ["ledger/driver", "ledger/ledger"] },
  { name: "stream", tests: ["faults/stream"], env: { FAULT_ROUNDS: "4" } },
  {
    name: "nodes",
    tests: [
      ...["faults/stream-damage", "faults/stream-power", "faults/stream-full"],
      "journal/stream",
    ],
  },
  { name: "upgrade", tests: ["faults/upgrade", "faults/backup", "processor/backup"] },
  { name: "events", tests: ["unit/event", "processor/ids"] },
];

const figures = new Map<string, number>();
const failures: string[] = [];

async function main(): Promise<number> {
  const { values, positionals } = readArgs();
  const minutes = Number(values.minutes);
  const firstSeed = Number(values.seed ?? Math.floor(Math.random() * 2 ** 30));
  const hours = Number(values.soak ?? 1);
  if (!(minutes > 0) || !Number.isSafeInteger(firstSeed) || !(hours > 0)) usage();
  const out = values.out ?? defaultOut(); // before TMPDIR is a folder that is removed
  cleanUpAtExit();
  if (values.soak) return soak(hours, out);
  if (values.breaks) return tryBreaks(positionals[0]);
  const parts = positionals.length > 0 ? positionals.map(partOf) : PARTS;

  console.log(`faults: seed ${firstSeed}, ${minutes} minutes`);
  const startedMs = performance.now();
  const minutesSpent = () => (performance.now() - startedMs) / 60_000;
  let runs = 0;
  const lane = async () => {
    while (minutesSpent() < minutes) {
      const part = parts[runs % parts.length] as Part;
      await tryPart(part, (firstSeed + runs++ * SEED_STEP) % 2 ** 31);
    }
  };
  await Promise.all(Array.from({ length: LANES }, lane));

  console.log(`\n${runs} runs in ${minutesSpent().toFixed(1)} minutes, from seed ${firstSeed}:`);
  const print = (count: number, what: string) =>
    console.log(`${count.toLocaleString("en").padStart(14)} ${what}`);
  for (const [what, count] of [...figures].toSorted()) print(count, what);
  print(failures.length, "failures");
  for (const failure of failures) console.log(failure);
  return failures.length > 0 ? 1 : 0;
}

async function tryPart({ name, tests, env }: Part, seed: number): Promise<void> {
  const files = tests.map((test) => `tests/${test}.test.ts`);
  const choices = { FAULT_ROUNDS: "2", ...env, FAULT_SEED_FIRST: `${seed}`, TEST_SEED: `${seed}` };
  const startedMs = performance.now();
  const run = await runTestProcess(files, root, { ...choices, FAULT_FIGURES: "1" });
  for (const [, json] of run.stdout.matchAll(/^faults: (\{.*\})$/gm))
    for (const [what, count] of Object.entries<number>(JSON.parse(json as string)))
      figures.set(what, (figures.get(what) ?? 0) + count);
  const seconds = Math.round((performance.now() - startedMs) / 1000);
  const time = new Date().toTimeString().slice(0, 8);
  const verdict = run.passed ? "passed" : "FAILED";
  console.log(`${time} ${name} from seed ${seed}: ${verdict} (${seconds} s)`);
  if (run.passed) return;
  const settings = Object.entries(choices).map(([key, value]) => `${key}=${value}`);
  failures.push(`${settings.join(" ")} bun test ${files.join(" ")}\n${run.stderr.slice(-3_000)}`);
}

function partOf(wanted: string): Part {
  return PARTS.find(({ name }) => name === wanted) ?? usage();
}

/** What an aborted test leaves is removed: its processes, files and mounts. */
function cleanUpAtExit(): void {
  const temporary = mkdtempSync(join(tmpdir(), "daybook-test-"));
  process.env["TMPDIR"] = temporary;
  process.on("exit", () => removeTemporary(temporary));
  for (const signal of ["SIGINT", "SIGTERM"] as const)
    process.on(signal, () => {
      killRuns();
      process.exit(1);
    });
}

function readArgs() {
  const options = {
    seed: { type: "string" },
    minutes: { type: "string", default: "30" },
    breaks: { type: "boolean" },
    soak: { type: "string" },
    out: { type: "string" },
  } as const;
  try {
    return parseArgs({ options, allowPositionals: true });
  } catch {
    return usage();
  }
}

function usage(): never {
  console.error(
    "usage: bun run faults [--seed N] [--minutes N] [PART…] | --breaks [NAME] | --soak HOURS [--out DIR]",
  );
  console.error(`parts: ${PARTS.map(({ name }) => name).join(", ")}`);
  process.exit(2);
}

process.exit(await main());
