/** No request delays another: long work is done in slices, counted here in lines and bytes, not in time. */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { zstdCompressSync } from "node:zlib";

import { openJournal } from "../../lib/journal/writer.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { openLog } from "../../lib/log.ts";
import { readEvent, sortLines } from "../../lib/server/body.ts";
import { openEventSchema } from "../../lib/server/event-schema.ts";
import { openMemoryBudget } from "../../lib/server/memory.ts";
import { openSources } from "../../lib/server/sources.ts";
import { nextTurn, SLICE_WORK } from "../../lib/server/turns.ts";
import { zstdContentBytes } from "../../lib/server/zstd.ts";
import { tempDir } from "../support/programs.ts";

setDefaultTimeout(60_000);

const EVENT = '{"userId":"u","name":"add_revenue","value":1}';
/** What a line costs at least that the scanner does not recognize. */
const LINE_WORK = 256;

const dir = tempDir();
beforeAll(() => writeFileSync(dir.file("schema.json"), "{}"));
afterAll(() => dir[Symbol.dispose]());

/** The most that `count()` grew in one turn of the event loop while `work` ran. */
async function mostInOneTurn(count: () => number, work: () => Promise<unknown>): Promise<number> {
  let most = 0;
  let before = count();
  let isDone = false;
  const look = () => {
    most = Math.max(most, count() - before);
    before = count();
    if (!isDone) setImmediate(look);
  };
  setImmediate(look);
  await work();
  isDone = true;
  return Math.max(most, count() - before);
}

test.each([
  ["not UTF-8", "\xff\n"],
  ["not JSON", "x\n"],
  ["no object", "{}\n"],
  ["no event", '{"id":0}\n'],
])(
  "bad lines (%s) leave others their turn, also when many bodies are full of them",
  async (_, line) => {
    const bodies = Array.from({ length: 10 }, () => Buffer.from(line.repeat(20_000), "latin1"));
    let rejected = 0;
    const onRejected = () => void rejected++;
    const sort = () =>
      Promise.all(bodies.map((body) => sortLines(body, { schema: null, onRejected }, 0)));
    expect(await mostInOneTurn(() => rejected, sort)).toBeLessThanOrEqual(
      2 * (SLICE_WORK / LINE_WORK + 1),
    );
    expect(rejected).toBe(bodies.length * 20_000);
  },
);

test("one slice runs in a turn of the loop, however many wait", async () => {
  let slices = 0;
  const work = async () => {
    for (let i = 0; i < 5; i++) {
      await nextTurn();
      slices++;
    }
  };
  const all = () => Promise.all(Array.from({ length: 20 }, work));
  expect(await mostInOneTurn(() => slices, all)).toBe(1);
  expect(slices).toBe(100);
});

test.each([
  ["scanned events", EVENT, null, 1],
  ["events of another form", EVENT.replace("}", ',"more":1}'), null, 16],
  ["events with a long array", EVENT.replace("}", `,"more":[${"0,".repeat(20_000)}0]}`), null, 16],
  ["events under a schema", EVENT, "schema", 1],
])("%s leave others their turn", async (_, event, schemaName, byteWork) => {
  const line = `${event}\n`;
  const lines = Math.ceil((4 * SLICE_WORK) / byteWork / line.length) + 4;
  using schema = schemaName
    ? await openEventSchema(dir.file("schema.json"), openLog("silent"))
    : null;
  const body = Buffer.from(line.repeat(lines));
  let turns = 0;
  let isDone = false;
  const count = () => {
    if (isDone) return;
    turns++;
    setImmediate(count);
  };
  setImmediate(count);
  const { counts } = await sortLines(body, { schema, onRejected() {} }, 0);
  isDone = true;
  expect(counts.accepted).toBe(lines);
  expect(turns).toBeGreaterThanOrEqual(3);
});

test("large events take their turns, however many arrive at once", async () => {
  const text = EVENT.replace("}", `,"more":"${"x".repeat(2_000)}"}`);
  const budget = openMemoryBudget();
  let read = 0;
  const readOne = async () => {
    using reservation = budget.admit();
    const headers = { "content-type": "application/json", "content-length": `${text.length}` };
    const request = new Request("http://a", { method: "POST", headers, body: text });
    await readEvent({ request, reservation, schema: null, onRejected() {} });
    read++;
  };
  const all = () => Promise.all(Array.from({ length: 50 }, readOne));
  expect(await mostInOneTurn(() => read, all)).toBe(1);
  expect(read).toBe(50);
});

test("a piece of a source is hashed in slices", async () => {
  using journalDir = tempDir();
  const journal = await openJournal({ directory: journalDir.path, say() {} });
  const database = openDatabase(() => "postgres://nobody@127.0.0.1:1/nothing", "test", 1);
  const sources = openSources(journal, database, async () => {});
  const body = Buffer.alloc(16 * 1024 * 1024, "\n");
  const digest = new Bun.CryptoHasher("sha256").update(body).digest("hex");
  let turns = 0;
  let isHashed = false;
  const count = () => setImmediate(() => void (turns++, isHashed || count()));
  // What comes before takes turns as well, so they are counted from the second piece on.
  const empty = new Bun.CryptoHasher("sha256").digest("hex");
  const lines = async () => sortLines(Buffer.alloc(0), { schema: null, onRejected() {} }, 0);
  await sources.store({ name: "a", from: 0, digest: empty }, Buffer.alloc(0), lines);
  count();
  const stored = await sources.store({ name: "a", from: 0, digest }, body, () => {
    isHashed = true;
    return lines();
  });
  expect(stored).toHaveProperty("position");
  expect(turns).toBeGreaterThanOrEqual(14);
  await journal.close();
  await database.close();
});

test("the frames of a zstd body are walked in slices", async () => {
  const frame = zstdCompressSync(Buffer.from("x"));
  const body = Buffer.concat(Array.from({ length: 50_000 }, () => frame));
  let turns = 0;
  const count = () => setImmediate(() => void (turns++, isDone || count()));
  let isDone = false;
  count();
  expect(await zstdContentBytes(body)).toBe(50_000);
  isDone = true;
  expect(turns).toBeGreaterThanOrEqual(4);
  expect(await zstdContentBytes(body.subarray(0, -1))).toBeNull();
});
