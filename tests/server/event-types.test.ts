/** A team's own event types (EVENT_TYPES) and its own rules for events (EVENT_SCHEMA). */
import { expect, setDefaultTimeout, test } from "bun:test";

import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { SECRET, spawn, tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const TYPES = "add_revenue:+,subtract_revenue:-,refund:-,bonus:+,note:0";
test("each event type counts as EVENT_TYPES says; one with 0 is stored and creates no balance", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: TYPES });
  await using server = await ledger.start();
  for (const [name, value] of [
    ["add_revenue", 10],
    ["refund", 3],
    ["bonus", 0.5],
    ["note", 100],
  ] as const)
    expect((await server.post(event("ann", value, { name }))).status).toBe(201);
  const refund = line("bob", 2, { name: "refund", id: "r" });
  const bulk = await server.postLines(refund + event("cay", 1, { name: "note", id: "n" }));
  expect(await bulk.json()).toMatchObject({ accepted: 2, rejected: 0 });
  await untilBalance(server, "bob", "-2");
  expect(await ledger.balances()).toEqual({ ann: "7.5", bob: "-2" });
  expect((await ledger.tool(["--verify"])).code).toBe(0);

  const refused = await server.post(event("ann", 1, { name: "gift" }));
  expect(refused.status).toBe(422);
  expect(await refused.json()).toMatchObject({
    errors: [
      {
        path: "/name",
        message: 'must be "add_revenue", "subtract_revenue", "refund", "bonus" or "note"',
      },
    ],
  });
  const api = await (await fetch(`${server.url}/openapi/json`)).json();
  const { schema } = api.paths["/liveEvent"].post.requestBody.content["application/json"];
  expect(schema.properties.name.enum).toEqual(TYPES.split(",").map((type) => type.split(":")[0]));
});

test("quarantined events of a type that is added later are posted by --quarantine=retry", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+" });
  const lines = line("ann", 5) + line("ann", 2, { name: "refund" });
  const path = ledger.write("a.jsonl", lines);
  expect((await ledger.tool([path])).code).toBe(1);
  expect(await ledger.balances()).toEqual({ ann: "5" });
  const later = { EVENT_TYPES: "add_revenue:+,refund:-" };
  expect((await ledger.tool(["--quarantine=retry"], later)).code).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "3" });
  expect((await ledger.tool(["--verify", path], later)).code).toBe(0);
  expect((await ledger.tool(["--rebuild", path], later)).code).toBe(0);
});

test("a changed sign affects nothing that is posted, and a rebuild with it requires --yes", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+,refund:-" });
  {
    await using server = await ledger.start();
    await server.post(event("ann", 2, { name: "refund" }));
    await untilBalance(server, "ann", "-2");
  }
  const other = { EVENT_TYPES: "add_revenue:+,refund:+" };
  {
    await using server = await ledger.start(other);
    await server.post(event("ann", 10, { name: "refund" }));
    await untilBalance(server, "ann", "8");
  }
  const refused = await ledger.tool(["--rebuild"], other);
  expect(refused.code).toBe(2);
  expect(refused.stdout).toContain(
    "EVENT_TYPES differs from what events were posted as (refund:-)",
  );
  expect(refused.stderr).toContain("nothing was changed: add --yes");
  expect(await ledger.balances()).toEqual({ ann: "8" });
  expect((await ledger.tool(["--rebuild", "--yes"], other)).code).toBe(0);
  expect(await ledger.balances()).toEqual({ ann: "12" });
  // From here on there is nothing left to confirm.
  expect(await ledger.tool(["--rebuild"], other)).toMatchObject({ code: 0, stderr: "" });
});

test("no segment is deleted while a sign differs, because its effect could no longer be recomputed", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+,refund:-" });
  const keep = { JOURNAL_SEGMENT_BYTES: "300" };
  {
    await using server = await ledger.start(keep);
    for (let i = 0; i < 5; i++) await server.post(event("ann", 1, { name: "refund" }));
    await untilBalance(server, "ann", "-5");
  }
  const other = { ...keep, EVENT_TYPES: "add_revenue:+,refund:+", JOURNAL_KEEP_DAYS: "0" };
  const before = segmentNames(ledger.dataDir);
  expect(before.length).toBeGreaterThan(1);
  {
    await using server = await ledger.start(other);
    await until(() => server.stderr.text().includes("old segments are kept for now"), 30_000);
    expect(segmentNames(ledger.dataDir)).toEqual(before);
    expect((await ledger.tool(["--verify"])).code).toBe(0);
  }
  expect((await ledger.tool(["--rebuild", "--yes"], other)).code).toBe(0);
  {
    await using server = await ledger.start(other);
    await until(() => segmentNames(ledger.dataDir).length === 0, 30_000);
    expect(await server.balance("ann")).toBe("5");
  }
  expect((await ledger.tool(["--verify"], other)).code).toBe(0);
});

