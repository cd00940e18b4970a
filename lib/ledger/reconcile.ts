/**
 * Reconciling: where the balances differ from what their sources say, and correcting them. The recounted
 * amounts are kept in temporary tables, so neither this program nor Postgres holds all users in memory.
 *
 * Amounts are appended, and summed when the table has grown. An upsert of each batch would leave a dead
 * row version for every update, which cannot be cleaned up within the transaction: with thousands of
 * batches, each would walk through thousands of versions of its users.
 */
import type { Sums } from "../event/sums.ts";
import type { Checkpoint } from "./checkpoints.ts";
import { isCopying } from "./copy.ts";
import {
  arrayLiteral,
  CannotProceed,
  columns,
  type Database,
  LEDGER_VERSION,
  setLimits,
  type Statements,
  transact,
  type Transaction,
} from "./database.ts";
import { correctPoints, type PointDifference } from "./points.ts";

/** A recount of terabytes may take this long. */
const DEADLINE_MS = 24 * 3600 * 1000;
/** If the machine of a recount disappears, its lock is free after this long. */
const IDLE_MS = 300_000;
const KEEP_ALIVE_MS = 10_000;
const WAIT_MS = 100;
const CORRECTION_TIMEOUT_MS = 60_000;
const LOCK_NOT_AVAILABLE = "55P03";
/** The temporary table is summed when it has this many rows, then when it has tripled. */
const MAX_ROWS = 4_000_000;
/** So few ranges of a source are in memory at a time. */
const RANGES_PER_FETCH = 10_000;
const DIFFERENCES_PER_PAGE = 1_000;

/**
 * The result of `work`, a transaction that sees the ledger as of one moment (or of each statement, with
 * the isolation "read committed"), without time limits.
 * Recounts, rebuilds, retries and removals of segments exclude each other: only posting changes what a
 * recount has read. Waits for another one to end, and says so; `say` may throw, and nobody waits.
 *
 * Two tables serve as locks. `removed` is locked until the transaction ends. `event_types` is locked while
 * a correction is under way (`correctDifferences`), and only looked at here: that correction may belong
 * to a comparison whose connection has died, and a snapshot before its end would correct the same again.
 *
 * LOCK TABLE takes no snapshot, and an advisory lock does: who waited for one read 1 where the true value
 * was 6. Nobody waits in Postgres, because behind a pooler what is waited for may need that connection.
 */
export function withRecountLock<T>(
  database: Database,
  say: (line: string) => void,
  work: (tx: Transaction) => Promise<T>,
  isolation = "repeatable read",
): Promise<T> {
  return database.use(async (sql) => {
    for (let tries = 0; ; tries++) {
      let isOurs = false;
      try {
        return (await sql.begin(`isolation level ${isolation}`, async (tx) => {
          await tx`lock table removed in share update exclusive mode nowait`;
          await tx`savepoint looking`;
          await tx`lock table event_types in share update exclusive mode nowait`;
          await tx`rollback to savepoint looking`;
          isOurs = true;
          await setLimits(tx, 0, IDLE_MS);
          await tx`select set_config('work_mem', '64MB', true)`;
          const keepAlive = () => isCopying(tx) || tx`select 1`.catch(() => {});
          const timer = setInterval(keepAlive, KEEP_ALIVE_MS);
          return work(tx).finally(() => clearInterval(timer));
        })) as T;
      } catch (error) {
        if (isOurs || (error as { code?: string }).code !== LOCK_NOT_AVAILABLE) throw error;
        if (tries === 0) say("waiting for another recount, retry or removal of segments to end");
        await Bun.sleep(WAIT_MS);
      }
    }
  }, DEADLINE_MS);
}

/** Amounts of users, in a temporary table of the transaction `sql`. */
export type Tally = Awaited<ReturnType<typeof openTally>>;

