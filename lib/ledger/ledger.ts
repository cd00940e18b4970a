/**
 * The ledger: balances, and beside them how far each source has been posted.
 *
 * A batch moves the checkpoint and the balances in ONE statement, which itself looks that the
 * checkpoint is still where the batch begins. So it counts once even when the driver, after a lost
 * connection, runs the statement outside its transaction, and whoever lost the answer to a commit
 * finds in the checkpoint whether it happened.
 *
 * Rows are locked in one order, so that nobody waits in a circle: the checkpoint FOR UPDATE, then
 * the users in the order of their bytes, each as it is updated or inserted. Locking the users FOR
 * UPDATE in a statement before that was tried and lost: it cannot lock users who do not exist yet,
 * so that two batches, each holding old rows while it inserts new ones, do wait in a circle (40P01,
 * reproduced with three sessions); and it made four processors slower, 178,000 rows/s to 276,000.
 */
import { formatAmount } from "../event/amount.ts";
import { arrayLiteral, type Database, numbers, type Transaction } from "./database.ts";
import type { Sums } from "../event/sums.ts";

/** The longest a posting may take, and a read for somebody who waits for an answer. */
const POST_DEADLINE_MS = 15_000;
/** The driver is given up this long after Postgres should have given up. */
const GRACE_MS = 5_000;
const READ_DEADLINE_MS = 2_000;

/** Bytes `from` to `to` of a source, folded. */
export interface Batch {
  /** The checkpoint key of its journal or file. */
  key: string;
  from: number;
  to: number;
  /** SHA-256 of the source's bytes before `to`; of a journal, where its last frame begins and its header. */
  digest: string | null;
  /** By how much each user's balance changes. */
  changes: Sums;
  /** Events that count only if nobody has claimed their id, by id. */
  claims: ReadonlyMap<string, Claim>;
  /** Other events under the ids of `claims`. */
  conflicts: readonly Claim[];
  quarantined: readonly Quarantined[];
  /** What does not count, whether or not its ids are claimed. */
  uncounted: readonly Uncounted[];
  /** The sources in the journal that move with it, by source. */
  sources: ReadonlyMap<string, SourceMove>;
  /** How many events it stands for. */
  events: number;
  /** Events that do not count because they came before, as far as that is known without the ledger. */
  duplicates: number;
}

/** An event with an id; `event` is all that makes it this one and no other. */
export interface Claim {
  id: string;
  userId: string;
  amount: bigint;
  event: string;
  /** The bytes of its line in the journal or file. */
  from: number;
  to: number;
  /** Claims of successive runs have nothing between them that may count. */
  run: number;
}

/** The events that begin in bytes `from` to `to` of a source do not count. */
export interface Uncounted {
  from: number;
  to: number;
  why: string;
}

/** A source must be at `from`, and is at `to` afterwards; `digest` is `null` where it stays. */
export interface SourceMove {
  /** Its checkpoint key. */
  key: string;
  from: number;
  to: number;
  digest: string | null;
}

/** A line that can never be posted; `line` is cut, and for people only. */
export interface Quarantined {
  position: number;
  reason: string;
  line: string;
}

/** Why an event with an id is in quarantine, and why it is not counted. */
export const OTHER_EVENT = "its id belongs to another event, which came first";
export const SAME_ID = "the same event came before";

/**
 * What became of a batch. `elsewhere`: its checkpoint is not at `from` any more. `ahead`: some of
 * its sources are further than it expects; fold it again with these positions. Nothing was changed
 * in both.
 */
export type Outcome =
  | { state: "posted"; quarantined: number; duplicates: number }
  | { state: "elsewhere" }
  | { state: "ahead"; posted: Map<string, number> };

/** Notes how events of each name count from now on. */
export async function noteEventTypes(database: Database, types: ReadonlyMap<string, number>) {
  await database.use(
    (sql) => sql`
      insert into event_types (name, sign)
      select * from unnest(
        ${arrayLiteral(types.keys())}::text::text[], ${`{${[...types.values()].join()}}`}::text::smallint[])
      on conflict do nothing`,
    POST_DEADLINE_MS,
  );
}

