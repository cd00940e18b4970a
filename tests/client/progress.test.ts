/** The progress of long work on a terminal. (Without a terminal there is no bar, and other tests have none.) */
import { expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";

import { line } from "../support/events.ts";
import { connectTest, testDatabase } from "../support/postgres.ts";
import { root, until, startApp, tempDir, untilBalance } from "../support/programs.ts";
import { onTerminal } from "../support/terminal.ts";

setDefaultTimeout(60_000);

const EVENTS = 60_000;

test("on a terminal, a bar shows the progress, and the result is the same as without one", async () => {
  using dir = tempDir();
  await using database = await testDatabase();
  const file = dir.file("events.jsonl");
  const lines = Array.from({ length: EVENTS }, (_, i) => line(`user${i % 1_000}`));
  writeFileSync(file, lines.join(""));
  const dataDir = dir.file("data");
  await using server = await startApp({ dataDir, databaseUrl: database.url });
  const env = { SERVER_URL: server.url, DATA_DIR: dataDir, DATABASE_URL: database.url };
  const bar = /%.* events\/s.* left.* events\.jsonl/;

  const sent = await onTerminal(env, "client.ts", file);
  expect(sent).toEqual({ code: 0, shown: expect.stringContaining(`sent ${EVENTS} events (0 rej`) });
  expect(sent.shown).toMatch(bar);
  await untilBalance(server, "user999", `${EVENTS / 1_000}`);

  const verified = await onTerminal(env, "processor.ts", "--verify");
  const equal = expect.stringContaining("1000 balances match their sources");
  expect(verified).toEqual({ code: 0, shown: equal });

  const posted = await onTerminal(env, "processor.ts", file);
  expect(posted).toEqual({ code: 0, shown: expect.stringContaining(`posted ${EVENTS} events`) });
  expect(posted.shown).toMatch(bar);
  for (const { shown } of [sent, verified, posted]) expect(shown).not.toMatch(/^ +at |is not a/m);
});

test("processor.ts FILE shows what it has read, before any of it is posted", async () => {
  using dir = tempDir();
  await using database = await testDatabase();
  const env = { ...process.env, TERM: "xterm", DATA_DIR: dir.path, DATABASE_URL: database.url };
  const small = dir.file("small.jsonl");
  writeFileSync(small, line("ann"));
  expect((await onTerminal(env, "processor.ts", small)).code).toBe(0);
  const file = dir.file("events.jsonl");
  writeFileSync(file, line("ann", 1, { note: "n".repeat(1_000) }).repeat(4_000));
  let shown = "";
  await using sql = connectTest(database.url);
  await sql.unsafe(`
    create function hold() returns trigger language plpgsql as
      'begin perform pg_advisory_xact_lock_shared(7); return null; end';
    create trigger hold before insert on users_revenue for each statement execute function hold();`);
  await sql`select pg_advisory_lock(7)`;
  const child = Bun.spawn([process.execPath, "run", join(root, "processor.ts"), file], {
    env,
    terminal: { data: (_, bytes) => void (shown += Buffer.from(bytes).toString()) },
  });
  await until(() => / [1-9]\d?% \|/.test(shown), 30_000);
  await sql`select pg_advisory_unlock(7)`;
  expect(await child.exited).toBe(0);
});

test("a bar fits the terminal as it is now, hides no message, and ^C leaves a summary and the terminal as it was", async () => {
  using dir = tempDir();
  const file = dir.file(`${"long-name-".repeat(12)}.jsonl`);
  writeFileSync(file, line("ann").repeat(10));
  let shown = "";
  const { promise: closed, resolve: close } = Promise.withResolvers<void>();
  let asked = 0;
  // The source is new; then the server is unavailable.
  await using server = Bun.serve({
    port: 0,
    fetch: () => new Response(null, { status: asked++ === 0 ? 404 : 503 }),
  });
  const client = Bun.spawn([process.execPath, "run", join(root, "client.ts"), file], {
    env: { ...process.env, TERM: "xterm", SERVER_URL: server.url.origin },
    terminal: {
      cols: 70,
      data: (_, bytes) => void (shown += Buffer.from(bytes).toString()),
      exit: () => close(),
    },
  });
  await until(() => /answered 503.*retrying for/.test(shown));
  const bars = () => shown.split(/[\r\n]+/).flatMap((part) => /\[K(.*%.*)/.exec(part)?.[1] ?? []);
  await until(() => bars().length >= 2); // drawn again below the message
  expect(bars().map((bar) => Bun.stringWidth(bar))).toEqual(bars().map(() => 69));
  client.terminal!.resize(50, 24);
  await until(() => Bun.stringWidth(bars().at(-1)!) === 49);
  client.terminal!.write("\x03");
  expect(await client.exited).toBe(130);
  await closed;
  expect(shown).toMatch(/stopped at 0 %; run it again to continue\r\n.*stopped: sent 0 events /);
  expect(shown).not.toMatch(/\x1b\[\?/); // no mode of the terminal was changed
});
