-- The ledger. This file can be applied any number of times, and by several processes at once: `create
-- table if not exists` alone fails when two run it at the same moment, hence the lock. It is one
-- statement, so that it is one transaction in any tool: a ledger that is refused at its end is left as it
-- was. A ledger of this version is only checked, so that a role without the right to create tables can
-- use what another role has applied.
--
-- To change it, raise `this_version` (and LEDGER_VERSION in lib/ledger/database.ts), change the tables below,
-- which are what a new ledger gets, and change an older ledger under "Upgrades".
do $$
declare
  -- 1, which nobody noted, is 0.1.0.
  this_version constant int := 2;
  noted_version int;
  legacy record;
begin
  perform pg_advisory_xact_lock(hashtext('daybook schema'));

  if to_regclass('ledger_version') is not null then
    if not exists (
      select from pg_attribute
      where attrelid = to_regclass('ledger_version') and attname = 'version' and atttypid = 'int'::regtype
    ) then
      raise exception using errcode = 'DB001', message =
        'ledger_version is not the table that is needed. '
        'Run: alter table ledger_version rename to ledger_version_old';
    end if;
    select version into noted_version from ledger_version;
  end if;
  if noted_version > this_version then
    raise exception using errcode = 'DB001', message = format(
      'the ledger has version %s, and this program knows version %s. Use the program that upgraded it, '
      'or a later one', noted_version, this_version);
  end if;

  if noted_version is null or noted_version < this_version then
    if to_regclass('checkpoints') is not null then
      lock table checkpoints; -- no posting sees half an upgrade
    end if;

    -- Tables.
    if to_regclass('users_revenue') is null then
      -- One row for each user. Half of each page stays free, so that an update finds room beside the
      -- old row (HOT) and touches no index: 236,000 rows/s, against 111,000 in full pages.
      create table users_revenue (
        user_id text collate "C" primary key,
        revenue numeric not null
      ) with (fillfactor = 50);
    end if;

    if to_regclass('checkpoints') is null then
      -- How far each journal, file and source has been posted. The keys (column `source`) and digests
      -- are explained in lib/ledger/checkpoints.ts.
      create table checkpoints (
        source text collate "C" primary key,
        position bigint not null,
        digest text,
        moved_at timestamptz not null default now(),
        points_from bigint not null default 0
      );
    end if;

    if to_regclass('event_types') is null then
      -- How events of each name have counted since they were first posted: 1, -1 or 0. If a name has more
      -- than one sign, or one that is no longer in force, a recount would not give what was posted.
      create table event_types (
        name text collate "C" not null,
        sign smallint not null,
        since timestamptz not null default now(),
        primary key (name, sign)
      );
    end if;

    if to_regclass('event_ids') is null then
      -- The ids of 0.1.0, which are read until the last of them is pruned. Nothing is added. (To drop the
      -- table would wait for `--verify`, and all posting would queue behind it.)
      create table event_ids (
        id text collate "C" primary key,
        event text not null,
        claimed_on date not null default current_date
      );
      create index on event_ids (claimed_on);
    end if;

    if to_regclass('ids') is null then
      -- The ids of events that count, claimed by the statement that adds to the balance: the key of the id
      -- (lib/ledger/ids.ts), a hash of the event's identity, and the day in days since 2000. In this
      -- order a row has no gaps: an id of 28 bytes takes 76, and 49 in the index. Pruning walks
      -- through the table: an index on `day` would take a fifth of the speed.
      create table ids (
        day smallint not null,
        event uuid not null,
        id bytea primary key
      );
    end if;

    if to_regclass('uncounted') is null then
      -- Bytes of a journal or file whose events did not count: their ids were claimed before, or another
      -- server had stored the same bytes of their source. The ledger holds what its journals and files
      -- contain without these ranges and without the lines in quarantine: `--verify` folds just that. A
      -- range without length says where a line without newline was read as whole.
      create table uncounted (
        source text collate "C" not null,
        from_position bigint not null,
        to_position bigint not null,
        why text not null,
        primary key (source, from_position, to_position)
      );
    end if;

    if to_regclass('packed_uncounted') is null then
      -- The same, where a batch has many ranges: duplicates that alternate with fresh events would
      -- otherwise add a row each, as many as a sender likes. `starts` and `ends`, ascending, count from
      -- `from_position`, where the batch begins: 8 bytes a range.
      create table packed_uncounted (
        source text collate "C" not null,
        from_position bigint not null,
        why text not null,
        starts int[] not null,
        ends int[] not null,
        primary key (source, from_position, why)
      );
    end if;

    if to_regclass('removed') is null then
      -- Up to which position a journal's old segments are no longer needed, and what they added to each
      -- user: from there on the journal is enough to recompute the ledger.
      create table removed (
        source text collate "C" primary key,
        position bigint not null
      );
    end if;
    if to_regclass('snapshots') is null then
      create table snapshots (
        source text collate "C" not null,
        user_id text collate "C" not null,
        revenue numeric not null,
        primary key (source, user_id)
      );
    end if;

    if to_regclass('boundary') is null then
      -- The ledger's own day, by which ids and segments grow old (lib/processor/aging.ts): one row.
      create table boundary (
        day date not null default (now() at time zone 'UTC')::date,
        singleton boolean primary key default true check (singleton)
      );
      insert into boundary default values;
      -- On which day a segment of a journal, which begins at `base`, was found wholly posted.
      create table segments (
        source text collate "C" not null,
        base bigint not null,
        posted_on date not null,
        primary key (source, base)
      );
    end if;

    if to_regclass('points') is null then
      -- Revenue over time: the events of each name and their amount, signed as it was added to the balances,
      -- by the minute in which the server stored them (or in which a file was posted). Each checkpoint has
      -- rows of its own, so that no processor waits for another's; readers sum over them.
      create table points (
        source text collate "C" not null,
        step text not null,
        at timestamptz not null,
        name text collate "C" not null,
        events bigint not null,
        amount numeric not null,
        primary key (source, step, at, name)
      );
    end if;

    if to_regclass('snapshot_points') is null then
      -- The points of removed segments, as `snapshots` has their balances.
      create table snapshot_points (like points including all);
    end if;

    if to_regclass('quarantine') is null then
      -- Lines that did not count. Only `--quarantine=retry` and `=dismiss` may delete a row: if it is deleted
      -- by hand, and its line has become valid, `--rebuild` counts it.
      create table quarantine (
        source text collate "C" not null,
        position bigint not null,
        reason text not null,
        line text not null,
        at timestamptz not null default now(),
        primary key (source, position)
      );
    end if;

    if to_regclass('packed_quarantine') is null then
      -- The lines in quarantine beyond those that `quarantine` keeps of a source in an hour (see
      -- daybook_set_aside): as many as a sender likes, 4 bytes each. `positions`, ascending and never empty, count from
      -- `from_position`, where the batch begins. What the lines say is in their journal or file alone.
      create table packed_quarantine (
        source text collate "C" not null,
        from_position bigint not null,
        reason text not null,
        positions int[] not null,
        at timestamptz not null default now(),
        primary key (source, from_position, reason)
      );
    end if;

    if to_regclass('ledger_version') is null then
      -- One row: the version of this file that made the tables what they are.
      create table ledger_version (version int not null);
    end if;

    -- Upgrades. Each looks at what is there, and so can follow any earlier version.

    -- To 2: 0.1.0 checks no version, but each of its postings writes `posted_at`. Without this column it
    -- stops, instead of counting by rules of its own. Nothing reads it.
    for legacy in
      select attrelid::regclass as name from pg_attribute
      where attrelid = to_regclass('checkpoints') and attname = 'posted_at'
    loop
      execute format('alter table %s rename column posted_at to moved_at', legacy.name);
    end loop;
    -- To 2: what was posted before has no points of revenue over time.
    for legacy in
      select attrelid::regclass as name from pg_attribute as place
      where attrelid = to_regclass('checkpoints') and attname = 'position' and not exists (
        select from pg_attribute where attrelid = place.attrelid and attname = 'points_from')
    loop
      execute format('alter table %s add column points_from bigint not null default 0', legacy.name);
      execute format('update %s set points_from = position', legacy.name);
    end loop;
    -- To 2: an event that belongs to the id of another one is quarantined once, however often it is sent.
    for legacy in
      select attrelid::regclass as name from pg_attribute
      where attrelid = to_regclass('quarantine') and attname = 'line' and atttypid = 'text'::regtype
        and to_regclass('quarantine_lines') is null
    loop
      execute format('create index quarantine_lines on %s using hash (line)', legacy.name);
    end loop;
    -- To 2: `GET /quarantine` lists the newest lines first.
    for legacy in
      select to_regclass('quarantine') as name
      where to_regclass('quarantine_newest') is null and 3 = (
        select count(*) from pg_attribute
        where attrelid = to_regclass('quarantine') and attname in ('at', 'source', 'position'))
    loop
      execute format('create index quarantine_newest on %s (at, source, position)', legacy.name);
    end loop;
    -- To 2: the order of "C" never changes. That of a language changes with the system's library, and
    -- then an index no longer finds its rows: for a journal it would seem as if nothing was posted. (Only
    -- small tables: the others may take longer than a start has time for.)
    for legacy in
      select attrelid::regclass as name, attname as attribute from pg_attribute
      where (attrelid, attname) in (
          (to_regclass('checkpoints'), 'source'), (to_regclass('removed'), 'source'),
          (to_regclass('event_types'), 'name'))
        and atttypid = 'text'::regtype and attcollation <> '"C"'::regcollation
    loop
      execute format(
        'alter table %s alter column %I type text collate "C"', legacy.name, legacy.attribute);
    end loop;

    -- Functions.

    -- A day as `ids` stores it.
    create or replace function daybook_day(day date)
    returns smallint language sql immutable as $function$ select (day - date '2000-01-01')::smallint $function$;

    -- What `ids` stores of the identity of an event, which `event_ids` has in full.
    create or replace function daybook_identity(event text)
    returns uuid language sql immutable as $function$
      select encode(substr(sha256(convert_to(event, 'UTF8')), 1, 16), 'hex')::uuid
    $function$;

    -- What keeps a table from holding what is exact, with the statement that helps; null if nothing does.
    -- `key` is in alphabetical order. A limited type rounds without a word; without a key that is always
    -- enforced, or with one for which different texts are equal, users are added up wrongly; rules and
    -- row-level security hide rows; an unlogged table is empty after a crash.
    create or replace function daybook_table_fault(
      table_name text, names text[], types text[], key text[]
    ) returns text language plpgsql stable as $function$
    declare
      relation regclass := to_regclass(table_name);
      class record;
      place record;
      found_type oid;
      modifier int;
      wanted_type regtype;
      found_name text;
      findings text[] := '{}';
      actions text[] := '{}';
    begin
      if relation is null then
        return format('the table %s of this ledger is missing: restore the ledger from a backup, or drop '
          'its other tables to begin with an empty one', table_name);
      end if;
      select * into class from pg_class where oid = relation;
      if class.relkind not in ('r', 'p') then
        return format('%s is %s, and must be a table. Run: alter table %s rename to %s_old', table_name,
          case class.relkind when 'v' then 'a view' when 'm' then 'a materialized view'
            when 'f' then 'a foreign table' else 'no table' end, relation, table_name);
      end if;
      if class.relpersistence = 't' then
        return format('%s is a temporary table. Run: drop table pg_temp.%1$s', table_name);
      end if;
      if class.relpersistence = 'u' and class.relkind = 'r' then
        return format('%s is unlogged, and would be empty after a crash. Run: alter table %s set logged',
          table_name, relation);
      end if;
      if class.relkind = 'p' then
        select oid::regclass into found_name from pg_class
        where oid in (select relid from pg_partition_tree(relation))
          and relkind <> 'p' and relpersistence <> 'p' limit 1;
        if found then
          return format('the partition %s of %s is unlogged, and would be empty after a crash. '
            'Run: alter table %1$s set logged', found_name, table_name);
        end if;
      elsif class.relhassubclass then
        select inhrelid::regclass into found_name from pg_inherits where inhparent = relation limit 1;
        if found then
          return format('%s inherits from %s, so its rows appear in both. Run: alter table %1$s no inherit %s',
            found_name, table_name, relation);
        end if;
      end if;
      if row_security_active(relation) then
        return format('row-level security of %s may hide rows from the role %I. '
          'Run: alter table %s disable row level security (or: alter role %2$I bypassrls)',
          table_name, current_user, relation);
      end if;
      if class.relhasrules then
        select quote_ident(rulename) into found_name from pg_rewrite where ev_class = relation limit 1;
        if found then
          return format('the rule %s rewrites what is done to %s. Run: drop rule %1$s on %s',
            found_name, table_name, relation);
        end if;
      end if;
      select indexrelid::regclass into found_name from pg_index
      where indrelid = relation and indisunique
        and false = any (array(
          select (select collisdeterministic from pg_collation where oid = collation_oid)
          from unnest(indcollation::oid[]) as collation_oid))
        and not exists (select from pg_constraint where conindid = indexrelid)
      limit 1;
      if found then
        return format('the unique index %s of %s has a non-deterministic collation, by which different '
          'texts are equal. Run: drop index %1$s', found_name, table_name);
      end if;

      for place in
        select wanted.name, wanted.type, attnum, atttypid, atttypmod, attnotnull, attgenerated,
          format_type(atttypid, atttypmod) as type_name, attcollation::regcollation as collation_name,
          (select collisdeterministic from pg_collation where oid = attcollation) as is_deterministic
        from unnest(names, types) as wanted (name, type)
        left join pg_attribute on attrelid = relation and attname = wanted.name and attnum > 0
          and not attisdropped
      loop
        if place.attnum is null then
          return format('%s has no column %I. If another column holds that, rename the column; else '
            'rename the table. Run: alter table %s rename to %s_old', table_name, place.name, relation,
            table_name);
        end if;
        if place.attgenerated = 'v' then -- virtual: holds nothing
          return format('%s.%I is generated. Run: alter table %s rename to %1$s_old',
            table_name, place.name, relation);
        end if;
        found_type := place.atttypid;
        modifier := place.atttypmod;
        loop -- the type below domains, and its limit
          select typbasetype, greatest(modifier, typtypmod) into place.atttypid, modifier
          from pg_type where oid = found_type;
          exit when place.atttypid = 0;
          found_type := place.atttypid;
        end loop;
        wanted_type := place.type::regtype;
        if place.attgenerated <> '' then
          findings := findings || format('%I is generated', place.name);
          actions := actions || format('alter column %I drop expression', place.name);
        end if;
        if modifier >= 0 or found_type <> wanted_type
          and not (found_type = 'varchar'::regtype and wanted_type = 'text'::regtype)
        then
          findings := findings || format('%I is %s instead of %s', place.name, place.type_name, place.type);
          actions := actions || format('alter column %I type %s%s using %1$I::%2$s', place.name, place.type,
            case when place.type = 'text' then ' collate "C"' end);
        elsif not place.is_deterministic then
          findings := findings || format('%I has the collation %s, by which different texts are equal',
            place.name, place.collation_name);
          actions := actions || format('alter column %I type text collate "C"', place.name);
        end if;
        if not place.attnotnull and table_name = 'users_revenue' then
          findings := findings || format('%I may be null', place.name);
          actions := actions || format('alter column %I set not null', place.name);
        end if;
      end loop;

      if not exists (
        select from pg_index i
        where indrelid = relation and indisunique and indisvalid and indimmediate
          and indpred is null and indexprs is null
          and key = array(
            select attname::text from pg_attribute
            where attrelid = relation and attnum = any ((indkey::int2[])[0:indnkeyatts - 1])
            order by attname)
      ) then
        findings := findings || format('no unique key of (%s) is always enforced', array_to_string(key, ', '));
        select quote_ident(conname) into found_name from pg_constraint
        where conrelid = relation and contype = 'p';
        if found then
          actions := actions || format('drop constraint %s', found_name);
        end if;
        actions := actions || format('add primary key (%s)', array_to_string(key, ', '));
      end if;

      for place in
        select attname from pg_attribute join pg_type on pg_type.oid = atttypid
        where attrelid = relation and attnum > 0 and not attisdropped and attname <> all (names)
          and (attnotnull or typnotnull) and not atthasdef and typdefault is null and attidentity = ''
      loop
        findings := findings || format('%I must be given for each row', place.attname);
        actions := actions || format('alter column %I drop not null', place.attname);
      end loop;

      if findings = '{}' then return null; end if;
      return format('%s cannot be used: %s. Run: alter table %s %s', table_name,
        array_to_string(findings, ', '), relation, array_to_string(actions, ', '));
    end
    $function$;

    -- Raises DB001 unless a program that knows `program_version` may post to `users_revenue`. Each posting
    -- asks, in its own statement, whose lock keeps the table as it is until the end. So the usual table is
    -- recognised by one query (0.05 ms; all questions take 0.5 ms). What it leaves out makes the statement
    -- fail: without a key, for example, there is nothing that ON CONFLICT could mean.
    create or replace function daybook_require_balances(program_version int)
    returns void language plpgsql stable as $function$
    declare
      noted_version int;
      fault text;
    begin
      if exists (
        select from ledger_version, pg_class
        where version = program_version and oid = to_regclass('users_revenue') and relkind = 'r'
          and relpersistence = 'p' and relnatts = 2
          and not (relrowsecurity or relhasrules or relhassubclass)
          and 2 = (
            select count(*) from pg_attribute
            where attrelid = oid and attnum > 0 and attnotnull and atttypmod = -1 and attgenerated = ''
              and (attname, atttypid) in (('user_id', 'text'::regtype), ('revenue', 'numeric'::regtype))
              and attcollation in (0, '"default"'::regcollation, '"C"'::regcollation))
          and not exists (
            select from pg_index
            where indrelid = pg_class.oid and indisunique
              and indcollation[0] not in (0, '"default"'::regcollation, '"C"'::regcollation))
      ) then
        return;
      end if;
      select version into noted_version from ledger_version;
      if noted_version is distinct from program_version then
        raise exception using errcode = 'DB001', message = format(
          'the ledger has version %s, and this program knows version %s. Use the program that upgraded '
          'it, or a later one', coalesce(noted_version::text, 'none'), program_version);
      end if;
      fault := daybook_table_fault(
        'users_revenue', '{user_id,revenue}', '{text,numeric}', '{user_id}');
      if fault is not null then
        raise exception using errcode = 'DB001', message = fault;
      end if;
    end
    $function$;

    -- The same for the whole ledger. Each new connection asks.
    create or replace function daybook_require_ledger(program_version int)
    returns void language plpgsql stable as $function$
    declare
      fault text;
    begin
      if getdatabaseencoding() <> 'UTF8' then
        raise exception using errcode = 'DB001', message = format(
          'the database %I has the encoding %s, and must have UTF8, to hold every user. '
          'Create another one, and name it in DATABASE_URL. Run: '
          'createdb --encoding=UTF8 --template=template0 daybook', current_database(), getdatabaseencoding());
      end if;
      perform daybook_require_balances(program_version);
      select problem into fault
      from (values
        ('users_revenue', '{user_id,revenue}'::text[], '{text,numeric}'::text[], '{user_id}'::text[]),
        ('checkpoints', '{source,position,digest,points_from}', '{text,bigint,text,bigint}', '{source}'),
        ('event_types', '{name,sign}', '{text,smallint}', '{name,sign}'),
        ('event_ids', '{id,event,claimed_on}', '{text,text,date}', '{id}'),
        ('ids', '{id,event,day}', '{bytea,uuid,smallint}', '{id}'),
        ('uncounted', '{source,from_position,to_position,why}', '{text,bigint,bigint,text}',
          '{from_position,source,to_position}'),
        ('packed_uncounted', '{source,from_position,why,starts,ends}', '{text,bigint,text,int[],int[]}',
          '{from_position,source,why}'),
        ('removed', '{source,position}', '{text,bigint}', '{source}'),
        ('points', '{source,step,at,name,events,amount}', '{text,text,timestamptz,text,bigint,numeric}',
          '{at,name,source,step}'),
        ('snapshot_points', '{source,step,at,name,events,amount}',
          '{text,text,timestamptz,text,bigint,numeric}', '{at,name,source,step}'),
        ('boundary', '{day,singleton}', '{date,boolean}', '{singleton}'),
        ('segments', '{source,base,posted_on}', '{text,bigint,date}', '{base,source}'),
        ('snapshots', '{source,user_id,revenue}', '{text,text,numeric}', '{source,user_id}'),
        ('quarantine', '{source,position,reason,line,at}', '{text,bigint,text,text,timestamptz}',
          '{position,source}'),
        ('packed_quarantine', '{source,from_position,reason,positions,at}',
          '{text,bigint,text,int[],timestamptz}', '{from_position,reason,source}')
      ) as wanted (name, names, types, key),
        daybook_table_fault(name, names, types, key) as problem
      where problem is not null limit 1;
      if fault is not null then
        raise exception using errcode = 'DB001', message = fault;
      end if;
    end
    $function$;

    -- Puts lines of a batch into quarantine (a function, because most batches have none, and do not pay for
    -- it). Of a source, `quarantine` keeps 1,000 lines in an hour. Those beyond are packed, in at most six rows
    -- a batch: 12 MB of events under the ids of others took 200,000 rows and 88 MB. There such an event is not
    -- known if it is sent again: it takes 4 bytes each time, and a retry counts it once.
    create or replace function daybook_set_aside(
      line_source text, batch_begins bigint, line_positions bigint[], line_reasons text[], line_texts text[]
    ) returns boolean language plpgsql as $function$
    begin
      with line as (
        select position, reason, text, row_number() over (order by position) > (
          select 1000 - count(*) from (
            select from quarantine
            where source = line_source and at > now() - interval '1 hour' limit 1000
          ) as kept
        ) as is_beyond
        from unnest(line_positions, line_reasons, line_texts) as line (position, reason, text)
      ), kept as (
        insert into quarantine (source, position, reason, line)
        select line_source, position, reason, text from line where not is_beyond
        on conflict do nothing
      )
      insert into packed_quarantine (source, from_position, reason, positions)
      select line_source, batch_begins, reason, array_agg((position - batch_begins)::int order by position)
      from (
        select position, case when dense_rank() over (order by left(reason, 200)) <= 5
          then left(reason, 200) else 'one of many reasons' end as reason
        from line where is_beyond
      ) as beyond
      group by reason;
      return true;
    end
    $function$;

    -- These functions find out what Postgres refuses to store in `users_revenue`: a check constraint, a
    -- domain, a foreign key, a trigger. Each undoes everything that it tries, even if it runs outside a
    -- transaction. They catch the errors that concern what a row contains, and no others: a full disk or a
    -- deadlock says nothing about a row.

    -- Whether an error of this SQLSTATE concerns what a row contains: data (22), constraints (23), triggers
    -- (09, 27), views (44), `raise` and PL/pgSQL's own (P0), and every class that Postgres does not have, which
    -- a trigger has raised. lib/ledger/database.ts asks the same of the posting statement.
    create or replace function daybook_is_refusal(state text) returns boolean
    language sql immutable as $function$
      select state !~ '^(0[0138ABFLPZ]|02|10|2[014568BDF]|3[489BDF]|4[02]|5[34578]|72|DB|F0|HV|XX)'
    $function$;

    -- Adds zero to a few balances, of `users` if any of them is held. Returns how many it tried, and the
    -- reason if Postgres refused them all: then the table is the cause, and no line.
    create or replace function daybook_refused_balances(users text[], out tried int, out why text)
    language plpgsql as $function$
    declare
      refused int := 0;
      held record;
    begin
      tried := 0;
      set constraints all immediate;
      for held in
        select user_id from (
          (select user_id, 1 as preference from users_revenue where user_id = any(users) limit 10)
          union all
          (select user_id, 2 from users_revenue limit 10)
        ) as balance order by preference, user_id collate "C" limit 10
      loop
        tried := tried + 1;
        begin
          update users_revenue set revenue = revenue + 0 where user_id = held.user_id;
          if not found then raise exception 'a trigger of users_revenue skips the row'; end if;
          raise exception using errcode = 'DB000';
        exception
          when sqlstate 'DB000' then null;
          when others or assert_failure then
            if not daybook_is_refusal(sqlstate) then raise; end if;
            refused := refused + 1;
            why := sqlerrm;
        end;
      end loop;
      if refused < tried then why := null; end if;
    end
    $function$;

    -- The changes of a batch by user: a claim counts if its id is free.
    create or replace function daybook_changes(
      users text[], amounts numeric[], id_texts text[], keys bytea[], claim_users text[],
      claim_amounts numeric[]
    ) returns table (user_id text, amount numeric) language plpgsql stable as $function$
    begin
      return query select part.user_id, sum(part.amount) from (
        select * from unnest(users, amounts) as plain (user_id, amount)
        union all
        select claim.user_id, claim.amount
        from unnest(id_texts, keys, claim_users, claim_amounts) as claim (id, key, user_id, amount)
        where not exists (select from event_ids as known where known.id = claim.id)
          and not exists (select from ids as known where known.id = claim.key)
      ) as part
      group by part.user_id order by part.user_id collate "C";
    end
    $function$;

    -- The users of a batch whose change Postgres refuses. The changes are kept until the end, so that
    -- they are tried together.
    create or replace function daybook_refused_users(
      users text[], amounts numeric[], id_texts text[], keys bytea[], claim_users text[],
      claim_amounts numeric[]
    ) returns table (refused_user text, why text) language plpgsql as $function$
    declare
      refused text[] := '{}';
      reasons text[] := '{}';
      change record;
    begin
      set constraints all immediate;
      begin
        for change in
          select * from daybook_changes(users, amounts, id_texts, keys, claim_users, claim_amounts)
        loop
          begin
            insert into users_revenue as balance (user_id, revenue)
            values (change.user_id, change.amount)
            on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue;
            if not found then raise exception 'a trigger of users_revenue skips the row'; end if;
          exception when others or assert_failure then
            if not daybook_is_refusal(sqlstate) then raise; end if;
            refused := refused || change.user_id;
            reasons := reasons || sqlerrm;
          end;
        end loop;
        raise exception using errcode = 'DB000';
      exception when sqlstate 'DB000' then null;
      end;
      return query select * from unnest(refused, reasons);
    end
    $function$;

    -- The lines, by their index from 1, that Postgres refuses. Each is tried on top of those of its user
    -- that were accepted so far, and undone: kept updates of one row are quadratic (20,000 took 112 s;
    -- undone, 100,000 take 1.2 s). A line whose id is claimed does not count, and is not tried. The changes of
    -- all users but `refused` are made first, and undone at the end: a line may be refused only beside them
    -- (a unique index on lower(user_id)).
    create or replace function daybook_refused_lines(
      users text[], amounts numeric[], id_texts text[], keys bytea[], refused text[],
      batch_users text[], batch_amounts numeric[], batch_id_texts text[], batch_keys bytea[],
      claim_users text[], claim_amounts numeric[]
    ) returns table (index bigint, why text) language plpgsql as $function$
    declare
      indexes bigint[] := '{}';
      reasons text[] := '{}';
      accepted numeric := 0;
      current_user_id text;
      line record;
    begin
      set constraints all immediate;
      begin
        begin
          insert into users_revenue as balance (user_id, revenue)
          select * from daybook_changes(
            batch_users, batch_amounts, batch_id_texts, batch_keys, claim_users, claim_amounts
          ) as change
          where not exists (select from unnest(refused) as user_id where user_id = change.user_id)
          on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue;
        exception when others or assert_failure then
          if not daybook_is_refusal(sqlstate) then raise; end if; -- then each line is tried alone
        end;
        for line in
          select * from unnest(users, amounts, id_texts, keys) with ordinality
            as given (user_id, amount, id, key, n)
          where not exists (select from event_ids as known where known.id = given.id)
            and not exists (select from ids as known where known.id = given.key)
          order by given.user_id collate "C", given.n
        loop
          if line.user_id is distinct from current_user_id then
            current_user_id := line.user_id;
            accepted := 0;
          end if;
          begin
            insert into users_revenue as balance (user_id, revenue)
            values (line.user_id, accepted + line.amount)
            on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue;
            if not found then raise exception 'a trigger of users_revenue skips the row'; end if;
            raise exception using errcode = 'DB000';
          exception
            when sqlstate 'DB000' then accepted := accepted + line.amount;
            when others or assert_failure then
              if not daybook_is_refusal(sqlstate) then raise; end if;
              indexes := indexes || line.n;
              reasons := reasons || sqlerrm;
          end;
        end loop;
        raise exception using errcode = 'DB000';
      exception when sqlstate 'DB000' then null;
      end;
      return query select * from unnest(indexes, reasons);
    end
    $function$;

    -- Roles that may use the tables of the ledger may use those that this version adds.
    for legacy in
      select format('grant %s on %s to %s', privilege_type, added,
        case when grantee = 0 then 'public' else grantee::regrole::text end) as statement
      from pg_class, aclexplode(relacl), unnest(array[
        'ledger_version', 'boundary', 'segments', 'points', 'snapshot_points', 'packed_uncounted',
        'packed_quarantine', 'ids']) as added
      where oid = 'checkpoints'::regclass and grantee <> relowner
    loop
      execute legacy.statement;
    end loop;
    delete from ledger_version;
    insert into ledger_version values (this_version);
  end if;

  perform daybook_require_ledger(this_version);
end
$$;
