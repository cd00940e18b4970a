/**
 * `client.ts` and `processor.ts FILE` that are stopped before the end say so: in their exit code and
 * with how far they came. Run again, they continue.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { gzipSync } from "node:zlib";

import { line } from "../support/events.ts";
import { openMeddler } from "../support/network.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const CODES = { SIGTERM: 143, SIGINT: 130 } as const;
const COUNT = 60_000;
/** Three chunks for the client, and for the processor a batch with each block that has 1,000 bad lines. */
const TEXT = (line("ann", 1).repeat(COUNT / 3) + "x\n".repeat(1_000)).repeat(3);

test.each(["SIGTERM", "SIGINT"] as const)(
  "a client that gets %s half-way ends with its code and how far it came, and continues when it is run again",
  async (signal) => {
    await using ledger = await openLedger();
    for (const name of ["a.jsonl", "b.jsonl.gz"]) {
      let chunks = 0;
      await using proxy = await openMeddler(ledger.server, ({ method }) => {
        if (method === "PATCH" && ++chunks === 2) client.kill(signal);
        return null;
      });
      const file = ledger.write(name, name.endsWith("gz") ? gzipSync(TEXT) : TEXT);
      const env = { SERVER_URL: proxy.url };
      await using client = spawn("client.ts", { args: [file], env });
      expect(await client.exit()).toBe(CODES[signal]);
      expect(client.stderr.text()).toMatch(
        new RegExp(`${name}: stopped at [1-9]\\d? %; run it again to continue\\n$`),
      );
      expect(client.stdout.text()).toMatch(/^stopped: sent [1-9]\d* events /);
      expect((await run("client.ts", { args: [file, "--wait"], env })).code).toBe(1);
    }
    expect(await ledger.balances()).toEqual({ ann: `${2 * COUNT}` });
  },
);

test("a client that gets SIGTERM while the server is silent or gone, or its pipe is, ends with 143", async () => {
  await using ledger = await openLedger();
  const file = ledger.write("a.jsonl", line("ann", 1));
  let asked = 0;
  const never = Promise.withResolvers<Response>();
  await using silent = Bun.serve({ port: 0, fetch: () => (asked++, never.promise) });
  await using waiting = spawn("client.ts", { args: [file], env: { SERVER_URL: `${silent.url}` } });
  await until(() => asked > 0);
  await using retrying = spawn("client.ts", {
    args: [file],
    env: { SERVER_URL: "http://127.0.0.1:1" },
  });
  await until(() => retrying.stderr.text().includes("retrying for"));
  for (const client of [waiting, retrying]) {
    client.kill("SIGTERM");
    expect(await client.exit()).toBe(143);
    expect(client.stderr.text()).toEndWith("a.jsonl: stopped at 0 %; run it again to continue\n");
  }
  const fifo = ledger.path("fifo");
  Bun.spawnSync(["mkfifo", fifo]);
  await using piped = spawn("client.ts", { args: [fifo], env: { SERVER_URL: ledger.server } });
  await until(() => piped.stderr.text().includes("cannot be resumed"));
  piped.kill("SIGTERM");
  expect(await piped.exit()).toBe(143);
  expect(piped.stderr.text()).toContain("fifo: stopped; it cannot be resumed");
});

