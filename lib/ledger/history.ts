/** What the ledger knows of one user's events. */
import type { Statements } from "./database.ts";

/** What the source `key` had added to the user's balance before the end of its snapshot; `null`: nothing. */
export async function readSnapshotOf(sql: Statements, key: string, userId: string) {
  const [row] = await sql<{ revenue: string }[]>`
    select revenue::text from snapshots where source = ${key} and user_id = ${userId}`;
  return row?.revenue ?? null;
}

/** Why the line at `position` of the source `key` does not count. */
export async function readReason(sql: Statements, key: string, position: number): Promise<string> {
  const [row] = await sql<{ why: string }[]>`
    select why from uncounted
    where source = ${key} and from_position <= ${position} and to_position > ${position}
    union all
    select why from packed_uncounted, unnest(starts, packed_uncounted.ends) as range (begins, ends)
    where source = ${key} and from_position + range.begins <= ${position}
      and from_position + range.ends > ${position}
    union all
    select 'in quarantine: ' || reason from quarantine
    where source = ${key} and position = ${position}
    union all
    select 'in quarantine: ' || reason from packed_quarantine
    where source = ${key} and from_position <= ${position}
      and ${position}::bigint - from_position = any(positions)
    limit 1`;
  return row?.why ?? "does not count";
}
