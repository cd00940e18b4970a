/**
 * The ledger: balances, and the one statement that changes them (`post.sql`) with what belongs to it.
 *
 * A batch moves its checkpoint and the balances in one statement, which checks that the checkpoint is
 * still where the batch begins. So the batch counts once even if the driver, after a lost connection,
 * runs the statement outside its transaction; and when the answer to a COMMIT is lost, the checkpoint
 * says whether the COMMIT happened.
 *
 * Before it, the transaction locks the checkpoints FOR UPDATE, so that most conflicts are found before
 * any work is done. Nobody waits for a batch's own checkpoint: if it is locked, another processor posts from
 * it, and a wait would hold a connection for as long as that batch takes, to post nothing then. It does not
 * lock the users. That was tried and lost: users that do not exist yet
 * cannot be locked, so two batches that each hold old rows while they insert new ones do deadlock
 * (40P01, reproduced with three sessions); and four processors became slower, from 276,000 to 178,000
 * rows/s.
 */
import {
  arrayLiteral,
  columns,
  type Database,
  LEDGER_VERSION,
  type PostgresError,
  READ_DEADLINE_MS,
  RowRefused,
  type Sql,
  transact,
  type Transaction,
} from "./database.ts";
import type { Claims } from "./claims.ts";
import { hashOfIdentity, keyOf } from "./ids.ts";
import postSql from "./post.sql" with { type: "text" };
import type { Points } from "../event/points.ts";
import type { Sums } from "../event/sums.ts";

/** How much later than Postgres the driver gives up on a posting. */
const GRACE_MS = 5_000;
const WORK_MEM = "64MB";
/** The error of the fence in post.sql. */
const CHECKPOINT_HAS_MOVED = "daybook.checkpoint_has_moved";
/** The error of post.sql where it needs the lines of claims. */
const UNDECIDED = "daybook.undecided";
const UNIQUE_VIOLATION = "23505";

/** Without its comments: `pg_stat_activity` shows only the first 1,024 bytes of a statement. */
const STATEMENT = postSql.replace(/^ *--.*\n/gm, "");

/** Why an event with an id is in quarantine, and why one is not counted. The ledger holds these texts. */
export const OTHER_EVENT = "its id belongs to another event, which came first";
export const SAME_ID = "the same event came before";

/** A checkpoint must be at `from` and is moved to `to`; its digest stays where `digest` is `null`. */
export interface Move {
  /** The key of the checkpoint. */
  key: string;
  from: number;
  to: number;
  digest: string | null;
}

/** Bytes `from` to `to` of a journal or file, folded. */
export interface Batch extends Move {
  /** By how much each user's balance changes, if all claims count. */
  totals: Sums;
  /** The same by minute and name. */
  points: Points;
  /** Events that count only if their id is free. */
  claims: Claims;
  /** Other events under the ids of `claims`, by the keyed digest of their identity. */
  conflicts: ReadonlyMap<string, Conflict>;
  quarantined: readonly Quarantined[];
  /** What does not count, whether or not its ids are free. */
  uncounted: readonly Uncounted[];
  /** The sources in the journal that move with the batch, by the keys of their checkpoints. */
  sources: ReadonlyMap<string, Move>;
  /** How many of `quarantined` Postgres refuses. */
  refusals: number;
  /** How many events count, as far as is known without the ledger. */
  events: number;
  /** How many do not count because they came before, as far as is known without the ledger. */
  duplicates: number;
}

/** An event under the id of another one. */
export interface Conflict {
  id: string;
  /** The event's identity: two events of one identity are the same event. */
  event: string;
  /** The bytes of its line. */
  from: number;
  to: number;
  /** How many lines before it in the batch may count. */
  run: number;
}

/** The events that begin in bytes `from` to `to` do not count. */
export interface Uncounted {
  from: number;
  to: number;
  why: string;
}

/** A line that can never be posted. `line` is cut, and for people only. */
export interface Quarantined {
  position: number;
  reason: string;
  line: string;
}

/**
 * What became of a batch. `elsewhere`: its checkpoint is no longer at `from`, or is locked by another posting. `ahead`: some of its
 * sources are not where it expects them; fold again with these positions. `refused`: Postgres refuses what a
 * row would contain (see refusals.ts). All three changed nothing.
 */
export type Outcome =
  | ({ state: "posted" } & Counts)
  | { state: "elsewhere" }
  | { state: "ahead"; posted: Map<string, number> }
  | { state: "refused"; batch: Batch; reason: string };

/** What became of the lines of a batch. */
export interface Counts {
  /** How many events have changed a balance, or are of a type that does not. */
  events: number;
  /** How many are in quarantine because their ids belong to other events. */
  conflicts: number;
  /** How many did not count because they came before. */
  duplicates: number;
}

/** Notes how events of each name count from now on. Throws Unavailable. */
export async function noteEventTypes(database: Database, types: ReadonlyMap<string, number>) {
  await database.use(
    (sql) => sql`
      insert into event_types (name, sign)
      select * from unnest(
        ${arrayLiteral(types.keys())}::text::text[], ${arrayLiteral(types.values())}::text::smallint[])
      on conflict do nothing`,
  );
}

/** What the tables that postings change take on the disk, with their indexes. Throws Unavailable. */
export async function readLedgerBytes(database: Database): Promise<number> {
  const [row] = await database.use(
    (sql) => sql<{ bytes: number }[]>`
      select sum(pg_total_relation_size(name))::float8 as bytes
      from unnest(array['users_revenue', 'ids', 'points', 'quarantine', 'uncounted']::regclass[]) as name`,
  );
  return row?.bytes ?? 0;
}