test.each(["SIGTERM", "SIGINT"] as const)(
  "a processor of FILEs that gets %s half-way ends with its code and how far it came, and continues when it is run again",
  async (signal) => {
    await using ledger = await openLedger();
    for (const name of ["a.jsonl", "b.jsonl.gz"]) {
      const file = ledger.write(name, name.endsWith("gz") ? gzipSync(TEXT) : TEXT);
      const next = ledger.write(`next-${name}`, line("ben", 1));
      await using sql = connectTest(ledger.url, 2);
      const env = ledger.env;
      // The second batch waits for a lock until the processor has ended.
      await sql.unsafe(`
        create or replace function hold() returns trigger language plpgsql as
          'begin if new.position > 0 then perform pg_advisory_xact_lock(7); end if; return new; end';
        drop trigger if exists hold on checkpoints;
        create trigger hold before update on checkpoints for each row
          when (old.position > 0) execute function hold();`);
      const held = Promise.withResolvers<void>();
      const holding = sql.begin(async (tx) => {
        await tx`select pg_advisory_xact_lock(7)`;
        await held.promise;
      });
      holding.catch(() => {}); // else its rejection hides the failure that closed the connection
      await using processor = spawn("processor.ts", { args: [file, next], env });
      // pg_locks shows every database of this Postgres, and other tests use others.
      const waiting = () => sql`
        select from pg_locks where locktype = 'advisory' and objid = 7 and not granted
          and database = (select oid from pg_database where datname = current_database())`;
      await until(async () => (await waiting()).length > 0);
      processor.kill(signal);
      expect([await processor.exit(), processor.stderr.text()]).toEqual([
        CODES[signal],
        expect.stringMatching(
          new RegExp(`${name}: stopped at [1-9]\\d? %; run it again to continue\\n$`),
        ),
      ]);
      held.resolve();
      await holding;
      await sql`drop trigger hold on checkpoints`;
      expect((await run("processor.ts", { args: [file, next], env })).code).toBe(1);
    }
    expect(await ledger.balances()).toEqual({ ann: `${2 * COUNT}`, ben: "2" });
  },
);

test.each(["SIGTERM", "SIGINT"] as const)(
  "a processor that gets %s while it posts the last batch is done: it ends with its summary, and 0 or 1",
  async (signal) => {
    await using ledger = await openLedger();
    await using sql = connectTest(ledger.url, 2);
    await sql.unsafe(`
      create function hold() returns trigger language plpgsql as
        'begin if new.position > 0 then perform pg_advisory_xact_lock(7); end if; return new; end';
      create trigger hold before update on checkpoints for each row execute function hold();`);
    for (const [name, content, code] of [
      ["a.jsonl", line("ann", 1), 0],
      ["b.jsonl.gz", gzipSync(line("ann", 1)), 0],
      ["c.jsonl", `${line("ann", 1)}nonsense\n`, 1],
      ["d.jsonl", `${line("ann", 1)}{"userId":`, 1],
    ] as const) {
      const file = ledger.write(name, content);
      const held = Promise.withResolvers<void>();
      const isHeld = Promise.withResolvers<void>();
      const holding = sql.begin(async (tx) => {
        await tx`select pg_advisory_xact_lock(7)`;
        isHeld.resolve();
        await held.promise;
      });
      holding.catch(() => {});
      await isHeld.promise;
      await using processor = spawn("processor.ts", { args: [file], env: ledger.env });
      await until(
        async () =>
          (
            await sql`
        select from pg_locks where locktype = 'advisory' and objid = 7 and not granted
          and database = (select oid from pg_database where datname = current_database())`
          ).length > 0,
      );
      processor.kill(signal);
      held.resolve();
      await holding;
      expect([name, await processor.exit()]).toEqual([name, code]);
      expect(processor.stdout.text()).toStartWith("posted 1 event ");
      expect(processor.stderr.text()).not.toContain("stopped");
    }
    expect(await ledger.balances()).toEqual({ ann: "4" });
  },
);

async function openLedger() {
  const database = await testDatabase();
  const folder = tempDir();
  const dataDir = folder.file("data");
  const app = await startApp({ dataDir, databaseUrl: database.url });
  return {
    server: app.url,
    url: database.url,
    env: { DATA_DIR: folder.file("other"), DATABASE_URL: database.url },
    path: folder.file,
    write(name: string, content: string | Uint8Array) {
      writeFileSync(folder.file(name), content);
      return folder.file(name);
    },
    balances: () => balances(database.url),
    async [Symbol.asyncDispose]() {
      await app[Symbol.asyncDispose]();
      folder[Symbol.dispose]();
      await database.drop();
    },
  };
}
