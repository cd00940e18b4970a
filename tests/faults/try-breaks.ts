/**
 * Tests the suite by breaking the program: applies each deliberate break to a copy of the program and
 * runs the tests that must fail.
 */
import { mkdirSync } from "node:fs";

import { type Alteration, alteredCopy, removeTemporary } from "./altered.ts";
import { type Break, BREAKS } from "./breaks.ts";
import { runTestProcess } from "./processes.ts";

const LANES = 2;

/** Tries the breaks whose names contain `name`, and prints a line for each. Returns the exit code. */
export async function tryBreaks(name = ""): Promise<number> {
  const chosen = BREAKS.filter(({ what }) => what.includes(name));
  const waiting = [...chosen];
  let unnoticed = 0;
  const lane = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift())
      if (!(await isNoticed(next))) unnoticed++;
  };
  console.log("without …, these tests fail:");
  await Promise.all(Array.from({ length: LANES }, lane));
  console.log(`${chosen.length} breaks, ${unnoticed} unnoticed`);
  return unnoticed > 0 || chosen.length === 0 ? 1 : 0;
}

async function isNoticed(attempt: Break): Promise<boolean> {
  const startedMs = performance.now();
  const broken = await runTests([attempt], ["--bail", ...attempt.tests]);
  const { failed } = broken;
  // A test that fails without the break as well proves nothing: it may be flaky, or never pass in a copy.
  const pattern = failed
    ?.split(" > ")
    .at(-1)
    ?.replace(/[^\w ]/g, ".");
  const whole = pattern ? await runTests([], [...attempt.tests, "-t", pattern]) : null;
  const verdict = broken.passed || !failed ? "GREEN" : whole?.passed ? "red" : "RED ANYWAY";
  const seconds = ((performance.now() - startedMs) / 1000).toFixed(1);
  const found = failed ?? broken.stderr.slice(-300);
  console.log(`${verdict.padEnd(5)} ${attempt.what} | ${found} | ${seconds} s`);
  return verdict === "red";
}

/** Runs `bun test ARGS` in a copy with these alterations; `failed` names the first test that failed. */
async function runTests(alterations: Alteration[], args: string[]) {
  using copy = alteredCopy(alterations);
  // What an aborted test leaves is removed with the copy.
  const temporary = `${copy.path}/tmp`;
  mkdirSync(temporary);
  const { passed, stderr } = await runTestProcess(args, copy.path, { TMPDIR: temporary });
  removeTemporary(temporary);
  const [, failed] = /^\(fail\) (.*?)(?: \[[\d.]+ms\])?$/m.exec(stderr) ?? [];
  return { passed, failed, stderr };
}
