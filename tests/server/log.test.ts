/** The log of long-running programs: each change once, never a body or a secret. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";

import { event } from "../support/events.ts";
import { version } from "../../package.json";
import { openProxy } from "../support/network.ts";
import { testDatabase } from "../support/postgres.ts";
import {
  isInstalled,
  messages,
  SECRET,
  spawn,
  startApp,
  tempDir,
  until,
} from "../support/programs.ts";

setDefaultTimeout(30_000);

const MARKER = "zebra-quagga-okapi";
const NO_DATABASE = `postgres://daybook:${MARKER}@127.0.0.1:1/daybook`;

test("the log is JSON lines: the start with masked secrets, and the stop", async () => {
  using dir = tempDir();
  const env = { AUTH_SECRET: MARKER, READ_SECRET: `${MARKER}-2`, JWT_SECRET: MARKER.repeat(2) };
  await using app = await startApp({
    ...{ dataDir: dir.path, databaseUrl: NO_DATABASE, env },
    args: ["--no-processor"],
  });
  app.kill("SIGTERM");
  await app.exit();
  expect(messages(app.stderr.text())).toEqual([
    `info: daybook ${version} on Bun ${Bun.version}`,
    `info: listening on ${app.url}`,
    `info: send events with: SERVER_URL=${app.url} bun run client.ts events.jsonl; see them at ${app.url}/`,
    "info: settings",
    "info: stopping",
    "info: stopped",
  ]);
  const { settings, time } = JSON.parse(app.stderr.text().split("\n")[3]!);
  expect(settings).toMatchObject({ AUTH_SECRET: "(set)", DATABASE_URL: "(set)", PORT: 0 });
  expect(new Date(time).toISOString()).toBe(time);
  expect(app.stderr.text()).not.toContain(MARKER);
});

test("a database outage is logged once, its failures are counted, and its end is logged", async () => {
  using dir = tempDir();
  await using database = await testDatabase();
  await using proxy = await openProxy(database.url);
  await using app = await startApp({ dataDir: dir.path, databaseUrl: proxy.url });
  const ask = async () => (await fetch(`${app.url}/userEvents/ann`)).status;
  await until(async () => (await ask()) === 404);
  proxy.cut();
  expect(await ask()).toBe(503);
  // Answered from memory: that is not the end of the outage.
  const headers = { authorization: SECRET };
  expect((await fetch(`${app.url}/sources/new`, { method: "HEAD", headers })).status).toBe(404);
  for (let i = 1; i < 20; i++) expect(await ask()).toBe(503);
  await app.post(event("ben"));
  await until(() => app.stderr.text().includes("processor: waiting"));
  proxy.mend();
  await until(async () => (await ask()) === 404);
  await until(() => app.stderr.text().includes("processor: posting again"));
  const lines = app.stderr.text().trimEnd().split("\n");
  const outages = lines.filter(
    (line) => line.startsWith('{"level":"warn"') && line.includes('"database: '),
  );
  // The first connection is cut and later ones are refused: at most two reasons.
  expect(outages.length).toBeWithin(1, 3);
  const [back, ...others] = lines.filter((line) => line.includes("database: available again"));
  expect(others).toEqual([]);
  expect(JSON.parse(back!).failures).toBeWithin(20, 22);
});

test.if(isInstalled("prlimit"))(
  "a full disk is logged once, and so is the first event that is stored again",
  async () => {
    using dir = tempDir();
    await using app = await startApp({
      ...{ dataDir: dir.path, databaseUrl: NO_DATABASE },
      args: ["--no-processor"],
    });
    const limit = (bytes: string) =>
      Bun.spawnSync(["prlimit", `--pid=${app.pid}`, `--fsize=${bytes}:`]).exitCode;
    expect(limit("4000")).toBe(0);
    const send = async () => (await app.post(event("ann", 1, { note: "n".repeat(900) }))).status;
    await until(async () => (await send()) === 507);
    for (let i = 0; i < 5; i++) expect(await send()).toBe(507);
    const ready = await fetch(`${app.url}/readyz`);
    expect(ready.status).toBe(503);
    expect(await ready.text()).toContain("the journal cannot store events now: cannot append to ");
    limit("1000000");
    expect(await send()).toBe(201);
    expect(messages(app.stderr.text()).slice(4)).toEqual([
      expect.stringMatching(/^error: cannot append to /),
      "info: journal: events are stored again",
    ]);
  },
);

test("a processor that stands by says so, and says when it takes over", async () => {
  using dir = tempDir();
  const env = { DATA_DIR: dir.path, DATABASE_URL: NO_DATABASE };
  await using app = await startApp({ dataDir: dir.path, databaseUrl: NO_DATABASE });
  await until(() => app.stderr.text().includes("processor: following"));
  await using processor = spawn("processor.ts", { env });
  await until(() => processor.stderr.text().includes("standing by"));
  app.kill("SIGKILL");
  await until(() => processor.stderr.text().includes("following"));
  expect(messages(processor.stderr.text()).slice(0, 4)).toEqual([
    `info: daybook ${version} on Bun ${Bun.version}`,
    "info: started",
    "info: standing by: another processor follows this journal",
    `info: following ${dir.file("eventsPost.jsonl")}`,
  ]);
});

test("each request has its sender's id or a new one, and a log line only at debug", async () => {
  using dir = tempDir();
  const start = (LOG_LEVEL: string) =>
    startApp({
      ...{ dataDir: dir.file(LOG_LEVEL), databaseUrl: NO_DATABASE },
      env: { LOG_LEVEL, AUTH_SECRET: MARKER },
      args: ["--no-processor"],
    });
  await using quiet = await start("info");
  await using loud = await start("debug");
  for (const { url } of [quiet, loud]) {
    const send = async (path: string, id?: string) => {
      const response = await fetch(`${url}${path}`, {
        method: "POST",
        body: `{"userId":"${MARKER}","name":"${MARKER}"}`,
        headers: {
          authorization: MARKER,
          "content-type": "application/json",
          ...(id ? { "x-request-id": id } : {}),
        },
      });
      await response.text();
      return response.headers.get("x-request-id");
    };
    expect(await send("/liveEvent", "order-17:a")).toBe("order-17:a");
    for (const id of [undefined, 'a "quoted" one', "x".repeat(129)])
      expect(await send("/liveEvent", id)).toMatch(/^[0-9a-f]{8}-[0-9a-z]+$/);
    expect(await send(`/${MARKER}`, "b")).toBe("b");
    const balance = await fetch(`${url}/userEvents/${MARKER}?after=${MARKER}`);
    expect(balance.headers.get("x-request-id")).toMatch(/^[0-9a-f]{8}-[0-9a-z]+$/);
  }
  await until(() => loud.stderr.text().trimEnd().split("\n").length === 10);
  const requests = loud.stderr
    .text()
    .trimEnd()
    .split("\n")
    .slice(4)
    .map((line) => JSON.parse(line));
  expect(requests[0]).toMatchObject({
    id: "order-17:a",
    method: "POST",
    route: "/liveEvent",
    status: 422,
  });
  expect(requests[4]).toMatchObject({ id: "b", route: "other", status: 404 });
  expect(requests[5]).toMatchObject({ route: "/userEvents/:userid", status: 422 });
  expect(messages(quiet.stderr.text())).toHaveLength(4);
  expect(loud.stderr.text() + quiet.stderr.text()).not.toContain(MARKER);
});

test("on a terminal the log has readable lines", async () => {
  using dir = tempDir();
  let said = "";
  const app = Bun.spawn(
    [process.execPath, "run", join(import.meta.dir, "../../app.ts"), "--no-processor"],
    {
      env: { ...process.env, PORT: "0", DATA_DIR: dir.path, DATABASE_URL: NO_DATABASE },
      terminal: { data: (_, bytes) => void (said += Buffer.from(bytes).toString()) },
    },
  );
  try {
    await until(() =>
      /^\d\d:\d\d:\d\d info {2}listening on http:\S+\r\n.*send events with: /m.test(said),
    );
    expect(said).not.toContain("settings");
  } finally {
    app.kill("SIGTERM");
    await app.exited;
  }
});
