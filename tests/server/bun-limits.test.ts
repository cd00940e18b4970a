/**
 * What Bun does before any handler sees a request, and which README therefore states as a limit. When one
 * of these tests fails, Bun has been fixed: delete it, and the limit. The remedy is tested too: an event
 * with an id that is sent again counts once.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";

import { line } from "../support/events.ts";
import { openConnection, writtenPost } from "../support/network.ts";
import { testDatabase } from "../support/postgres.ts";
import { SECRET, startApp, tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(20_000);

const HEADERS = { authorization: SECRET, "content-type": "application/json" };
const TRAILER = "x-checksum: 1\r\n\r\n";
const BARE_400 = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
const dir = tempDir();
let database: Awaited<ReturnType<typeof testDatabase>>;
let app: Awaited<ReturnType<typeof startApp>>;

beforeAll(async () => {
  database = await testDatabase();
  app = await startApp({ dataDir: dir.path, databaseUrl: database.url });
});

afterAll(async () => {
  await app?.[Symbol.asyncDispose]();
  await database?.drop();
  dir[Symbol.dispose]();
});

test("a trailer that follows a chunked body is answered a second time, with a bare 400, and the event counts", async () => {
  using connection = openConnection(app.url);
  connection.send(chunked("late"));
  await until(() => statuses(connection.text()).length === 1);
  connection.send(TRAILER);
  await until(() => connection.isClosed());
  expect(statuses(connection.text())).toEqual(["201", "400"]);
  expect(connection.text()).toEndWith(BARE_400);
  await countsOnce("late");
});

test("a trailer that arrives with its chunked body is answered a bare 400, whatever became of the event", async () => {
  using connection = openConnection(app.url);
  connection.send(chunked("together") + TRAILER);
  await until(() => connection.isClosed());
  expect(connection.text()).toBe(BARE_400);
  await countsOnce("together");
});

test("two POSTs that are pipelined are not answered, but the first counts", async () => {
  using connection = openConnection(app.url);
  const events = ["first", "second"].map((user) => line(user, 1, { id: user }).trim());
  connection.send(events.map((event) => writtenPost("/liveEvent", HEADERS, event)).join(""));
  await until(() => connection.isClosed());
  expect(connection.text()).toBe("");
  await untilBalance(app, "first", "1");
  for (const user of ["first", "second"]) await countsOnce(user);
});

/** A POST with a chunked body, but for the end of the body: a trailer or an empty line. */
function chunked(user: string): string {
  const event = line(user, 1, { id: user }).trim();
  const size = Buffer.byteLength(event).toString(16);
  return (
    "POST /liveEvent HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n" +
    `authorization: ${SECRET}\r\ntransfer-encoding: chunked\r\n\r\n${size}\r\n${event}\r\n0\r\n`
  );
}

function statuses(text: string): string[] {
  return [...text.matchAll(/HTTP\/1\.1 (\d+)/g)].map(([, status = ""]) => status);
}

/** The remedy: the same id, sent again, counts once. */
async function countsOnce(user: string): Promise<void> {
  const response = await app.post(line(user, 1, { id: user }).trim());
  expect(response.status).toBe(201);
  const { position } = (await response.json()) as { position: string };
  const balance = await fetch(`${app.url}/userEvents/${user}?after=${position}`);
  expect(await balance.json()).toEqual({ user_id: user, revenue: "1" });
}
