-- Posts one batch: checkpoints, balances, points of revenue over time, ids, quarantine and what does not
-- count, wholly or not at all.
--
-- It is ONE statement because the driver, after a lost connection, can run a statement outside its
-- transaction. So it checks by itself that each checkpoint is where the batch begins. If one is not,
-- `fence` raises an error, and nothing has happened.
--
--     move ──────> moved ──────> fence        each checkpoint moves, only if it is where it `begins`
--
--     total ───────────────────> posted       balances are added to, never overwritten: by the totals if
--     change ──────────────────────^          all claims are fresh, else by changes and fresh claims
--     claim ─────> claimed ────────┤          an id counts for the event that claims it first;
--                                  v          what comes later under it does not count:
--     conflict ──> taken ──────> late ──┬──>  left_out   (uncounted) if it is the same event
--                                  │    └──>  set_aside  (quarantine) if it is another one, each once
--     point ───────────────────> charted      revenue over time, without what came later
--     lines that are not events ───────────>  set_aside, those beyond a bound in one row
--     ranges that do not count ────────────>  left_out, or if there are many: packed, in one row
--
-- The error of `fence` is that of a setting which does not exist (42704). It is outside the classes 22 and
-- 23, which say that Postgres refuses what a row contains.
--
-- `daybook_require_balances` raises an error if `users_revenue` has been altered so that it is not exact any
-- more, or the ledger has another version than $29. It sees what the statement sees, under its locks.
--
-- Rows are locked in one order, in every processor, so that no two wait for each other in a circle:
--
--     1. checkpoints: `fence` is read first, and the transaction has locked them in order before
--     2. ids, in the order of their bytes: all that follows reads `claimed`
--     3. users, in the order of their bytes, each as it is updated or inserted
--     4. rows that belong to the batch's own checkpoint, which no other batch touches
--
-- `whole` compares the number of ids that were inserted with that of the claims, and one-time filters switch
-- off what is not needed: where every id is free, as in nearly every batch, nothing is looked up, and the
-- sums per user are those of the program. (In Postgres alone: 113,000 to 121,000 fresh ids a second, against
-- 90,000 to 107,000 with the join.)
-- A batch without claims is always whole.
--
-- Of an id that another transaction claimed after this statement began, the row cannot be seen. And the
-- lines of claims ($38) are needed only for the quarantine, so they are sent only after one was missed. Both
-- end in the error `undecided`: nothing has happened, and the batch is posted once more in a new
-- transaction, with the lines. Each time at least one more of its ids is known, so this ends.
--
-- The ids of 0.1.0 are in `event_ids`, which nobody adds to. As long as it has rows, claims have the text of
-- their ids too ($37), and what is there is not inserted again.
--
-- Each array is one parameter of text, in Postgres' notation. What is empty ('{}') does nothing. A batch of
-- 100,000 users without ids takes as long as if the rest of the statement were not there; starting and
-- ending the idle parts costs 0.2 ms.
with move as (
  select * from unnest(
    $2::text::text[], $3::text::bigint[], $4::text::bigint[], $5::text::text[]
  ) as move (key, begins, ends, digest)
), moved as (
  update checkpoints as checkpoint set
    position = move.ends, digest = coalesce(move.digest, checkpoint.digest), moved_at = now()
  from move
  where checkpoint.source = move.key and checkpoint.position = move.begins
  returning 1
), fence as (
  select case when count(*) < (select count(*) from move)
    then current_setting('daybook.checkpoint_has_moved')::int else 1 end as holds
  from moved
), change as not materialized (
  select * from unnest($6::text::text[], $7::text::numeric[]) as change (user_id, amount)
), total as not materialized (
  select * from unnest($35::text::text[], $36::text::numeric[]) as total (user_id, amount)
), claim as (
  select * from unnest(
    $8::text::bytea[], $9::text::uuid[], $10::text::text[], $11::text::numeric[], $12::text::bigint[],
    $13::text::bigint[], $14::text::bigint[], $15::text::int[], $37::text::text[], $38::text::text[]
  ) as claim (id, event, user_id, amount, begins, ends, run, point, old_id, line)
), old as (
  select claim.id, daybook_identity(known.event) as event
  from claim join event_ids as known on known.id = claim.old_id
  where $37::text <> '{}'
), claimed as (
  insert into ids (id, event, day)
  select id, event, daybook_day(greatest((now() at time zone 'UTC')::date, (select day from boundary)))
  from claim where not exists (select from old where old.id = claim.id)
  order by id
  on conflict do nothing
  returning id
), whole as (
  select (select count(*) from claimed) = (select count(*) from claim) as is_fresh
), taken as (
  select * from claim
  where not (select is_fresh from whole) and not exists (select from claimed where claimed.id = claim.id)
), known as (
  select taken.id, coalesce(ids.event, old.event) as event
  from taken left join ids using (id) left join old using (id)
), conflict as (
  select * from unnest(
    $16::text::bytea[], $17::text::uuid[], $18::text::bigint[], $19::text::bigint[], $20::text::bigint[],
    $39::text::text[]
  ) as conflict (id, event, begins, ends, run, line)
), late as (
  select line, begins, ends, run, taken.event = known.event as is_same, point, amount
  from taken join known using (id) union all
  select line, begins, ends, run, coalesce(conflict.event = known.event, false), null, null
  from conflict left join known using (id)
), judged as (
  select *, is_same or exists (
    select from quarantine as held where reason = $24 and held.line = late.line
  ) as is_known
  from late
), set_aside as (
  select daybook_set_aside(
    $1, $34::bigint, array_agg(position), array_agg(reason), array_agg(line)) as is_done
  from (
    select * from unnest($21::text::bigint[], $22::text::text[], $23::text::text[]) as line
    union all
    select begins, $24, line from judged where not is_known
  ) as line (position, reason, line)
  having count(*) > 0
), range as (
  select * from unnest(
    $25::text::bigint[], $26::text::bigint[], $27::text::text[]
  ) as range (begins, ends, why)
  union all
  select min(begins), max(ends), $28
  from (
    select *, run - row_number() over (order by run) as island from judged where is_known
  ) as late
  group by island
), left_out as (
  insert into uncounted (source, from_position, to_position, why)
  select $1, begins, ends, why from range
  where begins = ends or (select count(*) from range) <= 5
  on conflict do nothing
), packed as (
  insert into packed_uncounted (source, from_position, why, starts, ends)
  select $1, $34::bigint, why,
    array_agg((begins - $34::bigint)::int order by begins), array_agg((ends - $34::bigint)::int order by begins)
  from range where begins < ends and (select count(*) from range) > 5
  group by why
), point as (
  select * from unnest(
    $30::text::bigint[], $31::text::text[], $32::text::bigint[], $33::text::numeric[]
  ) with ordinality as point (at, name, events, amount, point)
), charted as (
  insert into points as known (source, step, at, name, events, amount)
  select
    $1, 'minute', to_timestamp(coalesce(at, floor(extract(epoch from now()) / 60) * 60)), name,
    point.events - coalesce(lost.events, 0), point.amount - coalesce(lost.amount, 0)
  from point left join (
    select point, count(*) as events, sum(amount) as amount from late group by point
  ) as lost using (point)
  where point.events > coalesce(lost.events, 0)
  on conflict (source, step, at, name) do update set
    events = known.events + excluded.events, amount = known.amount + excluded.amount
), posted as (
  insert into users_revenue as balance (user_id, revenue)
  select * from (
    select user_id, amount from total where (select is_fresh from whole) union all
    select user_id, sum(amount) from (
      select user_id, amount from change union all
      select user_id, amount from claim join claimed using (id)
    ) as counted
    where not (select is_fresh from whole) group by user_id
  ) as counted
  order by user_id collate "C"
  on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
)
select
  holds,
  case when exists (select from known where event is null)
      or exists (select from late where line is null and not is_same)
    then current_setting('daybook.undecided')::int end as undecided,
  (select count(*)::int from taken) as late,
  (select count(*)::int from judged where not is_known) as disputed,
  (select count(*)::int from judged where is_known) as repeated,
  (select is_done from set_aside),
  daybook_require_balances($29)
from fence
-- A call, for psql of any version, from the folder of schema.sql, on a database that has it applied:
-- begin;
-- insert into checkpoints (source, position) values ('file:a.jsonl#1', 0);
-- \set post `cat lib/ledger/post.sql`
-- prepare post as :post;
-- execute post('file:a.jsonl#1',
--   '{file:a.jsonl#1}', '{0}', '{200}', '{null}',
--   '{ann,ben}', '{10.5,-2}',
--   '{\\x696431}', '{00000000000000000000000000000001}', '{ann}', '{7}', '{120}', '{160}', '{3}', '{1}',
--   '{\\x696431}', '{00000000000000000000000000000002}', '{170}', '{200}', '{4}',
--   '{100}', '{not JSON}', '{nonsense}', 'its id belongs to another event, which came first',
--   '{}', '{}', '{}', 'the same event came before', 2,
--   '{1795651200}', '{add_revenue}', '{4}', '{15.5}', 0,
--   '{ann,ben}', '{17.5,-2}', '{}', '{}', '{another event}');
-- select * from users_revenue;
-- rollback;
