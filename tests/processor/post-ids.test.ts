/**
 * The two ways of the posting statement: by the totals where every id of a batch is free, and without what came
 * late. Both leave the same ledger, which is also that of a model.
 */
import { expect, setDefaultTimeout, test } from "bun:test";

import { openDatabase, type Sql } from "../../lib/ledger/database.ts";
import { hashOfIdentity, keyOf } from "../../lib/ledger/ids.ts";
import { fileKey, openCheckpoint } from "../../lib/ledger/checkpoints.ts";
import { post } from "../../lib/ledger/ledger.ts";
import { Fold } from "../../lib/processor/fold.ts";
import { openLedger } from "../support/ledger.ts";
import { until } from "../support/programs.ts";
import { seeded } from "../support/random.ts";

setDefaultTimeout(60_000);

const KEY = fileKey("a", 1);
const TIMEOUT_MS = 20_000;
const BATCHES = 25;
const IDS = [
  "order-1",
  "0198c7f2-3b1c-7e6a-9d7e-5a1b2c3d4e5f",
  "0198C7F2-3B1C-7E6A-9D7E-5A1B2C3D4E5F",
  "0198c7f23b1c7e6a9d7e5a1b2c3d4e5f",
  "x".repeat(32),
  "x".repeat(33),
  `${"x".repeat(33)}y`,
  'quoted "\\{},NULL',
  "é€😀",
  "sixteen bytes id",
];

interface Generated {
  user: string;
  value: number;
  id?: string;
}

/** Events whose ids are fresh, repeated or disputed. */
function generate(random: () => number, fresh: () => string): Generated[] {
  const pick = (n: number) => Math.floor(random() * n);
  const isFresh = random() < 0.4;
  return Array.from({ length: 1 + pick(30) }, () => {
    const event = { user: `u${pick(4)}`, value: 1 + pick(2) };
    if (random() < 0.2) return event;
    return { ...event, id: isFresh ? fresh() : (IDS[pick(IDS.length)] as string) };
  });
}

function identity({ user, value, id }: Generated): string {
  return JSON.stringify({ id, userId: user, name: "add_revenue", value: `${value}` });
}

const lineOf = ({ user, value, id }: Generated) =>
  JSON.stringify({ userId: user, name: "add_revenue", value, ...(id && { id }) });

/** A ledger to which batches are posted; `careful`: never by the totals. */
async function openPosted(careful: boolean) {
  const ledger = await openLedger();
  const database = openDatabase(() => ledger.url, "test", 2);
  await openCheckpoint(database, KEY, null);
  const joining = (sql: Sql): Sql =>
    new Proxy(sql, {
      get(target, name) {
        if (name !== "begin") return Reflect.get(target, name);
        return (how: string, work: (tx: unknown) => unknown) =>
          target.begin(how, (tx) =>
            work(
              new Proxy(tx, {
                get(tx, name) {
                  if (name !== "unsafe") return Reflect.get(tx, name);
                  return (text: string, ...rest: []) =>
                    tx.unsafe(
                      text.replace(WHOLE, "select not exists (select from claim) as is_fresh"),
                      ...rest,
                    );
                },
              }),
            ),
          );
      },
    });
  const through = careful
    ? {
        ...database,
        use: ((work, ms) => database.use((sql) => work(joining(sql)), ms)) as typeof database.use,
      }
    : database;
  let position = 0;
  return {
    ledger,
    post(events: Generated[], maxUsers = 1_000) {
      const fold = new Fold(maxUsers);
      const from = position;
      for (const event of events) {
        const line = Buffer.from(lineOf(event));
        // One way is that of the scanner, the other that of the full decoder.
        if (careful) fold.add(line, position);
        else fold.addLines(line, position);
        position += line.length + 1;
      }
      const batch = fold.batch({ key: KEY, from, to: position, digest: null });
      return post(through, batch, TIMEOUT_MS);
    },
    /** What a posting leaves, without the times. */
    async state() {
      const select = (query: string) => ledger.select<object>(query);
      return {
        balances: await ledger.balances(),
        quarantine: await ledger.quarantine(),
        uncounted: await select("select * from uncounted order by 1, 2, 3"),
        packed: await select("select * from packed_uncounted order by 1, 2, 3"),
        points: await select(
          "select name, sum(events)::int as events, sum(amount)::text as amount from points group by name",
        ),
        ids: await select("select id::text, event::text from ids order by id"),
      };
    },
    async [Symbol.asyncDispose]() {
      await database.close();
      await ledger[Symbol.asyncDispose]();
    },
  };
}