/**
 * Posts a batch, wholly or not at all. Postgres gives up after `timeoutMs`. Throws Unavailable; the
 * batch may then have been posted or not.
 */
export function post(database: Database, batch: Batch, timeoutMs: number): Promise<Outcome> {
  const posting =
    (withLines: boolean) =>
    async (tx: Transaction): Promise<Outcome> => {
      // The newest of the old ids: of those that were pruned, the index still has entries.
      // Sorting 100,000 ids in 4 MB, the usual limit, would take a temporary file.
      const [checkpoint] = await tx<{ position: number; hasOldIds: boolean }[]>`
      select position::float8, set_config('work_mem', ${WORK_MEM}, true),
        (select claimed_on from event_ids order by claimed_on desc limit 1) is not null as "hasOldIds"
      from checkpoints where source = ${batch.key} for update skip locked`;
      if (checkpoint?.position !== batch.from) return { state: "elsewhere" };
      const posted = await lockSources(tx, batch.sources);
      if (posted) return { state: "ahead", posted };
      const { hasOldIds } = checkpoint;
      const { late, disputed, repeated } = await move(tx, batch, { hasOldIds, withLines });
      const duplicates = batch.duplicates + repeated;
      return { state: "posted", events: batch.events - late, conflicts: disputed, duplicates };
    };
  const decide = async (sql: Sql, withLines = false): Promise<Outcome> =>
    transact(sql, timeoutMs, posting(withLines)).catch((error: PostgresError) => {
      if (error.message.includes(UNDECIDED)) return decide(sql, true);
      // Another transaction has claimed an id of the batch meanwhile.
      if (error.code === UNIQUE_VIOLATION && error.table_name === "ids")
        return decide(sql, withLines);
      throw error;
    });
  return database
    .use((sql) => decide(sql), timeoutMs + GRACE_MS)
    .catch((error: Error) => {
      if (error instanceof RowRefused) return { state: "refused", batch, reason: error.reason };
      // The driver ran the statement outside its transaction, after another processor had posted the batch.
      if (error.message.includes(CHECKPOINT_HAS_MOVED)) return { state: "elsewhere" };
      throw error;
    });
}

/** Locks the sources in order; returns the positions of all of them if one is not at `from`. */
async function lockSources(
  tx: Transaction,
  sources: Batch["sources"],
): Promise<Map<string, number> | null> {
  if (sources.size === 0) return null;
  const keys = arrayLiteral([...sources.keys()].toSorted());
  await tx`
    insert into checkpoints (source, position)
    select key, 0 from unnest(${keys}::text::text[]) as key
    on conflict do nothing`;
  const rows = await tx<{ key: string; position: number }[]>`
    select source as key, position::float8 from checkpoints
    where source = any(${keys}::text::text[]) order by source for update`;
  const posted = new Map(rows.map(({ key, position }) => [key, position]));
  for (const { key, from } of sources.values()) if (posted.get(key) !== from) return posted;
  return null;
}

/** Runs `post.sql`. Returns how many claims came late, and how many events are in dispute or repeated. */
async function move(
  tx: Transaction,
  batch: Batch,
  { hasOldIds, withLines }: { hasOldIds: boolean; withLines: boolean },
) {
  const { claims, totals, points } = batch;
  const conflicts = [...batch.conflicts.values()];
  const [row] = await tx.unsafe<{ late: number; disputed: number; repeated: number }[]>(
    STATEMENT,
    [
      batch.key,
      ...columns([batch, ...batch.sources.values()], "key", "from", "to", "digest"),
      claims.size > 0 ? totals.countArray() : "{}",
      claims.array("billionths"),
      claims.keyArray(),
      claims.hashArray(),
      ...(["user", "whole", "from", "to", "run", "point"] as const).map((name) =>
        claims.array(name),
      ),
      arrayLiteral(conflicts.map(({ id }) => keyOf(id))),
      arrayLiteral(conflicts.map(({ event }) => hashOfIdentity(event))),
      ...columns(conflicts, "from", "to", "run"),
      ...columns(batch.quarantined, "position", "reason", "line"),
      OTHER_EVENT,
      ...columns(batch.uncounted, "from", "to", "why"),
      SAME_ID,
      LEDGER_VERSION,
      ...columns(points.rows(), "at", "name", "events", "amount"),
      batch.from,
      totals.textArray(),
      totals.amountArray(),
      hasOldIds ? claims.idArray() : "{}",
      withLines ? arrayLiteral(claims.identities(totals, points)) : "{}",
      ...columns(conflicts, "event"),
      totals.size,
    ],
    // For what is rare, a plan with the true numbers of rows: it joins large arrays.
    { prepare: !hasOldIds && !withLines && conflicts.length === 0 },
  );
  return row as { late: number; disputed: number; repeated: number };
}

/** How many lines of the bytes of a batch are in quarantine. Throws Unavailable. */
export async function countQuarantined(database: Database, { key, from, to }: Batch) {
  const [row] = await database.use(
    (sql) => sql<{ count: number }[]>`
      select count(*)::int + coalesce((
        select sum(cardinality(positions)) from packed_quarantine
        where source = ${key} and from_position = ${from}), 0)::int as count
      from quarantine where source = ${key} and position >= ${from} and position < ${to}`,
  );
  return row?.count ?? 0;
}

/** Returns if balances can be read. Throws Unavailable. */
export async function checkLedger(database: Database): Promise<void> {
  await database.use((sql) => sql`select from users_revenue limit 1`, READ_DEADLINE_MS);
}
