/**
 * A server whose connections use up its descriptors: the journal stays usable, and everything works again
 * once they are closed. Linux only: the limit of a running process is set with prlimit.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync } from "node:fs";

import { line } from "../support/events.ts";
import { openConnection, writtenPost } from "../support/network.ts";
import { testDatabase } from "../support/postgres.ts";
import {
  isInstalled,
  SECRET,
  startApp,
  tempDir,
  until,
  untilBalance,
} from "../support/programs.ts";

setDefaultTimeout(60_000);

/** More connections than the process may have descriptors. */
const CONNECTIONS = 200;
const EVENTS = 10;
const PING = "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";

test.if(isInstalled("prlimit")).each([
  ["that never sent a request", false],
  ["that were answered", true],
] as const)(
  "with more idle connections %s than descriptors, the journal accepts events, and the server recovers",
  async (_what, isUsed) => {
    using dir = tempDir();
    const database = await testDatabase();
    await using stack = new AsyncDisposableStack();
    stack.defer(() => database.drop());
    // Each event begins a new file, which needs a descriptor.
    const env = { JOURNAL_SEGMENT_BYTES: "4096" };
    const app = stack.use(await startApp({ dataDir: dir.path, databaseUrl: database.url, env }));
    const headers = { authorization: SECRET, "content-type": "application/json" };
    expect((await app.post(line("ben"))).status).toBe(201);
    await untilBalance(app, "ben", "1"); // the processor has loaded what it needs
    // Each has sent half of its event, and so is not idle.
    const senders = Array.from({ length: EVENTS }, (_, i) => {
      const event = line("ann", 1, { id: `${i}`, pad: "x".repeat(3_000) });
      const written = writtenPost("/liveEvent", headers, event);
      const connection = stack.use(openConnection(app.url));
      connection.send(`${PING}${written.slice(0, -1_000)}`);
      return { connection, rest: written.slice(-1_000) };
    });
    for (const { connection } of senders)
      await until(() => connection.text().startsWith("HTTP/1.1 200"));

    const open = readdirSync(`/proc/${app.pid}/fd`).length;
    Bun.spawnSync(["prlimit", `--pid=${app.pid}`, `--nofile=${open + 20}`]);
    const idle = Array.from({ length: CONNECTIONS }, () => openConnection(app.url));
    if (isUsed) for (const connection of idle) connection.send(PING);
    await until(() => app.stderr.text().includes("no descriptor is left"));
    for (const { connection, rest } of senders) {
      connection.send(rest);
      await until(() => connection.text().includes("HTTP/1.1 201"));
    }
    // Bun closes those that have been used; the others end at the idle limit.
    if (isUsed) await until(() => idle.some((connection) => connection.isClosed()));
    for (const connection of idle) connection[Symbol.dispose]();

    const later = stack.use(openConnection(app.url));
    later.send(PING);
    await until(() => later.text().startsWith("HTTP/1.1 200"));
    await until(() => app.stderr.text().includes("descriptors are available again"));
    const response = await app.post(line("ann", 1, { id: "last" }));
    expect(response.status).toBe(201);
    await untilBalance(app, "ann", `${EVENTS + 1}`);
  },
);
