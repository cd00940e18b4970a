/** A follower with a long backlog, and one whose journal is replaced. */
import { expect, test } from "bun:test";
import { mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { encodeJournalHeader } from "../../lib/journal/format.ts";
import { line } from "../support/events.ts";
import { frame } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
import { root, until } from "../support/programs.ts";

test("a backlog is posted although every statement of more than 100 ms is terminated", async () => {
  await using ledger = await openLedger();
  await using sql = connectTest(ledger.url);
  await sql.file(join(root, "schema.sql"));
  mkdirSync(ledger.dataDir);
  writeJournal(ledger.journal, 100, 1_000);
  await using _processor = ledger.process();

  let ended = 0;
  await until(async () => {
    ended += await endLongStatements(sql, 100);
    const [row] = await sql<{ count: number }[]>`select count(*)::int from users_revenue`;
    return row?.count === 100_000;
  }, 120_000);
  expect(ended).toBeGreaterThan(0);
}, 130_000);

/** A journal of `frames` frames, each with one event for each of `users` users of its own. */
function writeJournal(path: string, frames: number, users: number): void {
  const parts = [encodeJournalHeader(crypto.randomUUID(), 0)];
  for (let i = 0; i < frames; i++) {
    const lines = Array.from({ length: users }, (_, user) => line(`u${i * users + user}`));
    parts.push(frame(lines.join(""), 1));
  }
  writeFileSync(path, Buffer.concat(parts));
}

async function endLongStatements(sql: ReturnType<typeof connectTest>, ms: number): Promise<number> {
  const rows = await sql`
    select pg_terminate_backend(pid) from pg_stat_activity
    where datname = current_database() and application_name = 'daybook processor'
      and state = 'active' and query like 'with move as%'
      and clock_timestamp() - query_start > make_interval(secs => ${ms / 1000})`;
  return rows.length;
}

test("a journal that replaces another is followed from its beginning", async () => {
  await using ledger = await openLedger();
  await using sql = connectTest(ledger.url);
  mkdirSync(ledger.dataDir);
  writeJournal(ledger.journal, 3, 2);
  await using _processor = ledger.process();
  const posted = async (events: number) => {
    const rows = await sql<{ sum: string }[]>`select sum(revenue) from users_revenue`.catch(
      () => [],
    );
    return rows[0]?.sum === `${events}`;
  };
  await until(() => posted(6));
  writeJournal(ledger.file("other"), 2, 2);
  renameSync(ledger.file("other"), ledger.journal);
  await until(() => posted(10));
}, 20_000);
