-- The ledger. This file can be applied any number of times, and by several processes at once: `create
-- table if not exists` alone fails when two run it at the same moment, hence the lock. It is one
-- statement, so that it is one transaction in any tool. What exists is left unchanged, so that a role
-- without the right to create tables can use a schema that another role has applied.
do $$
begin
  perform pg_advisory_xact_lock(hashtext('daybook schema'));

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
      source text primary key,
      position bigint not null,
      digest text,
      posted_at timestamptz not null default now()
    );
  end if;

  if to_regclass('event_types') is null then
    -- How events of each name have counted since they were first posted: 1, -1 or 0. If a name has more
    -- than one sign, or one that is no longer in force, a recount would not give what was posted.
    create table event_types (
      name text not null,
      sign smallint not null,
      since timestamptz not null default now(),
      primary key (name, sign)
    );
  end if;

  if to_regclass('event_ids') is null then
    -- The ids of events that count, claimed by the statement that adds to the balance. `claimed_on` is
    -- a date and not a time, which makes its index ten times smaller.
    create table event_ids (
      id text collate "C" primary key,
      event text not null,
      claimed_on date not null default current_date
    );
    create index on event_ids (claimed_on);
  end if;

  if to_regclass('uncounted') is null then
    -- Bytes of a journal or file whose events did not count: their ids were claimed before, or another
    -- server had stored the same bytes of their source. The ledger holds what its journals and files
    -- contain without these ranges and without the lines in quarantine: `--verify` folds just that. A
    -- range without length says where a line without newline was read as whole.
    create table uncounted (
      source text not null,
      from_position bigint not null,
      to_position bigint not null,
      why text not null,
      primary key (source, from_position, to_position)
    );
  end if;

  if to_regclass('removed') is null then
    -- Up to which position a journal's old segments are no longer needed, and what they added to each
    -- user: from there on the journal is enough to recompute the ledger.
    create table removed (
      source text primary key,
      position bigint not null
    );
    create table snapshots (
      source text not null,
      user_id text collate "C" not null,
      revenue numeric not null,
      primary key (source, user_id)
    );
  end if;

  if to_regproc('daybook_refused_users') is null then
    -- These functions find out what Postgres refuses to store in `users_revenue`: a check constraint, a
    -- domain, a foreign key, a trigger. Each undoes everything that it tries, even if it runs outside a
    -- transaction. They catch the error classes 22 and 23 and P0001, which concern what a row contains,
    -- and nothing else: a full disk or a deadlock says nothing about a row.

    -- Adds zero to a few balances, of `users` if any of them is held. Returns how many it tried, and the
    -- reason if Postgres refused them all: then the table is the cause, and no line.
    create function daybook_refused_balances(users text[], out tried int, out why text)
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
          raise exception using errcode = 'DB000';
        exception
          when sqlstate 'DB000' then null;
          when data_exception or integrity_constraint_violation or raise_exception then
            refused := refused + 1;
            why := sqlerrm;
        end;
      end loop;
      if refused < tried then why := null; end if;
    end
    $function$;

    -- The users of a batch whose change Postgres refuses. The changes are kept until the end, so that
    -- they are tried together; a claim counts if its id is free.
    create function daybook_refused_users(
      users text[], amounts numeric[], ids text[], claim_users text[], claim_amounts numeric[]
    ) returns table (refused_user text, why text) language plpgsql as $function$
    declare
      refused text[] := '{}';
      reasons text[] := '{}';
      change record;
    begin
      set constraints all immediate;
      begin
        for change in
          select part.user_id, sum(part.amount) as amount from (
            select * from unnest(users, amounts) as plain (user_id, amount)
            union all
            select claim.user_id, claim.amount
            from unnest(ids, claim_users, claim_amounts) as claim (id, user_id, amount)
            where not exists (select from event_ids as known where known.id = claim.id)
          ) as part
          group by part.user_id order by part.user_id collate "C"
        loop
          begin
            insert into users_revenue as balance (user_id, revenue)
            values (change.user_id, change.amount)
            on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue;
          exception when data_exception or integrity_constraint_violation or raise_exception then
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
    -- undone, 100,000 take 1.2 s). A line whose id is claimed does not count, and is not tried.
    create function daybook_refused_lines(users text[], amounts numeric[], ids text[])
    returns table (index bigint, why text) language plpgsql as $function$
    declare
      indexes bigint[] := '{}';
      reasons text[] := '{}';
      accepted numeric := 0;
      current_user_id text;
      line record;
    begin
      set constraints all immediate;
      for line in
        select * from unnest(users, amounts, ids) with ordinality as given (user_id, amount, id, n)
        where not exists (select from event_ids as known where known.id = given.id)
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
          raise exception using errcode = 'DB000';
        exception
          when sqlstate 'DB000' then accepted := accepted + line.amount;
          when data_exception or integrity_constraint_violation or raise_exception then
            indexes := indexes || line.n;
            reasons := reasons || sqlerrm;
        end;
      end loop;
      return query select * from unnest(indexes, reasons);
    end
    $function$;
  end if;

  if to_regclass('quarantine') is null then
    -- Lines that did not count. Only `--quarantine=retry` may delete a row: if it is deleted by hand,
    -- and its line has become valid, `--rebuild` counts it.
    create table quarantine (
      source text not null,
      position bigint not null,
      reason text not null,
      line text not null,
      at timestamptz not null default now(),
      primary key (source, position)
    );
  end if;
end
$$;
