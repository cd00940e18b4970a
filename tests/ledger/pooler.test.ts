/** All programs through a real PgBouncer, whose two connections they share: no state outlives a transaction. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { openPgBouncer } from "../support/pgbouncer.ts";
import { connectTest } from "../support/postgres.ts";
import { isInstalled, run, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(120_000);

const hasPgBouncer = isInstalled("pgbouncer");

test.if(hasPgBouncer)(
  "server, processor and tools work through PgBouncer, and leave nothing on its connections",
  async () => {
    await using ledger = await openLedger();
    await using pooler = await openPgBouncer(ledger.url, 2);
    const pooled = { DATABASE_URL: pooler.url };
    const keeping = { ...pooled, JOURNAL_SEGMENT_BYTES: "2000", JOURNAL_KEEP_DAYS: "0" };
    const path = ledger.write(
      "a.jsonl",
      Array.from({ length: 500 }, (_, i) => line(`a${i}`)).join(""),
    );
    {
      await using server = await ledger.start(keeping);
      await server.postLines(Array.from({ length: 300 }, (_, i) => line(`u${i}`)).join(""));
      await server.post(event("ann", 2, { id: "one" }));
      await server.post(event("ann", 2, { id: "one" }));
      await server.post(event("ann", 3, { id: "one" }));
      await untilBalance(server, "ann", "2");
      // More requests at once than connections: none fails.
      const reads = Array.from({ length: 200 }, () => server.balance("ann"));
      expect(new Set(await Promise.all(reads))).toEqual(new Set(["2"]));
      const sent = await run("client.ts", {
        args: [path, "--wait"],
        env: { SERVER_URL: server.url },
      });
      expect(sent.code, sent.stderr).toBe(0);
      await until(() => segmentNames(ledger.dataDir).length === 0, 30_000);
    }
    const other = ledger.write("b.jsonl", line("bob", 7));
    expect((await ledger.tool([other], pooled)).code).toBe(0);
    await ledger.select("update users_revenue set revenue = 5 where user_id = 'ann'");
    await ledger.select("insert into users_revenue values ('nobody', 7)");
    expect((await ledger.tool(["--verify", other], pooled)).code).toBe(1);
    const rebuilds = [0, 1].map(() => ledger.tool(["--rebuild", other], pooled));
    for (const { code, stderr } of await Promise.all(rebuilds)) expect(code, stderr).toBe(0);
    const { stdout, stderr } = await ledger.tool(["--verify", other], pooled);
    expect(stdout, stderr).toBe("802 balances match their sources\n");
    await ledger.select("delete from ids");
    const retried = await ledger.tool(["--quarantine=retry"], pooled);
    expect(retried.stdout, retried.stderr).toStartWith("lines posted: 1");
    expect((await ledger.balances())["ann"]).toBe("5");
    await expectCleanConnections(pooler.url);
  },
);

/** No setting, temporary table or lock is left on the connections of the pool. */
async function expectCleanConnections(url: string) {
  await using sql = connectTest(url, 2);
  sql.options.prepare = false;
  const look = () =>
    sql.begin(async (tx) => {
      await tx`select pg_sleep(0.2)`; // both at once: each has a connection of its own
      const [row] = await tx`
        select pg_backend_pid() as pid,
          (select count(*)::int from pg_settings where source = 'session' and name like '%timeout%') as settings,
          (select count(*)::int from pg_class where relpersistence = 't') as tables,
          (select count(*)::int from pg_locks
            where pid <> pg_backend_pid()
              and database = (select oid from pg_database where datname = current_database())
              and mode <> 'AccessShareLock') as locks`;
      return row;
    });
  const [one, two] = await Promise.all([look(), look()]);
  expect(one?.["pid"]).not.toBe(two?.["pid"]);
  for (const found of [one, two]) expect(found).toMatchObject({ settings: 0, tables: 0, locks: 0 });
}