export async function openTally(sql: Transaction, maxRows = MAX_ROWS) {
  let rows = 0;
  let sumAtRows = maxRows;
  await sql`create temp table tally (user_id text collate "C", revenue numeric) on commit drop`;
  return {
    async add(changes: Sums): Promise<void> {
      if (changes.size === 0) return;
      await sql`
        insert into tally select * from unnest(
          ${changes.textArray()}::text::text[], ${changes.amountArray()}::text::numeric[])`;
      await added(changes.size);
    },
    /** Adds what the removed segments of the journal `key` contributed to each user. */
    async addSnapshot(key: string): Promise<void> {
      const { count } = await sql`
        insert into tally select user_id, revenue from snapshots where source = ${key}`;
      await added(count);
    },
    /** A query: each user (`user_id`) and the sum of its amounts (`revenue`). */
    sums,
  };

  function sums() {
    return sql`select user_id, sum(revenue) as revenue from tally group by user_id`;
  }

  async function added(count: number) {
    rows += count;
    if (rows < sumAtRows) return;
    ({ count: rows } = await sql`create temp table summed on commit drop as ${sums()}`);
    await sql`drop table tally`;
    await sql`alter table summed rename to tally`;
    sumAtRows = Math.max(maxRows, 3 * rows);
  }
}

/** A checkpoint, and the position before which its source is kept only as a snapshot. */
export type Recountable = Checkpoint & {
  removedTo: number;
  /** What was posted before this position has no points of revenue over time. */
  pointsFrom: number;
};

/** The checkpoints that a recount needs: journals and files. Sources sent over HTTP are in the journals. */
export async function listRecountable(sql: Statements): Promise<Recountable[]> {
  return sql<Recountable[]>`
    select checkpoints.source as key, checkpoints.position::float8, digest,
      coalesce(removed.position, 0)::float8 as "removedTo", points_from::float8 as "pointsFrom"
    from checkpoints left join removed using (source)
    where checkpoints.position > 0
      and (starts_with(checkpoints.source, 'journal:') or starts_with(checkpoints.source, 'file:'))
    order by checkpoints.source`;
}

/** The position before which the journal `key` is kept only as a snapshot; 0 if there is none. */
export async function readSnapshotEnd(sql: Statements, key: string): Promise<number> {
  const [row] = await sql<{ position: number }[]>`
    select position::float8 from removed where source = ${key}`;
  return row?.position ?? 0;
}

/** Adds `tally` to the snapshot of the journal `key`, which from now on stands for all before `position`. */
export async function extendSnapshot(
  sql: Transaction,
  tally: Tally,
  { key, position }: { key: string; position: number },
): Promise<void> {
  await sql`
    insert into snapshots as snapshot (source, user_id, revenue)
    select ${key}, sums.* from (${tally.sums()}) as sums order by user_id
    on conflict (source, user_id) do update set revenue = snapshot.revenue + excluded.revenue`;
  await noteRemoved(sql, { key, position });
}

/** From now on the snapshot of the source `key` stands for all of it before `position`. */
async function noteRemoved(sql: Statements, { key, position }: { key: string; position: number }) {
  // A range that extends beyond the position keeps its second part.
  await sql`
    insert into uncounted (source, from_position, to_position, why)
    select source, ${position}, to_position, why from uncounted
    where source = ${key} and from_position < ${position} and to_position > ${position}
    on conflict do nothing`;
  await sql`delete from uncounted where source = ${key} and from_position < ${position}`;
  // One that extends beyond it stays whole: what lies before the position is not asked for.
  await sql`
    delete from packed_uncounted
    where source = ${key} and from_position + ends[cardinality(ends)] <= ${position}`;
  await sql`delete from segments where source = ${key} and base < ${position}`;
  await sql`
    insert into removed (source, position) values (${key}, ${position})
    on conflict (source) do update set position = excluded.position`;
}

/**
 * Finds what a source has added to each user, as what the balances hold beyond `tally`, which is all
 * others'. Returns for how many users, and their sum. `retireSource` can then keep it.
 */
export async function findRest(sql: Transaction, tally: Tally) {
  await sql`
    create temp table rest on commit drop as
    select user_id, coalesce(balance.revenue, 0) - coalesce(tally.revenue, 0) as revenue
    from (${tally.sums()}) as tally full join users_revenue as balance using (user_id)
    where tally.revenue is distinct from balance.revenue`;
  const [row] = await sql<{ users: number; revenue: string }[]>`
    select count(*)::float8 as users, trim_scale(coalesce(sum(revenue), 0))::text as revenue from rest`;
  return row as { users: number; revenue: string };
}

