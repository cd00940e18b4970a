-- Posts one batch: checkpoints, balances, points of revenue over time, ids, quarantine and what does not
-- count, wholly or not at all.
--
-- It is ONE statement because the driver, after a lost connection, can run a statement outside its
-- transaction. So it checks by itself that each checkpoint is where the batch begins. If one is not,
-- `fence` raises an error, and nothing has happened.
--
--     move ──────> moved ──────> fence        each checkpoint moves, only if it is where it `begins`
--
--     change ──────────────────> posted       balances are added to, never overwritten
--                                  ^
--     claim ─────> claimed ────────┤          an id counts for the event that claims it first;
--                                  v          what comes later under it does not count:
--     conflict ────────────────> late ──┬──>  left_out   (uncounted) if it is the same event
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
--     2. ids, in the order of their bytes: `posted` and the last SELECT read `claimed`
--     3. users, in the order of their bytes, each as it is updated or inserted
--     4. rows that belong to the batch's own checkpoint, which no other batch touches
--
-- An id that is known already is updated, not skipped: only so does the statement see a row that another
-- transaction committed after the statement began. `xmax = 0` tells that the row was inserted: the id
-- was free.
--
-- Each array is one parameter of text, in Postgres' notation. What is empty ('{}') does nothing. `posted`
-- has one form for batches with ids and one without, and a one-time filter switches the other one off:
-- with the first form alone, batches without ids took 13 % longer. A batch of 100,000 users without ids
-- takes as long as if the rest of the statement were not there; starting and ending the idle parts costs
-- 0.2 ms.
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
), claim as (
  select * from unnest(
    $8::text::text[], $9::text::text[], $10::text::text[], $11::text::numeric[],
    $12::text::bigint[], $13::text::bigint[], $14::text::bigint[], $15::text::int[]
  ) as claim (id, event, user_id, amount, begins, ends, run, point)
), claimed as (
  insert into event_ids as known (id, event, claimed_on)
  select id, event, greatest((now() at time zone 'UTC')::date, (select day from boundary))
  from claim order by id collate "C"
  on conflict (id) do update set id = excluded.id
  returning id, event, xmax = 0 as fresh
), conflict as (
  select * from unnest(
    $16::text::text[], $17::text::text[], $18::text::bigint[], $19::text::bigint[], $20::text::bigint[]
  ) as conflict (id, event, begins, ends, run)
), late as (
  select claim.event, begins, ends, run, claim.event = claimed.event as is_same, point, amount
  from claim join claimed using (id) where not fresh union all
  select conflict.event, begins, ends, run, conflict.event = claimed.event, null, null
  from conflict join claimed using (id)
), judged as (
  select *, is_same or exists (
    select from quarantine where reason = $24 and line = late.event
  ) as is_known
  from late
), set_aside as (
  select daybook_set_aside(
    $1, $34::bigint, array_agg(position), array_agg(reason), array_agg(line)) as is_done
  from (
    select * from unnest($21::text::bigint[], $22::text::text[], $23::text::text[]) as line
    union all
    select begins, $24, event from judged where not is_known
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
    select user_id, amount from change where $8::text = '{}' union all
    select user_id, sum(amount) from (
      select user_id, amount from change union all
      select user_id, amount from claim join claimed using (id) where fresh
    ) as counted
    where $8::text <> '{}' group by user_id
  ) as total
  order by user_id collate "C"
  on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
)
select
  holds,
  (select count(*)::int from claimed where not fresh) as late,
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
--   '{id1}', '{an event}', '{ann}', '{7}', '{120}', '{160}', '{3}', '{1}',
--   '{id1}', '{another event}', '{170}', '{200}', '{4}',
--   '{100}', '{not JSON}', '{nonsense}', 'its id belongs to another event, which came first',
--   '{}', '{}', '{}', 'the same event came before', 2,
--   '{1795651200}', '{add_revenue}', '{4}', '{15.5}', 0);
-- select * from users_revenue;
-- rollback;
