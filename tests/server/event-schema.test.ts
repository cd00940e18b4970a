/** EVENT_SCHEMA is a team's own, and may take hours for one event: that event is rejected, no other waits. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";

import { openLog } from "../../lib/log.ts";
import { sortLines } from "../../lib/server/body.ts";
import { type EventSchema, openEventSchema } from "../../lib/server/event-schema.ts";
import { Problem } from "../../lib/server/problem.ts";
import { event, line } from "../support/events.ts";
import { messages, run, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const NOWHERE = "postgres://nobody@127.0.0.1:1/nothing";
const SLOW = "takes more than 100 ms to validate against EVENT_SCHEMA; make it shorter";

async function start(dir: { path: string; file(name: string): string }, schema: object) {
  await Bun.write(dir.file("schema.json"), JSON.stringify(schema));
  return startApp({
    ...{ dataDir: dir.file("data"), databaseUrl: NOWHERE, args: ["--no-processor"] },
    env: { EVENT_SCHEMA: dir.file("schema.json") },
  });
}

/** The processes that a process has started, as `pid`s. Linux only. */
function childrenOf(pid: number): number[] {
  const list = readFileSync(`/proc/${pid}/task/${pid}/children`, "utf8");
  return list.split(" ").filter(Boolean).map(Number);
}

function isAlive(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

test.each([
  ["a pattern", { note: { pattern: "(.*)(.*)x$" } }, { note: "a".repeat(60_000) }],
  [
    "uniqueItems",
    { list: { uniqueItems: true } },
    { list: Array.from({ length: 8_000 }, (_, n) => [n]) },
  ],
])(
  "an event that %s would check for very long is rejected, and the others are stored",
  async (_, properties, slow) => {
    using dir = tempDir();
    await using app = await start(dir, { properties });
    expect(messages(app.stderr.text()).filter((text) => text.includes("is rejected"))).toHaveLength(
      1,
    );
    const alone = await app.post(event("slow", 1, slow));
    expect(alone.status).toBe(422);
    expect(await alone.json()).toMatchObject({ errors: [{ path: "", message: SLOW }] });
    const bulk =
      line("ann") + line("slow", 1, slow) + line("bob") + line("slow", 1, slow) + line("cay");
    const [sorted, other] = await Promise.all([app.postLines(bulk), app.post(event("other"))]);
    expect(await sorted.json()).toMatchObject({
      ...{ accepted: 3, rejected: 2 },
      errors: [
        { line: 2, message: SLOW },
        { line: 4, message: SLOW },
      ],
    });
    expect(other.status).toBe(201);
    await Bun.write(dir.file("a.jsonl"), bulk);
    const { code, stderr } = await run("client.ts", {
      args: [dir.file("a.jsonl")],
      env: { SERVER_URL: app.url },
    });
    expect({ code, stderr }).toEqual({
      code: 1,
      stderr: expect.stringContaining("2 lines were rejected"),
    });
    expect(app.stderr.text().match(/an event was rejected/g)).toHaveLength(1);
  },
);

test("what validates is replaced when it dies, and never outlives the server", async () => {
  using dir = tempDir();
  await using app = await start(dir, { properties: { note: { pattern: "(.*)(.*)x$" } } });
  const [first] = childrenOf(app.pid);
  process.kill(first as number, "SIGKILL");
  await until(() => !isAlive(first as number) || childrenOf(app.pid).length === 0);
  // A request that comes before the server knows is answered 503.
  await until(async () => (await app.post(event("ann"))).status === 201);
  const [second] = childrenOf(app.pid);
  expect(second).not.toBe(first);
  app.kill("SIGKILL");
  await app.exit();
  await until(() => !isAlive(second as number));
});

test("a body for which EVENT_SCHEMA takes too long is answered with what can be sent of it", async () => {
  const lines = [line("ann"), line("bob"), line("cay")];
  const openBody = () => async () => ({ faults: new Map(), next: 2 });
  const schema: EventSchema = { document: {}, openBody, [Symbol.dispose]() {} };
  const sorting = sortLines(Buffer.from(lines.join("")), { schema, onRejected() {} }, 0);
  const problem = (await sorting.catch((error) => error)) as Problem;
  expect([problem.status, problem.more.bytes]).toEqual([413, lines[0]!.length + lines[1]!.length]);
});

test.each([
  [{ properties: { a: { uniqueItems: true } } }, "#/properties/a: uniqueItems without a maxItems"],
  [{ properties: { a: { uniqueItems: true, maxItems: 1e6 } } }, "#/properties/a: uniqueItems"],
  [{ properties: { a: { uniqueItems: true, maxItems: 100 } } }, null],
  [{ $defs: { a: { pattern: "^(a+)+$" } } }, '#/$defs/a: a pattern that backtracks, "^(a+)+$"'],
  [{ items: { pattern: "^(a|a)*$", maxLength: 50 } }, "#/items: a pattern"],
  [{ prefixItems: [{ pattern: "^(\\w+\\s?){2,}$", maxLength: 50 }] }, "#/prefixItems/0: a pattern"],
  [{ not: { patternProperties: { "[0-9]+$": {} } } }, "#/not: a pattern"],
  [{ items: { pattern: "[0-9]+$" } }, "#/items: a pattern"],
  [{ items: { pattern: "[0-9]+$", maxLength: 100 } }, null],
  [{ items: { pattern: "^.*-.*$" } }, "#/items: a pattern"],
  [{ items: { pattern: "^[0-9+*]+$" } }, null],
  [{ items: { pattern: "^[A-Z]{3}-[0-9]{4}$" } }, null],
  [{ items: { pattern: "^(a|b)-(c|d)$" } }, null],
  [{ const: { pattern: 7 }, enum: [null] }, null],
])("the start warns of %j: %s", async (document, warning) => {
  using dir = tempDir();
  await Bun.write(dir.file("schema.json"), JSON.stringify(document));
  const lines: string[] = [];
  const log = Object.assign(openLog("silent"), { warn: (text: string) => lines.push(text) });
  using _ = await openEventSchema(dir.file("schema.json"), log as never);
  expect(lines).toEqual(warning === null ? [] : [expect.stringContaining(warning)]);
});