/** Posts a batch, wholly or not at all; Postgres gives up on it after `timeoutMs`. */
export function post(database: Database, batch: Batch, timeoutMs: number): Promise<Outcome> {
  const posting = async (tx: Transaction): Promise<Outcome> => {
    const { key: source, from } = batch;
    await tx`select set_config('statement_timeout', ${`${timeoutMs}`}, true)`;
    const [checkpoint] = await tx<{ position: string }[]>`
      select position from checkpoints where source = ${source} for update`;
    if (Number(checkpoint?.position) !== from) return { state: "elsewhere" };
    const posted = await lockSources(tx, batch.sources);
    if (posted) return { state: "ahead", posted };
    const { disputed, repeated } = await move(tx, batch);
    const quarantined = batch.quarantined.length + disputed;
    return { state: "posted", quarantined, duplicates: batch.duplicates + repeated };
  };
  return database.use((sql) => sql.begin(posting) as Promise<Outcome>, timeoutMs + GRACE_MS);
}

/** Locks the sources FOR UPDATE, in order; returns where they all are when one is not at `from`. */
async function lockSources(
  tx: Transaction,
  sources: Batch["sources"],
): Promise<Map<string, number> | null> {
  if (sources.size === 0) return null;
  const names = arrayLiteral([...sources.keys()].toSorted());
  await tx`
    insert into checkpoints (source, position)
    select name, 0 from unnest(${names}::text::text[]) as name
    on conflict do nothing`;
  const rows = await tx<{ source: string; position: string }[]>`
    select source, position from checkpoints
    where source = any(${names}::text::text[]) order by source for update`;
  const posted = new Map(rows.map(({ source, position }) => [source, Number(position)]));
  for (const { key, from } of sources.values()) if (posted.get(key) !== from) return posted;
  return null;
}

/**
 * THE statement: checkpoints, balances, ids, quarantine and what is not counted together, and only
 * if every checkpoint is where the batch begins: otherwise it divides by zero, and nothing of it has
 * happened. Returns how many events have ids that belong to other events, and how many came before.
 */
async function move(
  tx: Transaction,
  batch: Batch,
): Promise<{ disputed: number; repeated: number }> {
  const { key: source, from, to, digest } = batch;
  const moves: SourceMove[] = [{ key: source, from, to, digest }, ...batch.sources.values()];
  const { changes, claims, quarantined, uncounted } = batch;
  const hasClaims = claims.size > 0;

  const [row] = await tx<{ disputed: string; repeated: string }[]>`
    with moved as (
      update checkpoints as checkpoint set
        position = move.ends, digest = coalesce(move.digest, checkpoint.digest), posted_at = now()
      from unnest(
        ${arrayLiteral(moves.map(({ key }) => key))}::text::text[],
        ${numbers(moves, ({ from }) => from)}::text::bigint[],
        ${numbers(moves, ({ to }) => to)}::text::bigint[],
        ${arrayLiteral(moves.map(({ digest }) => digest))}::text::text[]
      ) as move (source, begins, ends, digest)
      where checkpoint.source = move.source and checkpoint.position = move.begins
      returning 1
    ), fence as (
      select 1 / (count(*) = ${moves.length})::int as holds from moved
    ), set_aside as (
      insert into quarantine (source, position, reason, line)
      select ${source}, line.* from unnest(
        ${numbers(quarantined, ({ position }) => position)}::text::bigint[],
        ${arrayLiteral(quarantined.map(({ reason }) => reason))}::text::text[],
        ${arrayLiteral(quarantined.map(({ line }) => line))}::text::text[]
      ) as line
      on conflict do nothing
    )${uncounted.length > 0 ? leavingOut(tx, source, uncounted) : tx``}, change as (
      select * from unnest(
        ${changes.userArray()}::text::text[],
        ${changes.amountArray()}::text::numeric[]
      ) as change (user_id, amount)
    )${hasClaims ? claiming(tx, batch) : tx``}, posted as (
      insert into users_revenue as balance (user_id, revenue)
      ${hasClaims ? tx`select user_id, sum(amount) from counted group by user_id` : tx`select * from change`}
      order by user_id collate "C"
      on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
    )
    select holds, ${hasClaims ? counts(tx) : tx`0 as disputed, 0 as repeated`} from fence`;
  return { disputed: Number(row?.disputed ?? 0), repeated: Number(row?.repeated ?? 0) };
}

function counts(tx: Transaction) {
  return tx`
    (select count(*) from disputed) as disputed,
    (select count(*) from late where is_same) as repeated`;
}

function leavingOut(tx: Transaction, source: string, uncounted: readonly Uncounted[]) {
  return tx`, left_out as (
      insert into uncounted (source, from_position, to_position, why)
      select ${source}, range.* from unnest(
        ${numbers(uncounted, ({ from }) => from)}::text::bigint[],
        ${numbers(uncounted, ({ to }) => to)}::text::bigint[],
        ${arrayLiteral(uncounted.map(({ why }) => why))}::text::text[]
      ) as range
      on conflict do nothing
    )`;
}

