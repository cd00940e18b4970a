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
