/**
 * The quarantine: lines that did not count, by source and position. A line leaves it in the same
 * statement that posts it, so it counts once however often and by however many it is retried. (Beside
 * reconcile.ts, because the two have nothing in common but the lock that a retry takes.)
 */
import { formatAmount } from "../event/amount.ts";
import type { Change } from "../event/event.ts";
import {
  arrayLiteral,
  columns,
  type Database,
  LEDGER_VERSION,
  READ_DEADLINE_MS,
  type Statements,
  type Transaction,
} from "./database.ts";
import { hashOfIdentity, keyOf } from "./ids.ts";
import { type Quarantined, SAME_ID } from "./ledger.ts";

const ROWS_PER_PAGE = 500;
const PACKED_PER_PAGE = 2_000;
const MAX_DISMISSED = 10_000;

/** `key` is the checkpoint key of the line's source; `line` may be cut. */
export interface QuarantinedLine extends Quarantined {
  key: string;
  at: Date;
}

/** The lines in quarantine after `last`, a page of them, in the order of key and position. */
export async function readQuarantine(
  sql: Statements,
  last?: QuarantinedLine,
): Promise<QuarantinedLine[]> {
  return sql<QuarantinedLine[]>`
    select source as key, position::float8, reason, line, at from quarantine
    where (source, position) > (${last?.key ?? ""}, ${last?.position ?? -1})
    order by source, quarantine.position limit ${ROWS_PER_PAGE}`;
}

/** A line of which the ledger knows its position alone. Its batch begins at `from`. */
export type PackedLine = Omit<QuarantinedLine, "line"> & { from: number };

/** The packed lines after `last`, a page of them and of one batch, in the order of key and position. */
export async function readPackedQuarantine(
  sql: Statements,
  last?: PackedLine,
): Promise<PackedLine[]> {
  const { key = "", from = -1, position = -1 } = last ?? {};
  return sql<PackedLine[]>`
    with next as (
      select source, from_position from packed_quarantine
      where (source, from_position) >= (${key}, ${from}::bigint)
        and (source, from_position, from_position + positions[cardinality(positions)])
          > (${key}, ${from}::bigint, ${position}::bigint)
      order by source, from_position limit 1
    )
    select source as key, from_position::float8 as "from", (from_position + index)::float8 as position, reason, at
    from packed_quarantine join next using (source, from_position), unnest(positions) as index
    where (source, from_position + index) > (${key}, ${position}::bigint)
    order by from_position + index limit ${PACKED_PER_PAGE}`;
}

/** The hashes of the identities of the events that claimed `ids`, by id. */
export async function readClaims(
  sql: Statements,
  ids: Iterable<string>,
): Promise<Map<string, string>> {
  const pairs = Array.from(ids, (id) => ({ id, key: keyOf(id) }));
  const [texts, keys] = columns(pairs, "id", "key") as [string, string];
  const rows = await sql<{ id: string; hash: string }[]>`
    select wanted.id, replace(coalesce(known.event, daybook_identity(old.event))::text, '-', '') as hash
    from unnest(${texts}::text::text[], ${keys}::text::bytea[]) as wanted (id, key)
      left join ids as known on known.id = wanted.key
      left join event_ids as old on old.id = wanted.id
    where known.id is not null or old.id is not null`;
  return new Map(rows.map(({ id, hash }) => [id, hash]));
}

/**
 * Takes lines of one batch out of what is packed: one with a text becomes a line in quarantine, so that it can
 * be released; one whose `line` is `null` has come before, and counts no more. A row is rewritten once, for all
 * of them. Returns the positions of the lines that were still there.
 */
export async function unpack(
  tx: Transaction,
  { key, from }: Pick<PackedLine, "key" | "from">,
  lines: { position: number; line: string | null }[],
): Promise<Set<number>> {
  await tx`
    select from packed_quarantine where source = ${key} and from_position = ${from} for update`;
  const [positions, texts] = columns(lines, "position", "line") as [string, string];
  const rows = await tx<{ position: number }[]>`
    with wanted as (
      select * from unnest(${positions}::text::bigint[], ${texts}::text::text[]) as wanted (position, line)
    ), taken as (
      select source, wanted.position, index, reason, line, at
      from packed_quarantine cross join unnest(positions) as index
        join wanted on wanted.position = from_position + index
      where source = ${key} and from_position = ${from}
    ), kept as (
      update packed_quarantine as packed set positions = array(
        select unnest(packed.positions) except select index from taken order by 1)
      where source = ${key} and from_position = ${from}
    ), unpacked as (
      insert into quarantine (source, position, reason, line, at)
      select source, position, reason, line, at from taken where line is not null
    ), repeated as (
      insert into packed_uncounted as packed (source, from_position, why, starts, ends)
      select source, ${from}::bigint, ${SAME_ID}, array_agg(index order by index), array_agg(index + 1 order by index)
      from taken where line is null group by source
      on conflict (source, from_position, why) do update set
        starts = array(select unnest(packed.starts || excluded.starts) order by 1),
        ends = array(select unnest(packed.ends || excluded.ends) order by 1)
    )
    select position::float8 from taken`;
  await tx`
    delete from packed_quarantine
    where source = ${key} and from_position = ${from} and positions = '{}'`;
  return new Set(rows.map(({ position }) => position));
}

