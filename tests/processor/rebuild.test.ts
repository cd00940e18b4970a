/** --rebuild while others work: under load, twice at once, and when one of its connections dies. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { Sums } from "../../lib/event/sums.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import {
  correctDifferences,
  findDifferences,
  openTally,
  withRecountLock,
} from "../../lib/ledger/reconcile.ts";
import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
import { until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(120_000);

const quiet = () => {};

/** A ledger of one posted file, in which `damage` (SQL) has changed balances. */
async function openDamaged(lines: string, damage: string) {
  const ledger = await openLedger();
  const path = ledger.write("a.jsonl", lines);
  await ledger.tool([path]);
  await ledger.select(damage);
  return { ...ledger, path };
}

/** The backends that hold the lock of a recount. */
const COMPARING = `
  select pid from pg_locks join pg_stat_activity using (pid)
  where datname = current_database() and relation = to_regclass('removed')
    and mode = 'ShareUpdateExclusiveLock'`;

test("--rebuild corrects while posting changes the same users, and the sums are exact", async () => {
  const users = Array.from({ length: 200 }, (_, i) => line(`user${i}`)).join("");
  await using ledger = await openDamaged(users, "update users_revenue set revenue = 1000");
  await using server = await ledger.start();
  let isDone = false;
  let rounds = 0;
  const load = (async () => {
    for (; !isDone; rounds++) expect((await server.postLines(users)).status).toBe(201);
  })();
  await until(() => rounds > 3);
  for (let i = 0; i < 3; i++) {
    const { code, stderr } = await ledger.tool(["--rebuild", ledger.path]);
    expect(code, stderr).toBe(0);
  }
  isDone = true;
  await load;
  await untilBalance(server, "user0", `${rounds + 1}`);
  expect(new Set(Object.values(await ledger.balances()))).toEqual(new Set([`${rounds + 1}`]));
});

test("two rebuilds at once correct once", async () => {
  await using ledger = await openDamaged(
    line("ann") + line("bob"),
    "update users_revenue set revenue = 7 where user_id = 'ann'",
  );
  const both = await Promise.all([0, 1].map(() => ledger.tool(["--rebuild", ledger.path])));
  for (const { code, stderr } of both) expect(code, stderr).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "1", bob: "1" });
});

for (const isLate of [false, true])
  test(`a comparison dies ${isLate ? "long before" : "while"} its correction commits: nothing is corrected twice`, async () => {
    await using ledger = await openDamaged(
      line("ann") + line("bob"),
      "update users_revenue set revenue = 7",
    );
    await using sql = connectTest(ledger.url);
    await using first = ledger.process(["--rebuild", ledger.path]);
    let second: ReturnType<typeof ledger.process> | undefined;
    await sql.begin(async (tx) => {
      // The correction waits for this user.
      await tx`select from users_revenue where user_id = 'bob' for update`;
      const [comparing] = await until(async () => {
        const waiting = await ledger.select(
          `select from pg_stat_activity
           where datname = current_database() and wait_event = 'transactionid'`,
        );
        const rows = await ledger.select<{ pid: number }>(COMPARING);
        return waiting.length > 0 && rows.length > 0 && rows;
      });
      await ledger.select(`select pg_terminate_backend(${comparing!.pid}, 5000)`);
      second = ledger.process(["--rebuild", ledger.path]);
      const { stderr } = second;
      if (isLate) await until(() => stderr.text().includes("waiting for another recount"));
    });
    expect(await second?.exit(), second?.stderr.text()).toBe(0);
    const code = await first.exit();
    expect(first.stdout.text().includes("balances corrected: 2")).toBe(code === 0);
    expect(await ledger.balances()).toEqual({ ann: "1", bob: "1" });
  });

test("a comparison that has died before its correction began corrects nothing", async () => {
  await using ledger = await openDamaged(line("ann"), "update users_revenue set revenue = 7");
  const database = openDatabase(() => ledger.url, "tool", 2);
  const rebuilding = withRecountLock(database, quiet, async (found) => {
    const tally = await openTally(found);
    const changes = new Sums();
    changes.addTo("ann", 1_000_000_000n);
    await tally.add(changes);
    expect(await findDifferences(found, tally)).toEqual({ users: 1, differing: 1 });
    const [comparing] = await ledger.select<{ pid: number }>(COMPARING);
    await ledger.select(`select pg_terminate_backend(${comparing!.pid}, 5000)`);
    await correctDifferences(database, found, { types: new Map(), behind: [], points: [] });
  });
  expect((await rebuilding.catch((error) => error)).message).toContain("database: ");
  expect(await ledger.balances()).toEqual({ ann: "7" });
  await database.close();
});
