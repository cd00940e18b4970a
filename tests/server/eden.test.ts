/**
 * The server as another service uses it: through the type that app.ts exports. Calls that violate it do
 * not compile (`bun check` verifies each `@ts-expect-error`); the others work with a real server.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";

import { treaty } from "@elysiajs/eden";

import type { App } from "../../app.ts";
import { version } from "../../package.json";
import { testDatabase } from "../support/postgres.ts";
import { SECRET, startApp, tempDir } from "../support/programs.ts";

setDefaultTimeout(30_000);

const dir = tempDir();
let database: Awaited<ReturnType<typeof testDatabase>>;
let server: Awaited<ReturnType<typeof startApp>>;
let daybook: ReturnType<typeof treaty<App>>;

beforeAll(async () => {
  database = await testDatabase();
  server = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  daybook = treaty<App>(server.url, { headers: { authorization: `Bearer ${SECRET}` } });
});

afterAll(async () => {
  await server?.[Symbol.asyncDispose]();
  await database?.drop();
  dir[Symbol.dispose]();
});

test("a typed client sends an event and reads its balance once it is posted", async () => {
  const sent = await daybook.liveEvent.post({ userId: "ann", name: "add_revenue", value: 98.5 });
  expect(sent.status).toBe(201);
  const after = sent.data?.position ?? "";
  const { data, error } = await daybook.userEvents({ userid: "ann" }).get({ query: { after } });
  expect(error).toBeNull();
  const revenue: string | undefined = data?.revenue;
  expect([data?.user_id, revenue]).toEqual(["ann", "98.5"]);
  const listed = await daybook.userEvents.get({ query: { user_id: "ann" } });
  expect(listed.data).toEqual({ users: [{ user_id: "ann", revenue: "98.5" }], next: null });
});

test("a typed client sends events as lines and gets the fault of a bad one", async () => {
  const lines = '{"userId":"ben","name":"add_revenue","value":1}\n{"userId":"ben"}\n';
  const headers = { "content-type": "application/x-ndjson" };
  const { data } = await daybook.liveEvents.post(lines, { headers, query: { errors: 10 } });
  expect(data).toMatchObject({ accepted: 1, rejected: 1, errors: [{ line: 2 }] });
});

test("probes and metrics are typed as well", async () => {
  const ready = await daybook.readyz.get();
  const lag: number | undefined = ready.data?.lagSeconds;
  expect([ready.data?.status, typeof lag]).toEqual(["ready", "number"]);
  expect((await daybook.healthz.get()).data).toEqual({ status: "ok", version });
  const described = await (await fetch(`${server.url}/openapi/json`)).json();
  expect(described.info.version).toBe(version);
  expect((await daybook.metrics.get()).data).toContain("daybook_events_accepted_total");
});

test("a failure is a problem document with its status", async () => {
  const { data, error } = await daybook.userEvents({ userid: "nobody" }).get();
  expect([data, error?.status as number]).toEqual([null, 404]);
});

test("calls that violate the types do not compile, and are rejected", async () => {
  // @ts-expect-error wrong field
  const field = await daybook.liveEvent.post({ user: "ann", name: "add_revenue", value: 1 });
  // @ts-expect-error wrong type
  const type = await daybook.liveEvent.post({ userId: "ann", name: "add_revenue", value: "1" });
  // @ts-expect-error missing field
  const missing = await daybook.liveEvent.post({ userId: "ann", name: "add_revenue" });
  // @ts-expect-error wrong route
  const route = await daybook.liveevent.post({ userId: "ann", name: "add_revenue", value: 1 });
  // @ts-expect-error wrong method
  const method = await daybook.userEvents({ userid: "ann" }).post();
  const answers = [field, type, missing, route, method] as { status: number }[];
  expect(answers.map(({ status }) => status)).toEqual([422, 422, 422, 404, 405]);
  // @ts-expect-error wrong name of a parameter
  daybook.userEvents({ user: "ann" });
});
