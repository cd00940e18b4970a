/**
 * The suite is tested by breaking the program: each break takes one promise away, in a copy, and the
 * named tests must turn red. Prints the table; returns 1 when a break went unnoticed.
 */
import { type Alteration, alteredCopy } from "./altered.ts";

const LANES = 2;

interface Break extends Alteration {
  what: string;
  /** The tests that must notice. */
  tests: string[];
}

const journal = (what: string, find: string, put: string, ...tests: string[]): Break => ({
  ...{ what, file: "lib/journal.ts", find, put },
  tests: tests.length > 0 ? tests : ["tests/faults/disk.test.ts"],
});
const ledger = (what: string, find: string, put: string, ...tests: string[]): Break => ({
  ...{ what, file: "lib/ledger.ts", find, put, tests },
});

const BREAKS: Break[] = [
  journal("the sync of a frame", "      await sync();\n", ""),
  journal(
    "the answer after the sync",
    "      await write(frame);\n",
    "for (const { resolve } of group) resolve(base + end); await write(frame);\n",
  ),
  journal(
    "the sync of the directory at the start",
    "  await disk.syncDirectory(dirname(path));\n  return { id: header.id",
    "  return { id: header.id",
  ),
  journal("the sync of the next file", "      await next.sync();\n", ""),
  journal(
    "the sync of the directory between two renames",
    "      await disk.syncDirectory(dirname(path));\n      await disk.rename(nextPath, path);",
    "      await disk.rename(nextPath, path);",
  ),
  journal(
    "the sync of the directory behind them",
    "      await disk.syncDirectory(dirname(path));\n      await file.close();",
    "      await file.close();",
  ),
  journal("the base of the file after a rotation that died", "last?.to ?? 0", "0"),
  journal(
    "the cutting of a torn tail",
    "      await file.truncate(end);\n    }\n  }",
    "    }\n  }",
  ),
  journal(
    "the taking back of what found no room",
    '      await file.truncate(end).catch((error) => {\n        throw fail("truncate", String(error));\n      });\n      throw failure;',
    "      throw failure;",
    "tests/journal.test.ts",
  ),
  journal(
    "the end after a failed sync",
    '      const failure = fail("sync", codeOf(error));\n',
    "      const failure = error;\n",
    "tests/journal.test.ts",
  ),
  journal(
    "the lock of the writer",
    "if (!lock) throw",
    "if (false) throw",
    "tests/settings.test.ts",
    "tests/journal.test.ts",
  ),
  {
    what: "the checksum of a frame",
    file: "lib/journal-frame.ts",
    find: "if (sum !== match[2])",
    put: "if (false)",
    tests: ["tests/faults/tail.test.ts", "tests/faults/fuzz.test.ts"],
  },
  {
    what: "the reader's look at the header after it has read",
    file: "lib/journal-reader.ts",
    find: "if (!place.to && (await readHeader())?.base !== place.base) continue;",
    put: "",
    tests: ["tests/rotation.test.ts"],
  },
  {
    what: "the reader's own sync before a posting",
    file: "lib/journal-source.ts",
    find: "      await journal.sync();\n",
    put: "",
    tests: ["tests/rotation.test.ts"],
  },
  {
    what: "the look at the last frame that was posted",
    file: "lib/journal-source.ts",
    find: "last?.header !== header",
    put: "false",
    tests: ["tests/check.test.ts"],
  },
  ledger(
    "the look at the checkpoint under its lock",
    'if (Number(checkpoint?.position) !== from) return { state: "elsewhere" };',
    "",
    "tests/processor.test.ts",
    "tests/faults/process.test.ts",
  ),
  ledger(
    "the fence in the statement",
    "and checkpoint.position = move.begins",
    "",
    "tests/ledger.test.ts",
  ),
  ledger(
    "the claim of ids",
    "join claimed using (id) where fresh",
    "join claimed using (id)",
    "tests/ids.test.ts",
  ),
  ledger(
    "the addition to what is there",
    "revenue = balance.revenue + excluded.revenue",
    "revenue = excluded.revenue",
    "tests/processor.test.ts",
  ),
  {
    what: "the position of a source",
    file: "lib/fold.ts",
    find: "if (ends > postedTo) this.add",
    put: "if (true) this.add",
    tests: ["tests/sources.test.ts"],
  },
  {
    what: "the quarantine",
    file: "lib/fold.ts",
    find: "return this.quarantine(line, position, decoded.reason);",
    put: "return;",
    tests: ["tests/processor.test.ts"],
  },
  {
    what: "the digits as written",
    file: "lib/event.ts",
    find: 'const written = values.find(({ holder }) => holder === event)?.written ?? "";',
    put: "const written = `${event.value}`;",
    tests: ["tests/event.test.ts"],
  },
  {
    what: "the comparison of secrets",
    file: "lib/auth.ts",
    find: "if (!good)",
    put: "if (false)",
    tests: ["tests/http.test.ts"],
  },
  {
    what: "the 409 of a source that stands elsewhere",
    file: "lib/sources.ts",
    find: "if (taken.offset !== from) return taken;",
    put: "",
    tests: ["tests/sources.test.ts"],
  },
];

export async function tryBreaks(): Promise<number> {
  const waiting = [...BREAKS];
  let unnoticed = 0;
  const lane = async () => {
    for (let one = waiting.shift(); one; one = waiting.shift())
      if (!(await isNoticed(one))) unnoticed++;
  };
  console.log("without …, these tests turn red:");
  await Promise.all(Array.from({ length: LANES }, lane));
  console.log(`${BREAKS.length} breaks, ${unnoticed} unnoticed`);
  return unnoticed > 0 ? 1 : 0;
}

async function isNoticed(one: Break): Promise<boolean> {
  using copy = alteredCopy([one]);
  const began = performance.now();
  const child = Bun.spawn([process.execPath, "test", "--bail", ...one.tests], {
    cwd: copy.path,
    stdio: ["ignore", "pipe", "pipe"],
    detached: true,
  });
  const [stderr] = await Promise.all([
    new Response(child.stderr).text(),
    new Response(child.stdout).text(),
  ]);
  const code = await child.exited;
  killGroup(child.pid); // a test that is given up leaves its processes
  // A copy that does not even load would be red as well.
  const [, test] = /^\(fail\) (.*?)(?: \[[\d.]+ms\])?$/m.exec(stderr) ?? [];
  const noticed = code !== 0 && test !== undefined;
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  console.log(
    `${noticed ? "red " : "GREEN"} ${one.what} | ${test ?? stderr.slice(-300)} | ${seconds} s`,
  );
  return noticed;
}

/** Kills what was started with `detached`, and all that it has started. */
export function killGroup(pid: number): void {
  try {
    process.kill(-pid, "SIGKILL");
  } catch {
    // all gone
  }
}
