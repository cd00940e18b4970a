/**
 * The ledger's own day, by which ids and segments grow old. A wrong clock must not make anything old at
 * once, so this day follows the database's clock slowly: see processor/aging.ts. It is never the day of a
 * single reading, except in the moment in which the ledger is created.
 */
import { arrayLiteral, type Database } from "./database.ts";

/** The most ids that one statement deletes, so that no posting waits for long. */
const MAX_PRUNED = 10_000;
/** As many are in this many blocks of the table `ids`. */
const MAX_BLOCKS = 100;

/** The ledger's day, and whether the database's clock is past it. Throws Unavailable. */
export async function readDay(database: Database): Promise<{ day: string; isDue: boolean }> {
  const [row] = await database.use(
    (sql) => sql<{ day: string; isDue: boolean }[]>`
      select day::text, (now() at time zone 'UTC')::date > day as "isDue" from boundary`,
  );
  if (!row)
    throw new Error("the table boundary is empty; run: insert into boundary default values");
  return row;
}

/** Moves the ledger's day to the next one, unless somebody has moved it from `day`. Throws Unavailable. */
export async function moveDay(database: Database, day: string): Promise<void> {
  await database.use(
    (sql) => sql`update boundary set day = day + 1 where day = ${day}::text::date`,
  );
}

/**
 * Returns a function that deletes some ids that are older than `days`, and returns whether it is to be called
 * again. It walks through the table once for each day of the ledger, and at its first calls. Throws Unavailable.
 */
export function openPruning(database: Database, days: number) {
  let walkedOn = "";
  let block = 0;
  return async (): Promise<boolean> => {
    const hasOldIds = await pruneOldIds(database, days);
    const { day } = await readDay(database);
    if (day === walkedOn) return hasOldIds;
    const [table] = await database.use(
      (sql) => sql<{ blocks: number }[]>`
        with pruned as (
          delete from ids
          where ctid >= ${`(${block},0)`}::text::tid and ctid < ${`(${block + MAX_BLOCKS},0)`}::text::tid
            and ids.day < (select daybook_day(boundary.day - ${days}::int) from boundary)
        )
        select (pg_relation_size('ids') / current_setting('block_size')::int)::int as blocks`,
    );
    block += MAX_BLOCKS;
    if (block < (table?.blocks ?? 0)) return true;
    block = 0;
    walkedOn = day;
    return hasOldIds;
  };
}

/** Deletes some of the ids of 0.1.0; returns whether more may be left. */
async function pruneOldIds(database: Database, days: number): Promise<boolean> {
  const { count } = await database.use(
    (sql) => sql`
      delete from event_ids where id in (
        select id from event_ids where claimed_on < (select day - ${days}::int from boundary)
        order by claimed_on limit ${MAX_PRUNED} for update skip locked
      )`,
  );
  return count === MAX_PRUNED;
}

/**
 * Notes that segments of the journal `key`, which begin at `bases`, are wholly posted: from today on they
 * grow older. A segment's own time comes from the clock of its server. Throws Unavailable.
 */
export async function noteSegments(database: Database, key: string, bases: number[]) {
  await database.use(
    (sql) => sql`
      insert into segments (source, base, posted_on)
      select ${key}, base, greatest((now() at time zone 'UTC')::date, day)
      from boundary, unnest(${arrayLiteral(bases)}::text::bigint[]) as base
      on conflict do nothing`,
  );
}

/** Up to which base the segments of the journal `key` are older than `days`; -1 if none is. Throws Unavailable. */
export async function readOldSegments(database: Database, key: string, days: number) {
  const [row] = await database.use(
    (sql) => sql<{ base: number | null }[]>`
      select max(base)::float8 as base from segments, boundary
      where source = ${key} and posted_on < day - ${days}::int`,
  );
  return row?.base ?? -1;
}
