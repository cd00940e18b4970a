-- Posts one batch: checkpoints, balances, points of revenue over time, ids, quarantine and what does not
-- count, wholly or not at all.
--
-- It is ONE statement because the driver, after a lost connection, can run a statement outside its
-- transaction. So it checks by itself that each checkpoint is where the batch begins. If one is not,
-- `fence` raises an error, and nothing has happened.
--
--     move ──────> moved ──────> fence        each checkpoint moves, only if it is where it `begins`
--
--     total ───────────────────> posted       balances are added to, never overwritten, without what
--                                  ^          came later under an id:
--     claim ──┬──> claimed         │          an id counts for the event that claims it first;
--             v                    │          what comes later does not:
--     conflict ──> taken ──> late ─┴──┬──>  left_out   (uncounted) if it is the same event
--                                     └──>  set_aside  (quarantine) if it is another one, each once
--     point ───────────────────> charted      revenue over time, without what came later
--     lines that are not events ───────────>  set_aside, those beyond a bound in one row
--     ranges that do not count ────────────>  left_out, or if there are many: packed, in one row
--
-- The error of `fence` is that of a setting which does not exist (42704). It is outside the classes 22 and
-- 23, which say that Postgres refuses what a row contains.
--
-- If fewer balances change than should ($40 of them where every id was free), a trigger skips rows, and `skipped`
-- raises such an error as well.
--
-- `daybook_require_balances` raises an error if `users_revenue` has been altered so that it is not exact any
-- more, or the ledger has another version than $29. It sees what the statement sees, under its locks.
--
-- Rows are locked in one order, in every processor, so that no two wait for each other in a circle:
--
--     1. checkpoints: `fence` is read first, and the transaction has locked them in order before
--     2. ids, in the order of their bytes: this is read next
--     3. users, in the order of their bytes, each as it is updated or inserted
--     4. rows that belong to the batch's own checkpoint, which no other batch touches
--
-- A claim whose id is not known is inserted without `on conflict`, which would take twice as long: it writes
-- each row provisionally. If another transaction claims one of these ids meanwhile, the insert fails (23505),
-- nothing has happened, and the batch is posted once more in a new transaction, which sees that id. The lines
-- of claims ($38) are needed only for the quarantine, so they are sent only after one was missed, which is the
-- error `undecided`. So each time at least one more of its ids is known, or its lines are: this ends.
--
-- Where every id was free, one-time filters switch off what is not needed. Of what a claim says beside its id
-- and event, an array is read only then, and of it only the elements of the claims that came late: as numbers
-- of one size, each is found at once.
--
-- `(select $9::text)` keeps the planner from parsing an array to count its elements: with 100,000 claims that
-- took 0.26 s, beside 0.30 s for the parsing that is needed. It counts one array of each `unnest`. From the
-- sixth batch on it may plan without counts (a generic plan): what needs a join of large arrays is not prepared.
--
-- The ids of 0.1.0 are in `event_ids`, which nobody adds to. As long as it has rows, claims have the text of
-- their ids too ($37).
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
), total as not materialized (
  select * from unnest(
    $35::text::text[], (select $36::text)::numeric[], (select $6::text)::int[]
  ) with ordinality as total (user_id, amount, events, n)
), claim as (
  select n, claim.id, claim.event, coalesce(
    (select event from ids where ids.id = claim.id),
    case when $37::text <> '{}'
      then (select daybook_identity(event) from event_ids where event_ids.id = old_id) end
  ) as known
  from (
    select * from unnest(
      $8::text::bytea[], (select $9::text)::uuid[], $37::text::text[]
    ) with ordinality as claim (id, event, old_id, n)
    order by id
  ) as claim
), claimed as (
  insert into ids (id, event, day)
  select id, event, (
    select daybook_day(greatest((now() at time zone 'UTC')::date, day)) from boundary
  )
  from claim where known is null
  returning 1
), taken as (
  select * from claim where known is not null
), whole as (
  select not exists (select from taken) as is_fresh
), conflict as (
  select * from unnest(
    $16::text::bytea[], $17::text::uuid[], $18::text::bigint[], $19::text::bigint[], $20::text::bigint[],
    $39::text::text[]
  ) as conflict (id, event, begins, ends, run, line)
), late as (
  select
    line, (select $12::text::bigint[])[n] as begins, (select $13::text::bigint[])[n] as ends,
    (select $14::text::bigint[])[n] as run, event = known as is_same,
    (select $10::text::int[])[n] as user_n, (select $15::text::int[])[n] as point,
    trim_scale((select $11::text::bigint[])[n] + (select $7::text::int[])[n] * 0.000000001) as amount
  from taken left join unnest($38::text::text[]) with ordinality as claim (line, n) using (n)
  union all
  select line, begins, ends, run, coalesce(conflict.event = known, false), null, null, null
  from conflict left join taken using (id)
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
), careful as (
  select max(user_id) as user_id, sum(amount) as amount from (
    select n, user_id, amount, events from total union all
    select user_n, null, -amount, -1 from late where user_n is not null
  ) as part
  where not (select is_fresh from whole) group by n having sum(events) > 0
), posted as (
  insert into users_revenue as balance (user_id, revenue)
  select * from (
    select user_id, amount from total where (select is_fresh from whole) union all
    select user_id, amount from careful
  ) as counted
  order by user_id collate "C"
  on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
  returning 1
)
select
  holds,
  (select count(*)::int from claimed) as claimed,
  case when exists (select from late where line is null and not is_same)
    then current_setting('daybook.undecided')::int end as undecided,
  (select count(*)::int from taken) as late,
  (select count(*)::int from judged where not is_known) as disputed,
  (select count(*)::int from judged where is_known) as repeated,
  (select is_done from set_aside),
  daybook_require_balances($29),
  -- Last, because it makes the balances change: before that, the table is checked.
  case when (select count(*) from posted) < case
      when (select is_fresh from whole) then $40::bigint else (select count(*) from careful) end
    then current_setting('daybook.row_skipped')::int end as skipped
from fence
-- A call, for psql of any version, from the folder of schema.sql, on a database that has it applied:
-- begin;
-- insert into checkpoints (source, position) values ('file:a.jsonl#1', 0);
-- \set post `cat lib/ledger/post.sql`
-- prepare post as :post;
-- execute post('file:a.jsonl#1',
--   '{file:a.jsonl#1}', '{0}', '{200}', '{null}',
--   '{3,1}', '{0}',
--   '{\\x696431}', '{00000000000000000000000000000001}', '{1}', '{7}', '{120}', '{160}', '{3}', '{1}',
--   '{\\x696431}', '{00000000000000000000000000000002}', '{170}', '{200}', '{4}',
--   '{100}', '{not JSON}', '{nonsense}', 'its id belongs to another event, which came first',
--   '{}', '{}', '{}', 'the same event came before', 2,
--   '{1795651200}', '{add_revenue}', '{4}', '{15.5}', 0,
--   '{ann,ben}', '{17.5,-2}', '{}', '{}', '{another event}', 2);
-- select * from users_revenue;
-- rollback;
