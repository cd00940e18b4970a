/** The progress of long work on a terminal. (Without a terminal there is no bar, and other tests have none.) */
import { expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";

import { line } from "../support/events.ts";
import { testDatabase } from "../support/postgres.ts";
import { root, SECRET, startApp, tempDir, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const EVENTS = 60_000;

async function onTerminal(env: Record<string, string>, program: string, ...args: string[]) {
  let shown = "";
  const { promise: closed, resolve: close } = Promise.withResolvers<void>();
  const child = Bun.spawn([process.execPath, "run", join(root, program), ...args], {
    env: { ...process.env, AUTH_SECRET: SECRET, ...env },
    terminal: {
      data: (_, bytes) => void (shown += Buffer.from(bytes).toString()),
      exit: () => close(),
    },
  });
  const code = await child.exited;
  await closed;
  return { code, shown };
}

test("on a terminal, a bar shows the progress, and the result is the same as without one", async () => {
  using dir = tempDir();
  await using database = await testDatabase();
  const file = dir.file("events.jsonl");
  const lines = Array.from({ length: EVENTS }, (_, i) => line(`user${i % 1_000}`));
  writeFileSync(file, lines.join(""));
  const dataDir = dir.file("data");
  await using server = await startApp({ dataDir, databaseUrl: database.url });
  const env = { SERVER_URL: server.url, DATA_DIR: dataDir, DATABASE_URL: database.url };
  const bar = /events\.jsonl .*%.* events\/s.* left/;

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
