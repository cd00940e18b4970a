/** Revenue over time, as the posting statement has added it. */
import type { Points } from "../event/points.ts";
import {
  columns,
  type Database,
  READ_DEADLINE_MS,
  transact,
  type Transaction,
} from "./database.ts";

/** Posting waits for it: a connection that has gone silent must not stop it for longer than one of its own. */
const FOLD_TIMEOUT_MS = 10_000;
const MAX_FOLDED_SOURCES = 100;

export type Step = "minute" | "hour" | "day";

/** The events of one name, and by how much they changed the balances, in an interval that begins at `at`. */
export interface RevenuePoint {
  at: Date;
  step: Step;
  name: string;
  events: number;
  /** An exact decimal. */
  amount: string;
}

/**
 * The points from `from` to before `to`, each as long as `step`, or longer where only that is kept: at most
 * `limit` of them, oldest first. Throws Unavailable.
 */
export async function readPoints(
  database: Database,
  { step, from, to, limit }: { step: Step; from: Date; to: Date; limit: number },
): Promise<RevenuePoint[]> {
  const coarser = { minute: ["minute"], hour: ["minute", "hour"], day: ["minute", "hour", "day"] };
  const rows = await database.use(
    (sql) => sql<RevenuePoint[]>`
      select date_trunc(kept, at, 'UTC') as at, kept as step, name,
        sum(events)::float8 as events, trim_scale(sum(amount))::text as amount
      from (
        select *, case when step = any(${`{${coarser[step].join()}}`}::text::text[])
          then ${step} else step end as kept from points
      ) as point
      where at >= ${from} and at < ${to}
      group by 1, 2, 3 order by 1, 2, 3 limit ${limit}`,
    READ_DEADLINE_MS,
  );
  return [...rows];
}

/**
 * Folds minutes that are older than a day into hours, and hours older than 90 days into days, by the
 * ledger's own day (boundary.ts): of every checkpoint that has any and that nobody is posting at the moment.
 * Its row is locked, as for a posting. A minute that arrives late is folded into what is kept by then.
 * Returns whether more may be left. Throws Unavailable.
 */
export function foldPoints(database: Database): Promise<boolean> {
  const fold = async (tx: Transaction) => {
    const sources = await tx<{ source: string }[]>`
      select source from checkpoints
      where source in (
        select source from (select source, step, at from points
          union all select source, step, at from snapshot_points) as point, boundary
        where step = 'minute' and at < (day - 1)::timestamp at time zone 'UTC'
          or step = 'hour' and at < (day - 90)::timestamp at time zone 'UTC')
      order by source limit ${MAX_FOLDED_SOURCES} for update skip locked`;
    if (sources.length === 0) return false;
    const [keys] = columns([...sources], "source") as [string];
    for (const table of ["points", "snapshot_points"])
      await tx`
        with due as (
          delete from ${tx(table)} using boundary
          where source = any(${keys}::text::text[])
            and (step = 'minute' and at < (day - 1)::timestamp at time zone 'UTC'
              or step = 'hour' and at < (day - 90)::timestamp at time zone 'UTC')
          returning source, name, events, amount, at,
            case when at < (day - 90)::timestamp at time zone 'UTC' then 'day' else 'hour' end as kept
        )
        insert into ${tx(table)} as known (source, step, at, name, events, amount)
        select source, kept, date_trunc(kept, at, 'UTC'), name, sum(events), sum(amount)
        from due group by 1, 2, 3, 4
        on conflict (source, step, at, name) do update set
          events = known.events + excluded.events, amount = known.amount + excluded.amount`;
    return sources.length === MAX_FOLDED_SOURCES;
  };
  return database.use((sql) => transact(sql, FOLD_TIMEOUT_MS, fold));
}

/** Recounted points of journals, in a temporary table of the transaction `sql`. */
export type PointTally = Awaited<ReturnType<typeof openPointTally>>;

