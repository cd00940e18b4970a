/**
 * Drift: where the ledger differs from what its sources say. The amounts that a recount brings are
 * kept in temporary tables, so that neither this program nor Postgres holds all users in memory.
 *
 * They are appended and summed up now and then. An upsert of each batch was not tried: in one
 * transaction every update leaves a row version behind that cannot be cleaned away, and with
 * thousands of batches each one would walk through thousands of versions of its users.
 */
import type { Checkpoint } from "./checkpoints.ts";
import {
  arrayLiteral,
  type Database,
  type Fragment,
  type Sql,
  type Statements,
} from "./database.ts";
import type { Sums } from "../event/sums.ts";

/** A recount of terabytes may take this long. */
const DEADLINE_MS = 24 * 3600 * 1000;
/** The temporary table is summed up when it has this many rows, and is three times as long as then. */
const MAX_ROWS = 4_000_000;
const RANGES = 10_000;

/**
 * The result of `work`, which has the one connection of `database` to itself, without time limits.
 * Recounts, rebuilds, retries and removals of segments exclude each other, so that nothing but
 * posting changes what a recount has read. `waiting` is called when another one is at work.
 */
export function alone<T>(
  database: Database,
  waiting: () => void,
  work: (sql: Sql) => Promise<T>,
): Promise<T> {
  return database.use(async (sql) => {
    await sql`set statement_timeout = 0`;
    await sql`set idle_in_transaction_session_timeout = 0`;
    await sql`set work_mem = '64MB'`;
    const [row] = await sql<{ locked: boolean }[]>`
      select pg_try_advisory_lock(hashtext('daybook recount')) as locked`;
    if (!row?.locked) {
      waiting();
      await sql`select pg_advisory_lock(hashtext('daybook recount'))`;
    }
    const result = await work(sql);
    await sql`select pg_advisory_unlock(hashtext('daybook recount'))`;
    return result;
  }, DEADLINE_MS);
}

/** The same in one transaction; `null` at once when another one is at work. */
export function aloneNow<T>(
  database: Database,
  work: (sql: Statements) => Promise<T>,
): Promise<T | null> {
  const working = async (tx: Statements): Promise<T | null> => {
    await tx`set local statement_timeout = 0`;
    await tx`set local idle_in_transaction_session_timeout = 0`;
    const [row] = await tx<{ locked: boolean }[]>`
      select pg_try_advisory_xact_lock(hashtext('daybook recount')) as locked`;
    return row?.locked ? work(tx) : null;
  };
  return database.use((sql) => sql.begin(working) as Promise<T | null>, DEADLINE_MS);
}

/** Amounts of users, in a temporary table. */
export interface Tally {
  add(sql: Statements, changes: Sums): Promise<void>;
  /** Adds what the removed segments of `source` had made of each user. */
  addSnapshot(sql: Statements, source: string): Promise<void>;
  /** A query for each user and the sum of its amounts. */
  sums(sql: Statements): Fragment;
}

export async function openTally(sql: Statements, most = MAX_ROWS): Promise<Tally> {
  let table = "tally_one";
  let other = "tally_two";
  let rows = 0;
  let mostRows = most;
  await sql`drop table if exists tally_one, tally_two`;
  await sql`create temp table tally_one (user_id text collate "C" not null, amount numeric not null)`;
  await sql`create temp table tally_two (like tally_one)`;
  const sums = (sql: Statements) =>
    sql`select user_id, sum(amount) as revenue from ${sql(table)} group by user_id`;
  return {
    sums,
    async add(sql, changes) {
      if (changes.size === 0) return;
      await sql`
        insert into ${sql(table)} select * from unnest(
          ${changes.userArray()}::text::text[], ${changes.amountArray()}::text::numeric[])`;
      await grown(sql, changes.size);
    },
    async addSnapshot(sql, source) {
      const { count } = await sql`
        insert into ${sql(table)} select user_id, revenue from snapshots where source = ${source}`;
      await grown(sql, count);
    },
  };

  async function grown(sql: Statements, by: number) {
    rows += by;
    if (rows < mostRows) return;
    ({ count: rows } = await sql`insert into ${sql(other)} ${sums(sql)}`);
    await sql`truncate ${sql(table)}`;
    [table, other] = [other, table];
    mostRows = Math.max(most, 3 * rows);
  }
}

/** The checkpoints of what a recount needs: journals and files. What was sent is in the journals. */
export async function listRecountable(sql: Statements): Promise<Checkpoint[]> {
  const rows = await sql<{ key: string; position: string; digest: string | null }[]>`
    select source as key, position, digest from checkpoints
    where position > 0 and (starts_with(source, 'journal:') or starts_with(source, 'file:'))
    order by source`;
  return rows.map((row) => ({ ...row, position: Number(row.position) }));
}

/** Up to where the segments of `source` were let go; 0: never. */
export async function readRemoved(sql: Statements, source: string): Promise<number> {
  const [row] = await sql<{ position: string }[]>`
    select position from removed where source = ${source}`;
  return Number(row?.position ?? 0);
}

/** Names of events that have counted otherwise than `types` has it, with how. */
export async function listOtherTypes(
  sql: Statements,
  types: ReadonlyMap<string, number>,
): Promise<string[]> {
  const rows = await sql<{ name: string; sign: number }[]>`
    select name, sign from event_types order by name, sign`;
  return rows
    .filter(({ name, sign }) => types.get(name) !== sign)
    .map(({ name, sign }) => `${name}:${{ 1: "+", [-1]: "-" }[sign] ?? "0"}`);
}