/**
 * The ids are claimed in order. A row that is there already is touched, not skipped: only so does
 * the statement see one that another transaction has written since it began (xmax tells). What then
 * is the event that stands, once more, does not count; claims in a row are noted as one range, which
 * the difference of turn and row number tells apart. What is another event goes to quarantine.
 */
function claiming(tx: Transaction, { key: source, claims: firsts, conflicts }: Batch) {
  const claims = [...firsts.values()];
  return tx`, claim as (
      select * from unnest(
        ${arrayLiteral(claims.map(({ id }) => id))}::text::text[],
        ${arrayLiteral(claims.map(({ event }) => event))}::text::text[],
        ${arrayLiteral(claims.map(({ userId }) => userId))}::text::text[],
        ${`{${claims.map(({ amount }) => formatAmount(amount)).join()}}`}::text::numeric[],
        ${numbers(claims, ({ from }) => from)}::text::bigint[],
        ${numbers(claims, ({ to }) => to)}::text::bigint[],
        ${numbers(claims, ({ run }) => run)}::text::bigint[]
      ) as claim (id, event, user_id, amount, begins, ends, turn)
    ), claimed as (
      insert into event_ids as known (id, event)
      select id, event from claim order by id collate "C"
      on conflict (id) do update set id = excluded.id
      returning id, event, xmax = 0 as fresh
    ), counted as (
      select user_id, amount from change union all
      select user_id, amount from claim join claimed using (id) where fresh
    ), conflict as (
      select * from unnest(
        ${arrayLiteral(conflicts.map(({ id }) => id))}::text::text[],
        ${arrayLiteral(conflicts.map(({ event }) => event))}::text::text[],
        ${numbers(conflicts, ({ from }) => from)}::text::bigint[],
        ${numbers(conflicts, ({ to }) => to)}::text::bigint[],
        ${numbers(conflicts, ({ run }) => run)}::text::bigint[]
      ) as conflict (id, event, begins, ends, turn)
    ), late as (
      select claim.event, begins, ends, turn, claim.event = claimed.event as is_same
      from claim join claimed using (id) where not fresh union all
      select conflict.event, begins, ends, turn, conflict.event = claimed.event
      from conflict join claimed using (id)
    ), repeated as (
      insert into uncounted (source, from_position, to_position, why)
      select ${source}, min(begins), max(ends), ${SAME_ID}
      from (select *, turn - row_number() over (order by turn) as island from late where is_same) as late
      group by island
      on conflict do nothing
    ), disputed as (
      insert into quarantine (source, position, reason, line)
      select ${source}, begins, ${OTHER_EVENT}, event from late where not is_same
      on conflict do nothing
      returning 1
    )`;
}

/** How many lines of the bytes of a batch are in quarantine. */
export async function countQuarantined(
  database: Database,
  { key: source, from, to }: Batch,
): Promise<number> {
  const [row] = await database.use(
    (sql) => sql<{ count: number }[]>`
      select count(*)::int from quarantine
      where source = ${source} and position >= ${from} and position < ${to}`,
    POST_DEADLINE_MS,
  );
  return row?.count ?? 0;
}

/** Lets go of some ids that are older than `days`; whether there may be more of them. */
export async function pruneIds(database: Database, days: number): Promise<boolean> {
  const some = 10_000;
  const { count } = await database.use(
    (sql) => sql`
      delete from event_ids where id in (
        select id from event_ids where claimed_on < current_date - ${days}::int
        order by claimed_on limit ${some} for update skip locked
      )`,
    POST_DEADLINE_MS,
  );
  return count === some;
}

/** The balance of a user as an exact decimal without trailing zeros; `null`: never posted. */
export async function readBalance(database: Database, userId: string): Promise<string | null> {
  const [row] = await database.use(
    (sql) => sql<{ revenue: string }[]>`
      select trim_scale(revenue)::text as revenue from users_revenue where user_id = ${userId}`,
    READ_DEADLINE_MS,
  );
  return row?.revenue ?? null;
}

/** Returns when balances can be read; throws Unavailable. */
export async function checkLedger(database: Database): Promise<void> {
  await database.use((sql) => sql`select from users_revenue limit 1`, READ_DEADLINE_MS);
}
