/** Sources that are gone, and a ledger that is older than its removed segments: each has a way on. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { rmSync } from "node:fs";

import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
import { tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const MATCH = "match their sources\n";

test("a journal and a file that are gone are retired one after the other, and recounts do without them", async () => {
  await using ledger = await openLedger();
  using gone = tempDir();
  const file = ledger.write("gone.jsonl", line("ann", 10) + line("ben", "0.5", { id: "x" }));
  await ledger.tool([file]);
  {
    await using other = await ledger.start({ DATA_DIR: gone.path });
    await other.post(event("ann", 5));
    await other.post(event("ben", 7, { id: "x" })); // in quarantine
    await other.post(event("zero", 1));
    await other.post(event("zero", -1));
    await untilBalance(other, "zero", "0");
  }
  await using server = await ledger.start();
  await server.post(event("ann", 1));
  await untilBalance(server, "ann", "16");
  const verify = () => ledger.tool(["--verify"]);
  const keys = (await verify()).stderr.match(/(?<=--retire )\S+/g) ?? [];
  expect(keys.toSorted()).toEqual(["file:gone.jsonl#1", expect.stringMatching(/^journal:/)]);
  const journal = keys.find((key) => key.startsWith("journal:")) as string;

  // The other one has to be here: only so is known what this one has added.
  expect(await ledger.tool(["--retire", journal, "--yes"])).toMatchObject({ code: 2, stdout: "" });
  const asked = await ledger.tool(["--retire", journal, file]);
  expect(asked.code).toBe(2);
  expect(asked.stdout).toStartWith(`${journal}: added 5 to 2 balances\n`);
  expect(asked.stderr).toContain("nothing was changed: add --yes");
  expect((await verify()).code).toBe(2);
  const id = journal.slice("journal:".length);
  expect((await ledger.tool(["--retire", id, file, "--yes"])).code).toBe(0);
  expect((await ledger.tool(["--verify", file])).stdout).toEndWith(MATCH);
  rmSync(file);
  expect((await ledger.tool(["--retire", "file:gone.jsonl#1", "--yes"])).code).toBe(0);
  expect((await verify()).stdout).toEndWith(MATCH);

  // Posting continues, a balance is corrected, and a line of the journal leaves the quarantine.
  await server.post(event("ann", 2));
  await untilBalance(server, "ann", "18");
  await ledger.select(
    "delete from ids; update users_revenue set revenue = revenue + 1 where user_id = 'ann'",
  );
  expect((await ledger.tool(["--rebuild"])).stdout).toContain("balances corrected: 1");
  expect((await ledger.tool(["--quarantine=retry"])).stdout).toContain("lines posted: 1");
  expect((await verify()).stdout).toEndWith(MATCH);
  expect(await ledger.balances()).toEqual({ ann: "18", ben: "7.5", zero: "0" });

  // What comes back continues where it was.
  ledger.write("gone.jsonl", line("ann", 10) + line("ben", "0.5", { id: "x" }) + line("ann", 100));
  expect((await ledger.tool([file])).stdout).toStartWith("posted 1 event ");
  await using other = await ledger.start({ DATA_DIR: gone.path });
  await other.post(event("ann", 1000));
  await untilBalance(other, "ann", "1118");
  expect((await ledger.tool(["--verify", file, `${gone.path}/eventsPost.jsonl`])).stdout).toEndWith(
    MATCH,
  );
});

test("two deleted folders are retired together, while events are posted", async () => {
  await using ledger = await openLedger();
  for (const user of ["ann", "ben"]) {
    using gone = tempDir();
    await using other = await ledger.start({ DATA_DIR: gone.path });
    await other.post(event(user, 5));
    await other.post(event("both", 1));
    await untilBalance(other, "both", user === "ann" ? "1" : "2");
  }
  await using server = await ledger.start();
  let sent = 0;
  let isDone = false;
  const sending = (async () => {
    for (; !isDone; sent++) await server.post(event("ann"));
  })();
  await untilBalance(server, "both", "2");
  await until(async () => (await ledger.balances())["ann"] !== "5");
  const missing = (await ledger.tool(["--verify"])).stderr;
  expect(missing).toContain("several that are gone are retired together");
  const options = missing.match(/--retire \S+/g)?.flatMap((each) => each.split(" ")) ?? [];
  expect(options).toHaveLength(4);
  const retired = await ledger.tool([...options, "--yes"]);
  expect(retired).toMatchObject({
    code: 0,
    stdout: expect.stringContaining(": added 12 to 3 balances\n"),
  });
  isDone = true;
  await sending;
  await untilBalance(server, "ann", `${5 + sent}`);
  expect((await ledger.tool(["--verify"])).stdout).toEndWith(MATCH);
});

test("a source that is here, or that the ledger does not know, is not retired", async () => {
  await using ledger = await openLedger();
  await using server = await ledger.start();
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1");
  const [{ source } = { source: "" }] = await ledger.select<{ source: string }>(
    "select source from checkpoints",
  );
  const here = await ledger.tool(["--retire", source, "--yes"]);
  expect(here).toMatchObject({ code: 2, stderr: expect.stringContaining("is here, in ") });
  const unknown = await ledger.tool(["--retire", "file:x#1", "--yes"]);
  expect(unknown).toMatchObject({
    code: 2,
    stderr: expect.stringContaining(`It knows:\n  ${source} `),
  });
  expect((await ledger.tool(["--retire", source, "--verify"])).code).toBe(2);
});

/** A ledger and a server's journal; its first segments are removed, and its checkpoint is older than that. */
async function openOlder(tables: string) {
  const ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "1000" });
  await using sql = connectTest(ledger.url);
  {
    await using server = await ledger.start();
    for (let i = 1; i <= 10; i++) await server.post(event("ann", 1));
    await untilBalance(server, "ann", "10");
    for (const table of tables.split(","))
      await sql.unsafe(`create table old_${table} as table ${table}`);
    for (let i = 1; i <= 30; i++) await server.post(event("ann", 1));
    await untilBalance(server, "ann", "40");
  }
  {
    await using server = await ledger.start({ JOURNAL_KEEP_DAYS: "0" });
    await until(() => segmentNames(ledger.dataDir).length === 0);
    await server.post(event("ann", 1));
    await untilBalance(server, "ann", "41");
  }
  for (const table of tables.split(","))
    await sql.unsafe(
      `delete from ${table}; insert into ${table} table old_${table}; drop table old_${table}`,
    );
  return ledger;
}

