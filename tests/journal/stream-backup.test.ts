/** The backup of a stream and its ledger, as deploy/README.md describes it. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { copyIn, copyOut, emptyLedger, listColumns, TABLES } from "../../lib/ledger/copy.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { withRecountLock } from "../../lib/ledger/reconcile.ts";
import { openLedger } from "../support/ledger.ts";
import { event } from "../support/events.ts";
import { hasNats, openNats } from "../support/nats.ts";
import { until } from "../support/programs.ts";

setDefaultTimeout(120_000);

/** What `pg_dump` and `psql` do: a copy of all tables as of one moment. */
async function copyLedger(from: string, to: string): Promise<void> {
  const [source, target] = [from, to].map((url) => openDatabase(() => url, "test", 1));
  await withRecountLock(
    source!,
    () => {},
    (reading) =>
      withRecountLock(
        target!,
        () => {},
        async (writing) => {
          expect(await emptyLedger(writing)).toEqual([]);
          for (const table of TABLES) {
            const whole = { table, columns: await listColumns(reading, table) };
            await copyIn(writing, whole, copyOut(reading, whole));
          }
        },
        "read committed",
      ),
  );
  await source!.close();
  await target!.close();
}

test.if(hasNats)(
  "the ledger and then the stream, copied while events arrive, count each event once when restored",
  async () => {
    await using nats = await openNats();
    await using ledger = await openLedger({ JOURNAL_URL: nats.url() });
    await using other = await openNats();
    await using restored = await openLedger({ JOURNAL_URL: other.url() });
    const total = async (of: typeof ledger) =>
      Object.values(await of.balances()).reduce((sum, revenue) => sum + Number(revenue), 0);
    let [sent, copied] = [0, 0];
    {
      await using server = await ledger.start();
      let isOver = false;
      const sending = (async () => {
        for (; !isOver; sent++)
          expect((await server.post(event(`u${sent % 5}`, 1))).status).toBe(201);
      })();
      await until(async () => (await ledger.balances())["u4"] !== undefined);
      await copyLedger(ledger.url, restored.url);
      const ofLedger = sent;
      await until(() => sent >= ofLedger + 50);
      copied = sent;
      await other.restore("daybook", await nats.backUp("daybook"));
      isOver = true;
      await sending;
    }
    await using app = await restored.start();
    // What the copy of the stream holds is posted, and nothing of it twice.
    await until(async () => (await total(restored)) >= copied, 30_000);
    expect(await restored.tool(["--verify"])).toMatchObject({ code: 0 });
    const after = await total(restored);
    expect(after).toBeLessThanOrEqual(sent);
    expect((await app.post(event("u0", 1000))).status).toBe(201);
    await until(async () => (await total(restored)) === after + 1000);
  },
);
