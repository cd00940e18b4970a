/** How far long work has come, on a terminal: with pipes there is no bar, and no other test has one. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";

import { testDatabase } from "../support/postgres.ts";
import { SECRET, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const EVENTS = 60_000;

async function onTerminal(env: Record<string, string>, program: string, ...args: string[]) {
  let said = "";
  const child = Bun.spawn(
    [process.execPath, "run", join(import.meta.dir, "..", "..", program), ...args],
    {
      env: { ...process.env, AUTH_SECRET: SECRET, ...env },
      terminal: { data: (_, bytes) => void (said += Buffer.from(bytes).toString()) },
    },
  );
  const code = await child.exited;
  await Bun.sleep(50); // what the terminal still holds
  return { code, said };
}

test("on a terminal a bar shows how far it is, and the work is done as without one", async () => {
  using dir = tempDir();
  await using database = await testDatabase();
  const file = dir.file("events.jsonl");
  const line = (i: number) => `{"userId":"user${i % 1_000}","name":"add_revenue","value":1}\n`;
  writeFileSync(file, Array.from({ length: EVENTS }, (_, i) => line(i)).join(""));
  const dataDir = dir.file("data");
  await using server = await startApp({ dataDir, databaseUrl: database.url });
  const env = { SERVER_URL: server.url, DATA_DIR: dataDir, DATABASE_URL: database.url };
  const bar = /events\.jsonl .*%.* events\/s.* left/;

  const sent = await onTerminal(env, "client.ts", file);
  expect(sent).toEqual({ code: 0, said: expect.stringContaining(`sent ${EVENTS} events (0 rej`) });
  expect(sent.said).toMatch(bar);
  await until(async () => (await server.balance("user999")) === `${EVENTS / 1_000}`);

  const verified = await onTerminal(env, "processor.ts", "--verify");
  const equal = expect.stringContaining("1000 balances match their sources");
  expect(verified).toEqual({ code: 0, said: equal });

  const posted = await onTerminal(env, "processor.ts", file);
  expect(posted).toEqual({ code: 0, said: expect.stringContaining(`posted ${EVENTS} events`) });
  expect(posted.said).toMatch(bar);
  for (const { said } of [sent, verified, posted]) expect(said).not.toMatch(/^ +at |is not a/m);
});