/** From here on all that is posted counts as `types` has it. */
export async function settleTypes(
  sql: Statements,
  types: ReadonlyMap<string, number>,
): Promise<void> {
  const names = arrayLiteral(types.keys());
  const signs = arrayLiteral(types.values());
  await sql`
    with today as (
      select * from unnest(${names}::text::text[], ${signs}::text::smallint[]) as today (name, sign)
    ), gone as (
      delete from event_types as known
      where not exists (
        select from today where today.name = known.name and today.sign = known.sign
      )
    )
    insert into event_types (name, sign) select name, sign from today on conflict do nothing`;
}

/** Where lines of `source` end without a newline, behind `from`. */
export async function listLineEnds(
  sql: Statements,
  source: string,
  from: number,
): Promise<number[]> {
  const rows = await sql<{ position: string }[]>`
    select from_position as position from uncounted
    where source = ${source} and from_position > ${from} and from_position = to_position order by 1`;
  return rows.map(({ position }) => Number(position));
}

/** The places in a source that do not count, asked for in order of position. */
export interface LeftOut {
  /** To be awaited before lines that begin before `position` are asked for. */
  load(position: number): Promise<void>;
  has(position: number): boolean;
  close(): Promise<void>;
}

/** What does not count in bytes `from` to `to` of `source`, read as it is needed. */
export async function openLeftOut(
  sql: Statements,
  source: string,
  from: number,
  to: number,
): Promise<LeftOut> {
  await sql`
    declare left_out no scroll cursor with hold for
    select from_position, to_position from uncounted
    where source = ${source} and from_position >= ${from} and from_position < ${to}
    union all
    select position, position + 1 from quarantine
    where source = ${source} and position >= ${from} and position < ${to}
    order by 1`;
  let ranges: { from: number; to: number }[] = [];
  let next = 0;
  let coveredTo = 0;
  let more = true;
  return {
    async load(position) {
      while (more && (ranges.at(-1)?.from ?? -1) < position) {
        const rows = await sql<{ from_position: string; to_position: string }[]>`
          fetch ${sql.unsafe(`${RANGES}`)} from left_out`;
        more = rows.length === RANGES;
        ranges = ranges.slice(next);
        next = 0;
        for (const row of rows)
          ranges.push({ from: Number(row.from_position), to: Number(row.to_position) });
      }
    },
    has(position) {
      for (; (ranges[next]?.from ?? Number.POSITIVE_INFINITY) <= position; next++)
        coveredTo = Math.max(coveredTo, ranges[next]?.to ?? 0);
      return position < coveredTo;
    },
    close: async () => void (await sql`close left_out`),
  };
}

/** A user whose balance differs; `null`: not there. */
export interface Drift {
  userId: string;
  wanted: string | null;
  found: string | null;
  /** What the ledger has too much (or, with a minus, too little). */
  excess: string;
}

/** Keeps what differs between `tally` and the balances in a temporary table; how many there are. */
export async function findDrift(
  sql: Statements,
  tally: Tally,
): Promise<{ users: number; differing: number }> {
  await sql`drop table if exists drift`;
  const { count: differing } = await sql`
    create temp table drift as
    select user_id, tally.revenue as wanted, balance.revenue as found
    from (${tally.sums(sql)}) as tally full join users_revenue as balance using (user_id)
    where tally.revenue is distinct from balance.revenue`;
  const [row] = await sql<{ users: string }[]>`select count(*) as users from users_revenue`;
  return { users: Number(row?.users), differing };
}

/** Calls `visit` for each user that `findDrift` has found, in order. */
export async function eachDrift(sql: Statements, visit: (drift: Drift) => void): Promise<void> {
  const rows = sql<Drift[]>`
    select user_id as "userId", trim_scale(wanted)::text as wanted, trim_scale(found)::text as found,
      trim_scale(coalesce(found, 0) - coalesce(wanted, 0))::text as excess
    from drift order by user_id collate "C"`.cursor(1_000);
  for await (const page of rows) for (const drift of page) visit(drift);
}

/**
 * Corrects what `findDrift` has found, in one transaction. By differences, for posting goes on
 * meanwhile, and in the order in which posting locks users. A user who should not be there goes,
 * unless something was posted since: then the balance is what was. (If that is 0 the user goes
 * all the same, and the next recount says so.)
 */
export async function mendDrift(sql: Sql): Promise<void> {
  await sql.begin(async (tx) => {
    await tx`
      insert into users_revenue as balance (user_id, revenue)
      select user_id, coalesce(wanted, 0) - coalesce(found, 0) from drift
      order by user_id collate "C"
      on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue`;
    await tx`
      delete from users_revenue as balance using drift
      where drift.wanted is null and drift.user_id = balance.user_id and balance.revenue = 0`;
  });
}

/** Adds `tally` to the snapshot of `source`, which stands for its bytes up to `position` from then on. */
export async function addToSnapshot(
  sql: Statements,
  tally: Tally,
  source: string,
  position: number,
): Promise<void> {
  await sql`
    insert into snapshots as snapshot (source, user_id, revenue)
    select ${source}, sums.* from (${tally.sums(sql)}) as sums order by user_id
    on conflict (source, user_id) do update set revenue = snapshot.revenue + excluded.revenue`;
  // A range may go on behind the position.
  await sql`
    insert into uncounted (source, from_position, to_position, why)
    select source, ${position}, to_position, why from uncounted
    where source = ${source} and from_position < ${position} and to_position > ${position}
    on conflict do nothing`;
  await sql`delete from uncounted where source = ${source} and from_position < ${position}`;
  await sql`update removed set position = ${position} where source = ${source}`;
}