test("the server rejects what violates EVENT_SCHEMA, naming the path", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+" });
  const schema = {
    $schema: "https://json-schema.org/draft/2020-12/schema",
    required: ["order"],
    properties: { value: { maximum: 100 }, order: { type: "string", pattern: "^[0-9]+$" } },
  };
  const EVENT_SCHEMA = ledger.write("schema.json", JSON.stringify(schema));
  await using server = await ledger.start({ EVENT_SCHEMA });
  expect((await server.post(event("ann", 1, { order: "17" }))).status).toBe(201);
  for (const [body, wrong] of [
    [event("ann", 1, { order: "secret-text" }), "/order"],
    [event("ann"), ""],
    [event("ann", 101, { order: "1" }), "/value"],
  ] as const) {
    const refused = await server.post(body);
    expect(refused.status).toBe(422);
    const text = await refused.text();
    expect(JSON.parse(text).errors[0].path).toBe(wrong);
    expect(text).not.toContain("secret-text");
  }
  const bulk = await server.postLines(line("ann", 1, { order: "1" }) + event("ann", 500));
  expect(await bulk.json()).toMatchObject({ accepted: 1, rejected: 1, errors: [{ line: 2 }] });
  await untilBalance(server, "ann", "2");
  const api = await (await fetch(`${server.url}/openapi/json`)).json();
  const body = api.paths["/liveEvent"].post.requestBody.content["application/json"].schema;
  expect(body.allOf[1]).toEqual(schema);
});

test("an Idempotency-Key satisfies an EVENT_SCHEMA that requires an id", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+" });
  const EVENT_SCHEMA = ledger.write(
    "schema.json",
    '{"required":["id"],"properties":{"id":{"pattern":"^order-"}}}',
  );
  await using server = await ledger.start({ EVENT_SCHEMA });
  const post = (headers: Record<string, string>) =>
    fetch(`${server.url}/liveEvent`, {
      method: "POST",
      headers: { authorization: SECRET, "content-type": "application/json", ...headers },
      body: event("ann"),
    }).then(({ status }) => status);
  expect(await post({ "idempotency-key": "order-1" })).toBe(201);
  expect(await post({ "idempotency-key": "bill-1" })).toBe(422);
  expect(await post({})).toBe(422);
});

test("of many violations of EVENT_SCHEMA only some are listed, and the server keeps serving", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+" });
  const text = { type: "string" };
  const schema = { additionalProperties: text, properties: { tags: { items: text }, value: true } };
  const EVENT_SCHEMA = ledger.write("schema.json", JSON.stringify(schema));
  await using server = await ledger.start({ EVENT_SCHEMA });
  const errorsOf = async (more: object) => {
    const response = await server.post(event("ann", 1, more));
    return ((await response.json()) as { errors: { path: string }[] }).errors;
  };
  expect((await errorsOf({ tags: [1, "a", 2] })).map(({ path }) => path)).toEqual([
    "/tags/0",
    "/tags/2",
  ]);
  expect(await errorsOf({ tags: Array(1_000).fill(1) })).toHaveLength(10);
  expect((await errorsOf({ ["x".repeat(3_000)]: 1 }))[0]?.path).toHaveLength(256);
  const many = line("ann", 1, { tags: Array(20_000).fill(1) });
  const answer = await (await server.postLines(many.repeat(100))).text();
  expect(JSON.parse(answer)).toMatchObject({ accepted: 0, rejected: 100 });
  expect(answer.length).toBeLessThan(50_000);
});

test("an unusable schema or certificate ends the start with one line", async () => {
  using dir = tempDir();
  await Bun.write(dir.file("bad.json"), '{"type":"nothing"}');
  await Bun.write(dir.file("async.json"), '{"$async":true,"required":["id"]}'); // would reject nothing
  for (const env of [
    { EVENT_SCHEMA: dir.file("bad.json") },
    { EVENT_SCHEMA: dir.file("none.json") },
    { EVENT_SCHEMA: dir.file("async.json") },
    { TLS_CERT: dir.file("none.crt"), TLS_KEY: dir.file("none.key") },
  ]) {
    await using server = spawn("app.ts", { env: { DATA_DIR: dir.file("data"), ...env } });
    expect(await server.exit()).toBe(2);
    expect(server.stderr.text().trim().split("\n")[0]).toStartWith(Object.keys(env)[0] as string);
  }
});
