/**
 * The quarantine: lines that did not count, by source and position. A line leaves it in the same
 * statement that posts it, so it counts once however often and by however many it is retried. (Beside
 * reconcile.ts, because the two have nothing in common but the lock that a retry holds.)
 */
import { formatAmount } from "../event/amount.ts";
import type { Change } from "../event/event.ts";
import type { Sql, Statements } from "./database.ts";
import { SAME_ID } from "./ledger.ts";

const ROWS_PER_PAGE = 500;

/** `key` is the checkpoint key of the line's source; `line` may be cut. */
export interface QuarantinedLine {
  key: string;
  position: number;
  reason: string;
  line: string;
  at: Date;
}

/** All lines in quarantine, a page at a time, in the order of key and position. */
export async function* readQuarantine(sql: Statements): AsyncGenerator<QuarantinedLine[]> {
  let last: QuarantinedLine | undefined;
  do {
    const rows: QuarantinedLine[] = await sql<QuarantinedLine[]>`
      select source as key, position::float8, reason, line, at from quarantine
      where (source, position) > (${last?.key ?? ""}, ${last?.position ?? -1})
      order by source, quarantine.position limit ${ROWS_PER_PAGE}`;
    yield rows;
    last = rows.at(-1);
  } while (last);
}

/** The event that has claimed `id`, or `null`. */
export async function readClaim(sql: Statements, id: string): Promise<string | null> {
  const [known] = await sql<{ event: string }[]>`select event from event_ids where id = ${id}`;
  return known?.event ?? null;
}

/** Removes a line from the quarantine whose event has already counted: it does not count again. */
export async function settleRepeated(sql: Statements, row: QuarantinedLine): Promise<void> {
  await sql`
    with released as (
      delete from quarantine where source = ${row.key} and position = ${row.position} returning 1
    )
    insert into uncounted (source, from_position, to_position, why)
    select ${row.key}, ${row.position}::bigint, ${row.position}::bigint + 1, ${SAME_ID} from released
    on conflict do nothing`;
}

/**
 * Posts a line and removes it from the quarantine, in one statement. Divides by zero, and changes
 * nothing, if its id is claimed at the same moment. A line of a removed segment becomes part of that
 * journal's snapshot.
 */
export async function postQuarantined(
  sql: Sql,
  { key, position }: QuarantinedLine,
  { userId, sign, amount, claim }: Change & { claim: { id: string; event: string } | null },
): Promise<void> {
  const claiming = claim
    ? sql`insert into event_ids (id, event) select ${claim.id}, ${claim.event} from released
          on conflict do nothing returning 1`
    : sql`select 1 from released`;
  await sql`
    with released as (
      delete from quarantine where source = ${key} and position = ${position} returning 1
    ), claimed as (${claiming}), posted as (
      insert into users_revenue as balance (user_id, revenue)
      select ${userId}, ${formatAmount(amount)}::numeric from released where ${sign !== 0}
      on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
    ), kept as (
      insert into snapshots as snapshot (source, user_id, revenue)
      select ${key}, ${userId}, ${formatAmount(amount)}::numeric
      from released, removed
      where removed.source = ${key} and removed.position > ${position} and ${sign !== 0}
      on conflict (source, user_id) do update set revenue = snapshot.revenue + excluded.revenue
    )
    select 1 / ((select count(*) from claimed) = (select count(*) from released))::int`;
}