/**
 * Makes what `findRest` has found (or, without `hasRest`, nothing) the snapshot of the source `key` up to
 * `position`, where posting continues.
 */
export async function retireSource(
  sql: Transaction,
  { key, position, hasRest }: { key: string; position: number; hasRest: boolean },
): Promise<void> {
  await sql`delete from snapshots where source = ${key}`;
  await sql`
    insert into snapshots (source, user_id, revenue) select ${key}, rest.* from rest where ${hasRest}`;
  await sql`delete from snapshot_points where source = ${key}`;
  await sql`insert into snapshot_points select * from points where source = ${key}`;
  await noteRemoved(sql, { key, position });
  await sql`
    update checkpoints set position = ${position}, digest = null
    where source = ${key} and position < ${position}`;
}

/** Event types that were posted with another sign than `types` gives them, as `name:sign`. */
export async function listOtherTypes(sql: Statements, types: ReadonlyMap<string, number>) {
  const rows = await sql<{ name: string; sign: number }[]>`
    select name, sign from event_types order by name, sign`;
  return rows
    .filter(({ name, sign }) => types.get(name) !== sign)
    .map(({ name, sign }) => `${name}:${{ 1: "+", [-1]: "-" }[sign] ?? "0"}`);
}

/** The offsets of the file `key` at which a last line without a newline was posted. */
export async function listLineEnds(sql: Statements, key: string): Promise<number[]> {
  const rows = await sql<{ offset: number }[]>`
    select from_position::float8 as offset from uncounted
    where source = ${key} and from_position > 0 and from_position = to_position order by 1`;
  return rows.map(({ offset }) => offset);
}

/** The ranges of a source that do not count. Ask in ascending order of positions. */
export type Exclusions = Awaited<ReturnType<typeof openExclusions>>;

/** The exclusions in positions `from` to `to` of the source `key`, fetched as they are needed. */
export async function openExclusions(
  sql: Transaction,
  { key, from, to }: { key: string; from: number; to: number },
) {
  await sql`
    declare exclusions no scroll cursor for
    select from_position as "from", to_position as "to" from uncounted
    where source = ${key} and from_position >= ${from} and from_position < ${to}
    union all
    select from_position + range.begins, from_position + range.ends
    from packed_uncounted, unnest(starts, packed_uncounted.ends) as range (begins, ends)
    where source = ${key} and from_position < ${to}
      and from_position + range.ends > ${from} and from_position + range.begins < ${to}
    union all
    select position, position + 1 from quarantine
    where source = ${key} and position >= ${from} and position < ${to}
    union all
    select from_position + index, from_position + index + 1
    from packed_quarantine, unnest(positions) as index
    where source = ${key} and from_position < ${to}
      and from_position + index >= ${from} and from_position + index < ${to}
    order by 1`;
  let ranges: { from: number; to: number }[] = [];
  let next = 0;
  let coveredTo = 0;
  let hasMore = true;
  return {
    /** Await before asking about lines that begin before `position`. */
    async load(position: number): Promise<void> {
      while (hasMore && (ranges.at(-1)?.from ?? -1) < position) {
        const rows = await sql<{ from: string; to: string }[]>`
          fetch ${sql.unsafe(`${RANGES_PER_FETCH}`)} from exclusions`;
        hasMore = rows.length === RANGES_PER_FETCH;
        ranges = ranges.slice(next);
        next = 0;
        for (const { from, to } of rows) ranges.push({ from: Number(from), to: Number(to) });
      }
    },
    has(position: number): boolean {
      for (; (ranges[next]?.from ?? Number.POSITIVE_INFINITY) <= position; next++)
        coveredTo = Math.max(coveredTo, ranges[next]?.to ?? 0);
      return position < coveredTo;
    },
    close: () => sql`close exclusions`,
  };
}

/** A user whose balance differs from the recount; `null`: has none. */
export interface Difference {
  userId: string;
  expected: string | null;
  balance: string | null;
  /** `balance` minus `expected`. */
  excess: string;
}

/**
 * Keeps the users whose balance differs from `tally` in a temporary table, for `readDifferences`. Returns
 * the number of balances, and how many differ.
 */
