/**
 * `processor.ts --quarantine`: what is set aside, and trying it again. A line that has become good
 * (its id is free by now, or the rules have changed) is posted and leaves the quarantine in one
 * statement, so that it counts once however often it is tried.
 */
import { formatAmount } from "../event/amount.ts";
import type { Database, Sql, Statements } from "../ledger/database.ts";
import { alone, readRemoved } from "../ledger/reconcile.ts";
import { type Change, decodeEvent, getEventTypes, InvalidEvent } from "../event/event.ts";
import { identityOf, lineOf } from "./fold.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import { journalKey } from "../ledger/checkpoints.ts";
import { noteEventTypes, OTHER_EVENT, SAME_ID } from "../ledger/ledger.ts";
import { eachLine, SHOWN_BYTES } from "../event/lines.ts";

const PAGE = 500;
const DEADLINE_MS = 3_600_000;
/** Of a line, so much is printed. */
const PRINTED = 200;

type Print = (line: string) => void;

/** How far a journal has been read for the rows, which come in order of their positions. */
interface Place {
  journal: JournalReader;
  at: number;
}

interface Row {
  source: string;
  position: string;
  reason: string;
  line: string;
  at: Date;
}

/** Prints each line in quarantine; returns how many there are. */
export async function listQuarantine(database: Database, print: Print): Promise<number> {
  return database.use(async (sql) => {
    let count = 0;
    for await (const rows of readRows(sql)) {
      for (const { source, position, reason, line, at } of rows) {
        const shown = JSON.stringify(line.length > PRINTED ? `${line.slice(0, PRINTED)}…` : line);
        print(`${source} at ${position}, ${at.toISOString()}: ${reason}: ${shown}`);
        count++;
      }
    }
    print(`${count} lines are in quarantine`);
    return count;
  }, DEADLINE_MS);
}

/** Posts what has become good; returns how many lines stay. `paths` are journals. */
export async function retryQuarantine(
  database: Database,
  paths: string[],
  print: Print,
  say: Print,
): Promise<number> {
  await noteEventTypes(database, getEventTypes());
  return alone(
    database,
    () => say("waiting for a recount to end"),
    async (sql) => {
      const journals = new Map<string, Place>();
      for (const path of paths) {
        const journal = await openJournalReader(path);
        if (!journal) continue;
        const source = journalKey(journal.id);
        // What is let go of may vanish at any moment.
        const at = Math.max(journal.start, await readRemoved(sql, source));
        journals.set(source, { journal, at });
      }
      let posted = 0;
      let stay = 0;
      for await (const rows of readRows(sql)) {
        const whole = await readWhole(rows, journals);
        for (const row of rows) {
          const why = await retry(sql, row, whole.get(`${row.source} ${row.position}`) ?? null);
          if (why === null) posted++;
          else {
            stay++;
            print(`${row.source} at ${row.position} stays: ${why}`);
          }
        }
      }
      print(`${posted} lines were posted, ${stay} stay in quarantine`);
      return stay;
    },
  );
}

/** All of them, a page at a time, ordered by source and position. */
async function* readRows(sql: Statements): AsyncGenerator<Row[]> {
  let source = "";
  let position = "-1";
  for (;;) {
    const rows = await sql<Row[]>`
      select source, position, reason, line, at from quarantine
      where (source, position) > (${source}, ${position})
      order by source, position limit ${PAGE}`;
    const last = rows.at(-1);
    if (!last) return;
    yield rows;
    ({ source, position } = last);
  }
}

/** The lines of `rows` as they were sent, by source and position, as far as they are to be had. */
async function readWhole(
  rows: Row[],
  journals: ReadonlyMap<string, Place>,
): Promise<Map<string, Uint8Array>> {
  const whole = new Map<string, Uint8Array>();
  for (const { source, position, reason, line } of rows)
    if (Buffer.byteLength(line) < SHOWN_BYTES && !line.includes("\ufffd")) {
      const kept = reason === OTHER_EVENT ? lineOf(line) : line;
      whole.set(`${source} ${position}`, Buffer.from(kept));
    }
  for (const [source, place] of journals) {
    const { journal } = place;
    const wanted = new Set(
      rows.filter((row) => row.source === source).map(({ position }) => Number(position)),
    );
    const last = Math.max(...wanted);
    for (let at = place.at; at <= last;) {
      const frames = await journal.read(at);
      if (frames.length === 0) break;
      for (const { payload, from, to } of frames) {
        if (from > last) break;
        place.at = from; // the next page may begin in the same frame
        const begin = to - payload.length;
        eachLine(payload, (line, offset) => {
          if (wanted.has(begin + offset))
            whole.set(`${source} ${begin + offset}`, Uint8Array.from(line));
        });
        at = to;
      }
    }
  }
  return whole;
}

/** Posts a line, or says why it stays. */
async function retry(sql: Sql, row: Row, line: Uint8Array | null): Promise<string | null> {
  if (!line) return `${row.reason}, and only the beginning of it is kept`;
  const decoded = decodeEvent(line);
  if (decoded instanceof InvalidEvent) return decoded.reason;
  if (decoded.id === undefined || decoded.sign === 0) return release(sql, row, decoded);
  const { id } = decoded;
  const event = identityOf({ ...decoded, id });
  const [known] = await sql<{ event: string }[]>`select event from event_ids where id = ${id}`;
  if (!known) return release(sql, row, decoded, { id, event });
  if (known.event !== event) return OTHER_EVENT;
  await sql`
    with gone as (
      delete from quarantine where source = ${row.source} and position = ${row.position} returning 1
    )
    insert into uncounted (source, from_position, to_position, why)
    select ${row.source}, ${row.position}::bigint, ${row.position}::bigint + 1, ${SAME_ID} from gone
    on conflict do nothing`;
  return null;
}

/**
 * Posts a line and lets it go, in one statement; if its id is claimed at the same moment it divides by
 * zero. A line of a removed segment becomes part of that journal's snapshot.
 */
async function release(
  sql: Sql,
  { source, position }: Row,
  { userId, sign, amount }: Change,
  claim: { id: string; event: string } | null = null,
): Promise<null> {
  const claiming = claim
    ? sql`insert into event_ids (id, event) select ${claim.id}, ${claim.event} from gone
          on conflict do nothing returning 1`
    : sql`select 1 from gone`;
  await sql`
    with gone as (
      delete from quarantine where source = ${source} and position = ${position} returning 1
    ), claimed as (${claiming}), posted as (
      insert into users_revenue as balance (user_id, revenue)
      select ${userId}, ${formatAmount(amount)}::numeric from gone where ${sign !== 0}
      on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue
    ), kept as (
      insert into snapshots as snapshot (source, user_id, revenue)
      select ${source}, ${userId}, ${formatAmount(amount)}::numeric
      from gone, removed
      where removed.source = ${source} and removed.position > ${position} and ${sign !== 0}
      on conflict (source, user_id) do update set revenue = snapshot.revenue + excluded.revenue
    )
    select 1 / ((select count(*) from claimed) = (select count(*) from gone))::int`;
  return null;
}
