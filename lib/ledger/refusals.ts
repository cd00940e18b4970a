/**
 * What Postgres refuses of a batch: constraints, domains, foreign keys and triggers that a team has added
 * to `users_revenue`. The functions in schema.sql try the parts of a batch one by one, and undo everything.
 */
import { arrayLiteral, type Database, transact, type Transaction } from "./database.ts";
import { keyOf } from "./ids.ts";
import type { Batch } from "./ledger.ts";

/** 100,000 users, or 100,000 lines of one user, take between one and two seconds. */
const SEARCH_TIMEOUT_MS = 120_000;
const GRACE_MS = 5_000;

/** An event that would count. `amount` is a decimal. */
export interface CountedLine {
  position: number;
  userId: string;
  amount: string;
  id: string | null;
}

/**
 * Asks Postgres to add zero to some balances, those of the batch first. Returns how many there were, and
 * the reason if it refused them all. Throws Unavailable.
 */
export function findRefusedBalances(
  database: Database,
  batch: Batch,
): Promise<{ tried: number; why: string | null }> {
  return search(database, async (tx) => {
    const [row] = await tx<{ tried: number; why: string | null }[]>`
      select tried, why from daybook_refused_balances(${batch.totals.textArray()}::text::text[])`;
    return row as { tried: number; why: string | null };
  });
}

/**
 * The users whose change Postgres refuses: that of the totals without the claims, and with those that count.
 * Throws Unavailable.
 */
export function findRefusedUsers(database: Database, batch: Batch): Promise<Set<string>> {
  const { claims, totals } = batch;
  const users = arrayLiteral(claims.users(totals));
  const amounts = arrayLiteral(claims.amounts());
  return search(database, async (tx) => {
    const rows = await tx<{ user: string }[]>`
      select refused_user as user from daybook_refused_users(
        ${totals.textArray()}::text::text[] || ${users}::text::text[],
        ${totals.amountArray()}::text::numeric[] ||
          array(select -amount from unnest(${amounts}::text::numeric[]) with ordinality as _ (amount, n) order by n),
        ${claims.idArray()}::text::text[], ${claims.keyArray()}::text::bytea[],
        ${users}::text::text[], ${amounts}::text::numeric[])`;
    return new Set(rows.map(({ user }) => user));
  });
}

/** The lines that Postgres refuses, by position, each with its reason. Throws Unavailable. */
export function findRefusedLines(
  database: Database,
  lines: readonly CountedLine[],
): Promise<Map<number, string>> {
  const users = arrayLiteral(lines.map(({ userId }) => userId));
  const amounts = arrayLiteral(lines.map(({ amount }) => amount));
  const ids = arrayLiteral(lines.map(({ id }) => id));
  const keys = arrayLiteral(lines.map(({ id }) => (id === null ? null : keyOf(id))));
  return search(database, async (tx) => {
    const rows = await tx<{ index: string; why: string }[]>`
      select index, why from daybook_refused_lines(
        ${users}::text::text[], ${amounts}::text::numeric[], ${ids}::text::text[],
        ${keys}::text::bytea[])`;
    return new Map(rows.map(({ index, why }) => [lines[Number(index) - 1]?.position ?? 0, why]));
  });
}

function search<T>(database: Database, find: (tx: Transaction) => Promise<T>): Promise<T> {
  const deadlineMs = SEARCH_TIMEOUT_MS + GRACE_MS;
  return database.use((sql) => transact(sql, SEARCH_TIMEOUT_MS, find), deadlineMs);
}