export async function findDifferences(sql: Transaction, tally: Tally) {
  const { count: differing } = await sql`
    create temp table differences on commit drop as
    select user_id, tally.revenue as expected, balance.revenue as balance
    from (${tally.sums()}) as tally full join users_revenue as balance using (user_id)
    where tally.revenue is distinct from balance.revenue`;
  const [row] = await sql<{ users: number }[]>`
    select count(*)::float8 as users from users_revenue`;
  return { users: row?.users ?? 0, differing };
}

/** The differences found, in the order of users, a page at a time. */
export async function* readDifferences(sql: Transaction): AsyncGenerator<Difference[]> {
  await sql`
    declare found no scroll cursor for
    select user_id as "userId", trim_scale(expected)::text as expected,
      trim_scale(balance)::text as balance,
      trim_scale(coalesce(balance, 0) - coalesce(expected, 0))::text as excess
    from differences order by user_id collate "C"`;
  for (;;) {
    const page = await sql<Difference[]>`fetch ${sql.unsafe(`${DIFFERENCES_PER_PAGE}`)} from found`;
    if (page.length === 0) break;
    yield page;
  }
  await sql`close found`;
}

/** What changes beside the balances. */
interface Correction {
  types: ReadonlyMap<string, number>;
  behind: readonly Recountable[];
  points: PointDifference[];
}

/**
 * Corrects the differences that the transaction `found` has found, by adding, because posting continues
 * meanwhile, and in the order in which posting locks users. It does so in a transaction of its own, on
 * another connection: in `found`, a user that was posted to meanwhile could not be changed (40001). From
 * now on events count by `types`, and the sources `behind` their snapshots continue after them.
 *
 * While `found` holds its lock, no other recount begins. If its connection dies, one may begin, but not
 * before this transaction has ended. If it died before this transaction had its own lock, nothing is
 * corrected, because another recount may have seen the same differences: only a living `found` can be read.
 *
 * A user that should not exist is deleted, unless something was posted since: then the balance is that.
 * (If what was posted sums to 0, the user is deleted too, and the next recount reports it.)
 */
export function correctDifferences(
  database: Database,
  found: Transaction,
  { types, behind, points }: Correction,
): Promise<void> {
  const correct = async (tx: Transaction) => {
    for (const { key, position, removedTo } of behind) {
      const { count } = await tx`
        update checkpoints set position = ${removedTo}, digest = null
        where source = ${key} and position = ${position}`;
      if (count === 0)
        throw new CannotProceed(`${key} was posted meanwhile; nothing was changed: run it again`);
    }
    await tx`lock table event_types in share update exclusive mode`;
    for await (const differences of readDifferences(found)) await correctPage(tx, differences);
    await correctPoints(tx, points);
    await replaceEventTypes(tx, types);
  };
  return database.use((sql) => transact(sql, CORRECTION_TIMEOUT_MS, correct), DEADLINE_MS);
}

async function correctPage(tx: Transaction, differences: Difference[]): Promise<void> {
  const [users, excesses] = columns(differences, "userId", "excess") as [string, string];
  await tx`
    insert into users_revenue as balance (user_id, revenue)
    select user_id, -excess
    from unnest(${users}::text::text[], ${excesses}::text::numeric[]) as found (user_id, excess),
      daybook_require_balances(${LEDGER_VERSION})
    order by user_id collate "C"
    on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue`;
  const unexpected = differences.filter(({ expected }) => expected === null);
  await tx`
    delete from users_revenue
    where user_id = any(${arrayLiteral(unexpected.map(({ userId }) => userId))}::text::text[])
      and revenue = 0`;
}

/** Forgets how events counted before. */
async function replaceEventTypes(tx: Transaction, types: ReadonlyMap<string, number>) {
  const [names, signs] = [arrayLiteral(types.keys()), arrayLiteral(types.values())];
  await tx`
    insert into event_types (name, sign)
    select * from unnest(${names}::text::text[], ${signs}::text::smallint[])
    on conflict do nothing`;
  await tx`
    delete from event_types where (name, sign) not in (
      select * from unnest(${names}::text::text[], ${signs}::text::smallint[]))`;
}