const lagOf = async (url: string) =>
  (await (await fetch(`${url}/readyz?reads`)).json()) as { lagBytes: number; lagSeconds: number };

test("a ledger older than its removed segments lags, says what is missing, and continues once --rebuild finds the snapshot", async () => {
  await using ledger = await openOlder("users_revenue,checkpoints");
  await using server = await ledger.start();
  await until(() => server.stderr.text().includes("run bun run processor.ts --rebuild"));
  const { lagBytes, lagSeconds } = await lagOf(server.url);
  expect(lagBytes).toBeGreaterThan(0);
  expect(lagSeconds).toBeGreaterThan(0);
  const verified = await ledger.tool(["--verify"]);
  expect(verified.code).toBe(1);
  expect(verified.stdout).toContain("--rebuild adds the snapshot");
  expect((await ledger.tool(["--rebuild"])).code).toBe(0);
  await untilBalance(server, "ann", "41");
  expect((await ledger.tool(["--verify"])).stdout).toEndWith(MATCH);
});

test("a ledger older than its removed segments, without their snapshot, continues with --retire, or with the segments", async () => {
  await using ledger = await openOlder("users_revenue,checkpoints,snapshots,removed");
  await using server = await ledger.start();
  await until(() => server.stderr.text().includes("Put them back from a backup of DATA_DIR"));
  expect((await lagOf(server.url)).lagSeconds).toBeGreaterThan(0);
  const [, key = ""] = /--retire (\S+) --yes/.exec(server.stderr.text()) ?? [];
  const retired = await ledger.tool(["--retire", key, "--yes"]);
  expect(retired).toMatchObject({ code: 0, stderr: "" });
  expect(retired.stdout).toMatch(/; \d+ bytes that followed are gone, and are not in the balances/);
  await server.post(event("ben"));
  await untilBalance(server, "ben", "1");
  expect((await ledger.tool(["--verify"])).stdout).toEndWith(MATCH);
  expect((await ledger.tool(["--check"])).code).toBe(0);
});
