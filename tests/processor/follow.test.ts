import { expect, test } from "bun:test";
import { renameSync, writeFileSync } from "node:fs";

import { encodeFrame, encodeJournalHeader } from "../../lib/journal/format.ts";
import { connectTest, testDatabase } from "../support/postgres.ts";
import { spawn, tempDir, until } from "../support/programs.ts";

test("a backlog is posted although every statement of more than 100 ms is terminated", async () => {
  await using db = await testDatabase();
  await using sql = connectTest(db.url);
  await sql.file(`${import.meta.dir}/../../schema.sql`);
  using dir = tempDir();
  writeJournal(dir.file("eventsPost.jsonl"), 100, 1_000);
  await using _processor = spawn("processor.ts", {
    env: { DATA_DIR: dir.path, DATABASE_URL: db.url },
  });

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
  for (let frame = 0; frame < frames; frame++) {
    const lines = Array.from(
      { length: users },
      (_, user) => `{"userId":"u${frame * users + user}","name":"add_revenue","value":1}\n`,
    );
    const payload = Buffer.from(lines.join(""));
    parts.push(encodeFrame([payload], payload.length, 1));
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
  await using db = await testDatabase();
  await using sql = connectTest(db.url);
  using dir = tempDir();
  writeJournal(dir.file("eventsPost.jsonl"), 3, 2);
  await using _processor = spawn("processor.ts", {
    env: { DATA_DIR: dir.path, DATABASE_URL: db.url },
  });
  const posted = async (events: number) => {
    const rows = await sql<{ sum: string }[]>`select sum(revenue) from users_revenue`.catch(
      () => [],
    );
    return rows[0]?.sum === `${events}`;
  };
  await until(() => posted(6));
  writeJournal(dir.file("other"), 2, 2);
  renameSync(dir.file("other"), dir.file("eventsPost.jsonl"));
  await until(() => posted(10));
}, 20_000);
