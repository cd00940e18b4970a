/** The tables of a ledger as streams of COPY, whose text format every version of Postgres reads. */
import { Readable } from "node:stream";
import { finished, pipeline } from "node:stream/promises";

import type { Transaction } from "./database.ts";

/** All tables of a ledger but `ledger_version`, as schema.sql creates them. */
export const TABLES = [
  "users_revenue",
  "checkpoints",
  "event_types",
  "event_ids",
  "ids",
  "uncounted",
  "packed_uncounted",
  "removed",
  "snapshots",
  "boundary",
  "segments",
  "points",
  "snapshot_points",
  "quarantine",
  "packed_quarantine",
] as const;

/** Transactions in which nothing else can be sent, because a COPY is under way. */
const copying = new WeakSet<object>();

export function isCopying(tx: Transaction): boolean {
  return copying.has(tx);
}

/** The columns of a table that hold something of their own. */
export async function listColumns(tx: Transaction, table: string): Promise<string[]> {
  const rows = await tx<{ name: string }[]>`
    select attname as name from pg_attribute
    where attrelid = ${table}::text::regclass and attnum > 0 and not attisdropped and attgenerated = ''
    order by attnum`;
  return rows.map(({ name }) => name);
}

/** The rows of a table, as text. */
export async function* copyOut(
  tx: Transaction,
  { table, columns }: { table: string; columns: string[] },
): AsyncGenerator<Uint8Array> {
  // A partitioned table can only be copied as a query.
  const query = tx.unsafe(`copy (select ${quote(columns)} from ${table}) to stdout`);
  copying.add(tx);
  const rows = await query.readable();
  try {
    for await (const bytes of rows.iterator({ destroyOnReturn: false })) yield bytes as Uint8Array;
  } finally {
    // Where the caller fails, the rest is read, or the transaction could not even be rolled back.
    await finished(rows.resume()).catch(() => {}); // the loop has thrown it
    copying.delete(tx);
  }
}

/** Adds rows to a table, as `copyOut` returns them. */
export async function copyIn(
  tx: Transaction,
  { table, columns }: { table: string; columns: string[] },
  rows: AsyncIterable<Uint8Array>,
): Promise<void> {
  copying.add(tx);
  try {
    const query = tx.unsafe(`copy ${table} (${quote(columns)}) from stdin`);
    await pipeline(Readable.from(rows, { objectMode: false }), await query.writable());
  } finally {
    copying.delete(tx);
  }
}

/**
 * Locks the ledger against postings, and removes what every start writes. Returns what has been posted
 * instead, if anything has: then nothing is removed.
 */
export async function emptyLedger(tx: Transaction): Promise<{ key: string; position: number }[]> {
  await tx`lock table checkpoints, users_revenue in exclusive mode`;
  const posted = await tx<{ key: string; position: number }[]>`
    (select source as key, position::float8 from checkpoints where position > 0 order by source desc)
    union all
    (select 'users_revenue', count(*)::float8 from users_revenue having count(*) > 0)`;
  if (posted.length === 0) for (const table of TABLES) await tx`delete from ${tx(table)}`;
  return [...posted];
}

/** For the plans of a recount, which otherwise takes the tables for empty. */
export async function analyze(tx: Transaction): Promise<void> {
  for (const table of TABLES) await tx`analyze ${tx(table)}`;
}

function quote(columns: string[]): string {
  return columns.map((name) => `"${name.replaceAll('"', '""')}"`).join(", ");
}
