/** `--backup` and `--restore` that are killed at named points, and begun again. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync } from "node:fs";

import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { run, until, untilBalance } from "../support/programs.ts";
import { type Alteration, alteredCopy } from "./altered.ts";
import { count } from "./figures.ts";

setDefaultTimeout(120_000);

const MATCH = "match their sources\n";
const DIE = 'process.kill(process.pid, "SIGKILL");';
const SMALL = { JOURNAL_SEGMENT_BYTES: "4000" };

const at = (find: string, put: string, file?: string): Alteration => ({ find, put, file });

const IN_BACKUP: Record<string, Alteration> = {
  "after the segments": at(
    "const tables = await copyTables(",
    `${DIE} const tables = await copyTables(`,
  ),
  "between two tables": at(
    "const columns = await listColumns(tx, name);",
    `if (name === "ids") ${DIE} const columns = await listColumns(tx, name);`,
  ),
  "after the ledger": at("await copyRest(journal, to);", `${DIE} await copyRest(journal, to);`),
  "in the active file": at("await copy.sync();", `${DIE} await copy.sync();`),
  "before the manifest": at(
    "const files = await listFiles(to);",
    `const files = await listFiles(to); ${DIE}`,
  ),
  "before the manifest has its name": at(
    "await disk.rename(making,",
    `${DIE} await disk.rename(making,`,
  ),
};

const IN_RESTORE: Record<string, Alteration> = {
  "before the journal": at(
    "await placeJournal(copy, journal)",
    `${DIE} await placeJournal(copy, journal)`,
  ),
  "in the active file": at("await rename(making, to);", `${DIE} await rename(making, to);`),
  "after the active file": at(
    "const segments = await listSegmentFiles(copy, disk);",
    `${DIE} const segments = await listSegmentFiles(copy, disk);`,
  ),
  "between two segments": at(
    "await linkFile(path, join(dirname(active), basename(path)));",
    `if (base === 0) ${DIE} await linkFile(path, join(dirname(active), basename(path)));`,
  ),
  "between two tables": at(
    "const table = TABLES.find((known) => known === name)",
    `if (name === "ids") ${DIE} const table = TABLES.find((known) => known === name)`,
  ),
  "before COMMIT": at(
    "return compareRestored(tx, run);",
    `const found = await compareRestored(tx, run); ${DIE} return found;`,
  ),
};

/** A ledger with segments and a file posted by path, as it is when it is backed up. */
async function openFilled() {
  const ledger = await openLedger(SMALL);
  const file = ledger.write("posted.jsonl", line("ben", 7));
  await ledger.tool([file]);
  await using server = await ledger.start();
  for (let i = 0; i < 60; i++) await server.post(event("ann", 1, { note: "n".repeat(99) }));
  await untilBalance(server, "ann", "60");
  return { ledger, file };
}

const BALANCES = { ann: "60", ben: "7" };

test("a backup that is killed at each of these points is refused, and the next one is whole", async () => {
  const { ledger, file } = await openFilled();
  await using _ = ledger;
  for (const [name, point] of Object.entries(IN_BACKUP)) {
    using copy = alteredCopy([point]);
    const folder = ledger.file(name);
    const args = ["--backup", folder];
    const { code } = await run("processor.ts", { home: copy.path, args, env: ledger.env });
    expect([name, code]).toEqual([name, null]);
    expect([name, existsSync(`${folder}/backup.json`)]).toEqual([name, false]);
    await using restored = await openLedger(SMALL);
    const refused = await restored.tool(["--restore", folder, file]);
    expect([refused.code, refused.stderr]).toEqual([2, expect.stringContaining("interrupted")]);
    count("backups killed");
  }
  const folder = ledger.file("whole");
  expect((await ledger.tool(["--backup", folder])).code).toBe(0);
  await using restored = await openLedger(SMALL);
  expect((await restored.tool(["--restore", folder, file])).stdout).toContain(MATCH);
  expect(await restored.balances()).toEqual(BALANCES);
});

test("a restore that is killed at each of these points is begun again, also if the server was started in between", async () => {
  const { ledger: old, file } = await openFilled();
  await using _ = old;
  const folder = old.file("backup");
  expect((await old.tool(["--backup", folder])).code).toBe(0);
  const args = ["--restore", folder, file];
  for (const [name, point] of Object.entries(IN_RESTORE)) {
    await using ledger = await openLedger(SMALL);
    {
      using copy = alteredCopy([point]);
      const { code } = await run("processor.ts", { home: copy.path, args, env: ledger.env });
      expect([name, code]).toEqual([name, null]);
      count("restores killed");
    }
    let more = 0;
    if (name.includes("segments") || name === "after the active file") {
      // Nothing is posted of a journal that begins too late, and what it accepts is kept.
      await using server = await ledger.start();
      await server.post(event("ann", 1));
      more = 1;
      await until(() => /older segments|Put them back/.test(server.stderr.text()));
    }
    expect([name, await ledger.balances().catch(() => ({}))]).toEqual([name, {}]);
    const { code, stderr } = await ledger.tool(args);
    expect({ name, code, stderr }).toEqual({ name, code: 0, stderr: "" });
    expect(segmentNames(ledger.dataDir)).toEqual(
      expect.arrayContaining(segmentNames(`${folder}/journal`)),
    );
    expect(await ledger.balances()).toEqual(BALANCES);
    await using server = await ledger.start();
    await untilBalance(server, "ann", `${60 + more}`);
    expect((await ledger.tool(["--verify", file])).stdout).toEndWith(MATCH);
  }
});

test("a restore that is killed after its COMMIT is complete", async () => {
  const { ledger: old, file } = await openFilled();
  await using _ = old;
  const folder = old.file("backup");
  await old.tool(["--backup", folder]);
  await using ledger = await openLedger(SMALL);
  using copy = alteredCopy([
    at("return differing;\n}", `${DIE} return differing;\n}`, "lib/processor/restore.ts"),
  ]);
  const args = ["--restore", folder, file];
  expect((await run("processor.ts", { home: copy.path, args, env: ledger.env })).code).toBe(null);
  expect((await ledger.tool(args)).stderr).toStartWith("the ledger is not empty");
  expect(await ledger.balances()).toEqual(BALANCES);
  expect((await ledger.tool(["--verify", file])).stdout).toEndWith(MATCH);
});
