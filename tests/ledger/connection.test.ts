/** Connections that are of no use any more: the other side only reads, has gone silent, or takes too long. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import { freePort } from "../support/pgbouncer.ts";
import { connectTest } from "../support/postgres.ts";
import { run, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(120_000);

test("posting continues, on a new connection, once a database that could only be read can be written", async () => {
  await using ledger = await openLedger();
  const name = new URL(ledger.url).pathname.slice(1);
  await using server = await ledger.start();
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1");
  await ledger.select(`alter database ${name} set default_transaction_read_only = on`);
  await ledger.select(`
    select pg_terminate_backend(pid, 5000) from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid()`);
  await server.post(event("ann"));
  await until(() => server.stderr.text().includes("read-only transaction"));
  await ledger.select(`alter database ${name} reset default_transaction_read_only`);
  await untilBalance(server, "ann", "2", 15_000);
});

// `where` the processor's machine disappears: the text that it has sent last.
for (const [where, text] of [
  ["after it has locked the checkpoint", "judged as ("],
  ["while its statement waits for a user", "zoe"],
] as const)
  test(`a processor's machine disappears ${where}: its checkpoint is free after the timeout`, async () => {
    await using ledger = await openLedger();
    await using proxy = await openProxy(ledger.url);
    await using sql = connectTest(ledger.url);
    await using server = await ledger.start({}, ["--no-processor"]);
    await server.post(event("zoe"));
    await using first = ledger.process();
    await untilBalance(server, "zoe", "1");
    first.kill();
    await first.exit();
    await sql.begin(async (tx) => {
      await tx`select from users_revenue where user_id = 'zoe' for update`;
      await using lost = ledger.process([], { DATABASE_URL: proxy.url });
      proxy.silence(text);
      await server.post(event("zoe"));
      await until(() => proxy.isSilent());
      lost.kill();
      await lost.exit();
      const isFree = () =>
        ledger.select("select from checkpoints for update nowait").then(
          () => true,
          () => false,
        );
      expect(await isFree()).toBe(false);
      await until(isFree, 30_000);
    });
    await using next = ledger.process();
    await untilBalance(server, "zoe", "2");
    expect(next.stderr.text()).not.toContain("waiting");
  });

test("a read is answered 503 while the connection to the database is silent", async () => {
  await using ledger = await openLedger();
  await using proxy = await openProxy(ledger.url);
  await using server = await ledger.start({ DATABASE_URL: proxy.url });
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1");
  proxy.silence("zoe");
  const signal = AbortSignal.timeout(60_000);
  expect((await fetch(`${server.url}/userEvents/zoe`, { signal })).status).toBe(503);
});

test("of several hosts, one that is silent and one that is closed are passed over", async () => {
  await using ledger = await openLedger();
  await using proxy = await openProxy(ledger.url);
  proxy.silence("daybook"); // the name of the user, with which a connection begins
  const port = await freePort();
  const { host } = new URL(ledger.url);
  const DATABASE_URL = ledger.url.replace(
    host,
    `${new URL(proxy.url).host},127.0.0.1:${port},${host}`,
  );
  await using server = await ledger.start({ DATABASE_URL });
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1", 30_000);
});

test("a program that cannot use its DATABASE_URL says so without a piece of the password", async () => {
  for (const program of ["app.ts", "processor.ts"]) {
    const DATABASE_URL = "postgres://ann:se@cr/et@127.0.0.1:1/app?sslmode=require";
    const { code, stdout, stderr } = await run(program, { env: { DATABASE_URL, PORT: "x" } });
    expect(code).toBe(2);
    expect(stdout + stderr).toMatch(/^(PORT is .*\n)?DATABASE_URL is invalid: write @ as %40.*\n$/);
  }
  await using ledger = await openLedger();
  const DATABASE_URL = "postgres://ann:se@cr:et@127.0.0.1:1/app?connect_timeout=1";
  const path = ledger.write("a.jsonl", line("ann"));
  await using processor = ledger.process([path], { DATABASE_URL });
  await until(() => processor.stderr.text().includes("ECONNREFUSED"));
  expect(processor.stderr.text()).not.toMatch(/se@|cr:et/);
});

test("a read that nobody waits for any more does not stay in Postgres", async () => {
  await using ledger = await openLedger();
  await using sql = connectTest(ledger.url);
  await using server = await ledger.start();
  await server.post(event("ann"));
  await untilBalance(server, "ann", "1");
  await sql.begin(async (tx) => {
    await tx`lock table users_revenue in access exclusive mode`;
    const reads = await Promise.all([1, 2, 3].map(() => fetch(`${server.url}/userEvents/ann`)));
    expect(reads.map(({ status }) => status)).toEqual([503, 503, 503]);
    await until(async () => {
      const waiting = await ledger.select(`
        select from pg_stat_activity where datname = current_database()
          and application_name = 'daybook server' and wait_event_type = 'Lock'`);
      return waiting.length === 0;
    });
  });
  await untilBalance(server, "ann", "1");
});