const WHOLE = "select not exists (select from taken) as is_fresh";

test(
  "batches by the totals, by what is late, and by a model leave the same ledger, with ids of 0.1.0 and without",
  seeded(async (random) => {
    expect(await Bun.file(`${import.meta.dir}/../../lib/ledger/post.sql`).text()).toContain(WHOLE);
    await using fast = await openPosted(false);
    await using careful = await openPosted(true);
    const owners = new Map<string, string>();
    const sums = new Map<string, number>();
    let events = 0;
    for (const id of IDS.filter((_, i) => i % 3 === 0)) {
      const event = { user: "u1", value: 1, id };
      owners.set(id, identity(event));
      const old = [id, identity(event)].map((text) => `'${text}'`).join();
      for (const { ledger } of [fast, careful])
        await ledger.select(`insert into event_ids (id, event) values (${old})`);
    }
    let count = 0;
    for (let n = 0; n < BATCHES; n++) {
      if (n === 15)
        for (const { ledger } of [fast, careful]) await ledger.select("delete from event_ids");
      if (n === 15) for (const id of IDS.filter((_, i) => i % 3 === 0)) owners.delete(id);
      const batch = generate(random, () => `fresh-${count++}`);
      const outcome = await fast.post(batch);
      expect(outcome).toMatchObject({ state: "posted" });
      expect(await careful.post(batch)).toEqual(outcome);
      for (const event of batch) {
        if (event.id !== undefined && owners.has(event.id)) continue;
        if (event.id !== undefined) owners.set(event.id, identity(event));
        sums.set(event.user, (sums.get(event.user) ?? 0) + event.value);
        events++;
      }
    }
    const state = await fast.state();
    expect(await careful.state()).toEqual(state);
    expect(state.balances).toEqual(
      Object.fromEntries([...sums].map(([user, sum]) => [user, `${sum}`])),
    );
    const amount = [...sums.values()].reduce((sum, value) => sum + value, 0);
    expect(state.points).toEqual([{ name: "add_revenue", events, amount: `${amount}` }]);
    const claimed = [...owners].map(([id, owner]) => `${keyOf(id)} ${hashOfIdentity(owner)}`);
    const found = state.ids as { id: string; event: string }[];
    expect(found.map(({ id, event }) => `${id} ${event.replaceAll("-", "")}`).sort()).toEqual(
      claimed.sort(),
    );
  }),
);

test("an id that another transaction claims meanwhile is decided in a new transaction", async () => {
  await using own = await openPosted(false);
  const other = new Bun.SQL(own.ledger.url, { max: 1 });
  const held = await other.reserve();
  await held`begin`;
  const same = { user: "ann", value: 1, id: "same" };
  for (const event of [same, { user: "ben", value: 1, id: "other" }])
    await held.unsafe(
      `insert into ids (id, event, day) values ('${keyOf(event.id)}', '${hashOfIdentity(identity(event))}', 1)`,
    );
  const posting = own.post([
    same,
    { user: "ann", value: 2, id: "other" },
    { user: "ann", value: 4, id: "own" },
  ]);
  const waiting = `select count(*)::int as n from pg_stat_activity
    where wait_event = 'transactionid' and datname = current_database()`;
  await until(async () => (await own.ledger.select<{ n: number }>(waiting))[0]?.n === 1);
  await held`commit`;
  held.release();
  await other.close();
  expect(await posting).toMatchObject({ state: "posted", events: 1, conflicts: 1, duplicates: 1 });
  const { balances, quarantine } = await own.state();
  expect(balances).toEqual({ ann: "4" });
  expect(quarantine).toMatchObject([{ line: identity({ user: "ann", value: 2, id: "other" }) }]);
});

test("an id stays what it is up to 32 bytes; a UUID takes 17, and what is longer 21", () => {
  const bytes = IDS.map((id) => (keyOf(id).length - 2) / 2);
  expect(bytes).toEqual([7, 17, 21, 32, 32, 21, 21, 16, 9, 16]);
  expect(new Set(IDS.map(keyOf)).size).toBe(IDS.length);
});