/** Packs again what `unpack` took out and could not be released. */
export async function repack(
  database: Database,
  { key, from }: Pick<PackedLine, "key" | "from">,
  positions: number[],
): Promise<void> {
  await database.use(
    (sql) => sql`
      with lines as (
        delete from quarantine
        where source = ${key} and position = any(${arrayLiteral(positions)}::text::bigint[])
        returning source, reason, at, (position - ${from}::bigint)::int as index
      )
      insert into packed_quarantine as packed (source, from_position, reason, positions, at)
      select source, ${from}::bigint, reason, array_agg(index order by index), min(at)
      from lines group by source, reason
      on conflict (source, from_position, reason) do update set
        positions = array(select unnest(packed.positions || excluded.positions) order by 1)`,
  );
}

/** What is known of a line beside its event. */
interface Released {
  event: string | null;
  /** When a server stored it; `null` for a line of a file. */
  atMs: number | null;
}

/** A line as the API answers it; `at` has microseconds, because all lines of a batch have the same time. */
export interface ListedLine {
  source: string;
  position: number;
  reason: string;
  line: string;
  at: string;
}

/** Up to `limit` lines in quarantine, the newest first, after `after`; those that begin in `maxBytes`. Throws Unavailable. */
export async function readNewestQuarantine(
  database: Database,
  {
    after,
    limit,
    maxBytes,
  }: {
    after: Pick<ListedLine, "at" | "source" | "position"> | null;
    limit: number;
    maxBytes: number;
  },
): Promise<ListedLine[]> {
  const { at = "infinity", source = "", position = 0 } = after ?? {};
  const rows = await database.use(
    (sql) => sql<ListedLine[]>`
      select source, position, reason, line, at from (
        select source, position::float8, reason, line,
          to_json(at at time zone 'UTC') #>> '{}' || 'Z' as at,
          sum(octet_length(line)) over newest - octet_length(line) as bytes_before
        from quarantine
        where (at, source, position) < (${at}::text::timestamptz, ${source}, ${position}::bigint)
        window newest as (order by at desc, source desc, position desc rows unbounded preceding)
        order by quarantine.at desc, source desc, quarantine.position desc limit ${limit}
      ) as page where bytes_before < ${maxBytes}`,
    READ_DEADLINE_MS,
  );
  return [...rows];
}

/** How many lines are in quarantine, of which `most` are counted. Throws Unavailable. */
export async function countQuarantine(database: Database, most: number): Promise<number> {
  const [row] = await database.use(
    (sql) => sql<{ count: number }[]>`
      select count(*)::int as count from (
        (select 1 from quarantine limit ${most}) union all
        (select unnest(positions) from packed_quarantine limit ${most}) limit ${most}
      ) as line`,
    READ_DEADLINE_MS,
  );
  return row?.count ?? 0;
}

/**
 * Posts the event of a line and removes the line from the quarantine, in one statement. An event that has
 * already counted does not count again. Changes nothing if its id belongs to another event (`disputed`), or the
 * line is not in the quarantine any more (`gone`). `event` is the identity of an event whose id is to be claimed. A line of a removed segment becomes
 * part of that journal's snapshot. Revenue over time changes in the minute of `atMs`, or, for `null`, now.
 */