export async function openPointTally(sql: Transaction) {
  await sql`
    create temp table point_tally (
      source text collate "C", step text, at timestamptz, name text collate "C", events bigint,
      amount numeric
    ) on commit drop`;
  return {
    async add(key: string, points: Points): Promise<void> {
      if (points.size === 0) return;
      const [at, name, events, amount] = columns(
        points.rows(),
        "at",
        "name",
        "events",
        "amount",
      ) as [string, string, string, string];
      await sql`
        insert into point_tally
        select ${key}, 'minute', to_timestamp(at), name, events, amount from unnest(
          ${at}::text::bigint[], ${name}::text::text[], ${events}::text::bigint[],
          ${amount}::text::numeric[]) as point (at, name, events, amount)`;
    },
    /** Adds those of the removed segments of the journal `key`. */
    async addSnapshot(key: string): Promise<void> {
      await sql`insert into point_tally select * from snapshot_points where source = ${key}`;
    },
    /** Adds all of them to the snapshot. */
    async keep(): Promise<void> {
      await sql`
        insert into snapshot_points as known (source, step, at, name, events, amount)
        select source, step, at, name, sum(events), sum(amount) from point_tally group by 1, 2, 3, 4
        on conflict (source, step, at, name) do update set
          events = known.events + excluded.events, amount = known.amount + excluded.amount`;
    },
  };
}

/** By how much a point has to change. */
export type PointDifference = Record<
  "source" | "step" | "at" | "name" | "events" | "amount",
  string
>;

/** Where the points of `journals` differ from the tally: on each day at the coarser step of the two. */
export async function findPointDifferences(
  sql: Transaction,
  journals: string[],
): Promise<PointDifference[]> {
  const [keys] = columns(
    journals.map((key) => ({ key })),
    "key",
  ) as [string];
  const rows = await sql<PointDifference[]>`
    with both_sides as (
      select source, step, at, name, -events as events, -amount as amount from points
      where source = any(${keys}::text::text[])
      union all
      select * from point_tally
    ), ranked as (
      select *, max(array_position(array['minute', 'hour', 'day'], step)) over (
        partition by source, date_trunc('day', at, 'UTC')) as rank
      from both_sides
    ), compared as (
      select *, (array['minute', 'hour', 'day'])[rank] as kept from ranked
    )
    select source, kept as step, date_trunc(kept, at, 'UTC')::text as at, name,
      sum(events)::text as events, sum(amount)::text as amount
    from compared group by source, kept, 3, name, date_trunc(kept, at, 'UTC')
    having sum(events) <> 0 or sum(amount) <> 0`;
  return [...rows];
}

/** Corrects points by adding, because posting continues meanwhile. */
export async function correctPoints(
  tx: Transaction,
  differences: PointDifference[],
): Promise<void> {
  if (differences.length === 0) return;
  const [source, step, at, name, events, amount] = columns(
    differences,
    "source",
    "step",
    "at",
    "name",
    "events",
    "amount",
  ) as [string, string, string, string, string, string];
  await tx`
    insert into points as known (source, step, at, name, events, amount)
    select * from unnest(
      ${source}::text::text[], ${step}::text::text[], ${at}::text::timestamptz[],
      ${name}::text::text[], ${events}::text::bigint[], ${amount}::text::numeric[])
    on conflict (source, step, at, name) do update set
      events = known.events + excluded.events, amount = known.amount + excluded.amount`;
  await tx`
    delete from points where source = any(${source}::text::text[]) and events = 0 and amount = 0`;
}

/** All events that the points hold. `since`: from when on, where a ledger is older than its points. */
export interface PostedTotal {
  events: number;
  since: string | null;
}

/** Throws Unavailable. */
export async function readPostedTotal(database: Database): Promise<PostedTotal> {
  const [row] = await database.use(
    (sql) => sql<{ events: number; since: Date | null }[]>`
      select coalesce(sum(events), 0)::float8 as events,
        case when exists (select from checkpoints where points_from > 0) then min(at) end as since
      from points`,
    READ_DEADLINE_MS,
  );
  return { events: row?.events ?? 0, since: row?.since?.toISOString() ?? null };
}
