/** Files that are rewritten in place: what can be seen is reported, and nothing is mixed up. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, copyFileSync, truncateSync, writeFileSync } from "node:fs";

import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { openMeddler } from "../support/network.ts";
import { connectTest } from "../support/postgres.ts";
import { run, spawn, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const OLD = line("ann", 1) + line("ann", 4);
const NEW = line("ann", 6) + line("ann", "0.5").repeat(4);

const OTHER = (name: string, bytes: number) =>
  new RegExp(
    `${name} does not begin with the ${bytes} bytes that count as \\S+: it counts whole, as another file, \\S+#2\n$`,
  );
const REWRITTEN = "was rewritten while it was read: it no longer holds what counted; run it again";

for (const [what, content, sum] of [
  ["with other bytes", NEW, "13"],
  ["and is shorter, for its writer has not finished", OLD.slice(0, OLD.length / 2), "6"],
] as const)
  test(`a file that its writer truncates and writes anew ${what} is another file, and both programs say so`, async () => {
    await using ledger = await openLedger();
    await using app = await ledger.start();
    const env = { SERVER_URL: app.url };
    const file = ledger.write("a.jsonl", OLD);
    expect((await run("client.ts", { args: [file], env })).code).toBe(0);
    writeFileSync(file, content);
    const sent = await run("client.ts", { args: [file], env });
    expect(sent).toMatchObject({ code: 0, stderr: expect.stringMatching(OTHER(file, OLD.length)) });
    expect(await run("client.ts", { args: [file], env })).toMatchObject({ code: 0, stderr: "" });
    await untilBalance(app, "ann", sum);

    writeFileSync(file, OLD.replaceAll("ann", "ben"));
    expect(await ledger.tool([file])).toMatchObject({ code: 0, stderr: "" });
    writeFileSync(file, content.replaceAll("ann", "ben"));
    const posted = await ledger.tool([file]);
    expect(posted).toMatchObject({
      code: 0,
      stderr: expect.stringMatching(OTHER(file, OLD.length)),
    });
    expect(await ledger.tool([file])).toMatchObject({ code: 0, stderr: "" });
    await untilBalance(app, "ben", sum);
  });

test("a followed log that is copied and truncated is followed from its new beginning, however long it is by then", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  const env = { SERVER_URL: app.url };
  const file = ledger.write("a.jsonl", OLD);
  await using client = spawn("client.ts", { args: ["--follow", file], env });
  await untilBalance(app, "ann", "5");
  // Between two looks of the client: it never sees the file shorter than before.
  client.kill("SIGSTOP");
  copyFileSync(file, `${file}.1`);
  truncateSync(file);
  appendFileSync(file, NEW);
  client.kill("SIGCONT");
  await untilBalance(app, "ann", "13");
  appendFileSync(file, line("ann", 10));
  await untilBalance(app, "ann", "23");
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(0);
  expect(await run("client.ts", { args: [file], env })).toMatchObject({
    code: 0,
    stdout: expect.stringContaining("sent 0 events"),
  });
});

test("a file that is rewritten while it is sent is reported, with exit code 1", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  const file = ledger.write("a.jsonl", line("ann", 1).repeat(50_000));
  await using proxy = await openMeddler(app.url, ({ method }) => {
    if (method === "PATCH") writeFileSync(file, line("ben", 1).repeat(50_000));
    return null;
  });
  const env = { SERVER_URL: proxy.url };
  const sent = await run("client.ts", { args: [file], env });
  expect(sent).toMatchObject({ code: 1, stderr: expect.stringContaining(`${file} ${REWRITTEN}`) });
  // What it holds now counts whole, beside what was sent of its old and its new content.
  const again = await run("client.ts", { args: [file], env });
  expect(again).toMatchObject({ code: 0, stdout: expect.stringContaining("sent 50000 events") });
});

test("a file that grows while it is sent is not taken for another one", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  const file = ledger.write("a.jsonl", line("ann", 1).repeat(50_000));
  let grown = 0;
  await using proxy = await openMeddler(app.url, ({ method }) => {
    if (method === "PATCH" && grown++ < 3) appendFileSync(file, line("ann", 1));
    return null;
  });
  const env = { SERVER_URL: proxy.url };
  for (let i = 0; i < 2; i++)
    expect(await run("client.ts", { args: [file], env })).toMatchObject({ code: 0, stderr: "" });
  await untilBalance(app, "ann", "50003", 30_000);
});

test("a file that is rewritten while it is posted is reported, with exit code 1", async () => {
  await using ledger = await openLedger();
  // More than two batches: one waits, and the next one is folded meanwhile.
  const lines = 7_000_000;
  const file = ledger.write("a.jsonl", line("ann", 1).repeat(lines));
  await ledger.tool([ledger.write("empty.jsonl", "")]); // creates the tables
  await using sql = connectTest(ledger.url, 2);
  await using processor = ledger.process([file]);
  await sql.begin(async (tx) => {
    await tx`lock table users_revenue in exclusive mode`;
    const waiting = () => sql`
      select from pg_stat_activity
      where datname = current_database() and wait_event_type = 'Lock' and query like 'with move as%'`;
    await until(async () => (await waiting()).length > 0);
    writeFileSync(file, line("ben", 1).repeat(lines));
  });
  expect(await processor.exit()).toBe(1);
  expect(processor.stderr.text()).toContain(`${file} ${REWRITTEN}`);
});