export async function release(
  sql: Statements,
  { key, position }: QuarantinedLine,
  { userId, name, sign, amount, id = "", event, atMs }: Change & Released,
): Promise<"posted" | "disputed" | "gone"> {
  const hash = event === null ? null : hashOfIdentity(event);
  const [row] = await sql<{ disputed: boolean; released: boolean }[]>`
    with line as (
      select from quarantine where source = ${key} and position = ${position} for update
    ), old as (
      select daybook_identity(event) as event from event_ids, line where id = ${id} and ${event !== null}
    ), tried as (
      insert into ids as known (id, event, day)
      select ${keyOf(id)}::text::bytea, ${hash}::text::uuid,
        daybook_day(greatest((now() at time zone 'UTC')::date, day))
      from line, boundary where ${event !== null} and not exists (select from old)
      -- Only so is a row seen that another transaction committed after this statement began.
      on conflict (id) do update set id = excluded.id
      returning event, xmax = 0 as fresh
    ), claimed as (
      select event <> ${hash}::text::uuid as is_other, fresh
      from (select * from tried union all select event, false from old) as owner
    ), released as (
      delete from quarantine where source = ${key} and position = ${position}
        and not exists (select from claimed where is_other)
      returning 1
    ), counted as (
      select from released
      where ${sign !== 0} and not exists (select from claimed where not fresh)
    ), repeated as (
      insert into uncounted (source, from_position, to_position, why)
      select ${key}, ${position}::bigint, ${position}::bigint + 1, ${SAME_ID}
      from released, claimed where not fresh
      on conflict do nothing
    ), posted as (
      insert into users_revenue as balance (user_id, revenue)
      select ${userId}, ${formatAmount(amount)}::numeric from counted
      on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
      returning 1
    ), point as (
      select ${key} as source, 'minute' as step, to_timestamp(60 * floor(
          coalesce(${atMs}::float8 / 1000, extract(epoch from now())) / 60)) as at,
        ${name} as name, 1 as events, ${formatAmount(amount)}::numeric as amount
      from released, checkpoints as checkpoint
      where checkpoint.source = ${key} and points_from <= ${position}
        and not exists (select from claimed where not fresh)
    ), charted as (
      insert into points as known (source, step, at, name, events, amount) select * from point
      on conflict (source, step, at, name) do update set
        events = known.events + 1, amount = known.amount + excluded.amount
    ), chart_kept as (
      insert into snapshot_points as known (source, step, at, name, events, amount)
      select point.* from point join removed using (source) where removed.position > ${position}
      on conflict (source, step, at, name) do update set
        events = known.events + 1, amount = known.amount + excluded.amount
    ), kept as (
      insert into snapshots as snapshot (source, user_id, revenue)
      select ${key}, ${userId}, ${formatAmount(amount)}::numeric from counted, removed
      where removed.source = ${key} and removed.position > ${position}
      on conflict (source, user_id) do update set revenue = snapshot.revenue + excluded.revenue
    )
    select exists (select from claimed where is_other) as disputed,
      exists (select from released) as released,
      daybook_require_balances(${LEDGER_VERSION}),
      -- As in post.sql: an error where a trigger skips the row, so that the line stays.
      case when exists (select from counted) and not exists (select from posted)
        then current_setting('daybook.row_skipped')::int end as skipped`;
  return row?.disputed ? "disputed" : row?.released ? "posted" : "gone";
}

/** Lines in the quarantine: of one source, or one of its lines. */
export interface Place {
  key: string;
  position: number | null;
}

/**
 * Takes lines out of the quarantine for good: no recount counts them. `null` stands for all. Returns how
 * many there were. Throws Unavailable; what was dismissed until then stays so.
 */
export async function dismiss(database: Database, place: Place | null): Promise<number> {
  let total = 0;
  for (;;) {
    const [row] = await database.use(
      (sql) => sql<{ count: number }[]>`
        with dismissed as (
          delete from quarantine where (source, position) in (
            select source, position from quarantine
            where source = coalesce(${place?.key ?? null}, source)
              and position = coalesce(${place?.position ?? null}::bigint, position)
            limit ${MAX_DISMISSED} for update skip locked
          )
          returning source, position, reason
        ), left_out as (
          insert into uncounted (source, from_position, to_position, why)
          select source, position, position + 1, 'dismissed: ' || reason from dismissed
          where not exists (
            select from removed
            where removed.source = dismissed.source and removed.position > dismissed.position)
          on conflict do nothing
        )
        select count(*)::int as count from dismissed`,
    );
    total += row?.count ?? 0;
    if ((row?.count ?? 0) < MAX_DISMISSED) break;
  }
  return total + (await dismissPacked(database, place));
}

/** The same for what is packed. The row of a single line is replaced by one without it. */
async function dismissPacked(database: Database, place: Place | null): Promise<number> {
  const { key, position } = place ?? { key: null, position: null };
  const [row] = await database.use(
    (sql) => sql<{ count: number }[]>`
      with found as (
        delete from packed_quarantine
        where source = coalesce(${key}, source)
          and (${position}::bigint is null or ${position}::bigint - from_position = any(positions))
        returning *
      ), dismissed as (
        select *, case when ${position}::bigint is null then positions
          else array[(${position}::bigint - from_position)::int] end as starts
        from found
      ), kept as (
        insert into packed_quarantine (source, from_position, reason, positions, at)
        select source, from_position, reason, array_remove(positions, starts[1]), at
        from dismissed where ${position}::bigint is not null and cardinality(positions) > 1
      ), left_out as (
        insert into packed_uncounted as packed (source, from_position, why, starts, ends)
        select source, from_position, 'dismissed: ' || reason, starts, array(select unnest(starts) + 1)
        from dismissed
        where not exists (
          select from removed where removed.source = dismissed.source
            and removed.position > from_position + starts[cardinality(starts)])
        on conflict (source, from_position, why) do update set
          starts = array(select unnest(packed.starts || excluded.starts) order by 1),
          ends = array(select unnest(packed.ends || excluded.ends) order by 1)
      )
      select coalesce(sum(cardinality(starts)), 0)::int as count from dismissed`,
  );
  return row?.count ?? 0;
}
