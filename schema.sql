-- The ledger. Can be applied any number of times, by several processes at once: `create table if
-- not exists` alone fails when two do it at the same moment, hence the lock. One statement, so that
-- it is one transaction in any tool. What exists is left alone, so that a role without the right
-- to create tables can start on a schema that somebody else has applied.
do $$
begin
  perform pg_advisory_xact_lock(hashtext('daybook schema'));

  if to_regclass('users_revenue') is null then
    -- One row for each user. Half of each page is left free, so that an update finds room beside
    -- the old row (HOT) and touches no index: 236,000 rows/s against 111,000 in full pages.
    create table users_revenue (
      user_id text collate "C" primary key,
      revenue numeric not null
    ) with (fillfactor = 50);
  end if;

  if to_regclass('checkpoints') is null then
    -- How far each source has been posted: `journal:<uuid>`; `file:<name>#<generation>`, a file that
    -- the processor posted; `sent:<name>`, a source that came over HTTP. The last two with the
    -- SHA-256 of the bytes before the position, the first with the last frame's place and header.
    create table checkpoints (
      source text primary key,
      position bigint not null,
      digest text,
      posted_at timestamptz not null default now()
    );
  end if;

  if to_regclass('event_types') is null then
    -- How events of a name have counted, whenever some were posted: 1, -1 or 0. More than one sign of a
    -- name, or one that is not in force any more, and a recount would not give what was posted.
    create table event_types (
      name text not null,
      sign smallint not null,
      since timestamptz not null default now(),
      primary key (name, sign)
    );
  end if;

  if to_regclass('event_ids') is null then
    -- The ids of events that count, claimed in the statement that adds to the balance. A date, and
    -- not a time: its index is then ten times as small.
    create table event_ids (
      id text collate "C" primary key,
      event text not null,
      claimed_on date not null default current_date
    );
    create index on event_ids (claimed_on);
  end if;

  if to_regclass('uncounted') is null then
    -- Bytes of a journal or file whose events did not count: their ids were claimed before, or another
    -- server had taken the same bytes of their source. What the ledger holds is then what is left
    -- of its sources without these ranges and without the lines in quarantine: `--verify` folds
    -- just that. A range without length says where a line without newline was taken to be whole.
    create table uncounted (
      source text not null,
      from_position bigint not null,
      to_position bigint not null,
      why text not null,
      primary key (source, from_position, to_position)
    );
  end if;

  if to_regclass('removed') is null then
    -- Up to where a journal's old segments need not be kept, and what they had made of each user:
    -- from there on the journal is enough to recompute the ledger.
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
    -- Lines that did not count. A row goes by `--quarantine=retry` only: by hand, a line that is good
    -- now would be counted by `--rebuild`.
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
