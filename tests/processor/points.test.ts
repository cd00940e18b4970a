/** Revenue over time: exact, by the minute in which an event was stored, without what does not count. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";

import { encodeFrame, encodeJournalHeader, newJournalId } from "../../lib/journal/format.ts";
import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const EVENT_TYPES = "add_revenue:+,subtract_revenue:-,seen:0";
const AT = Date.parse("2026-03-04T05:06:07.890Z");
const [MINUTE, HOUR, DAY] = [60_000, 3_600_000, 86_400_000];

interface Point {
  at: string;
  step: string;
  name: string;
  events: number;
  amount: string;
}

type Ledger = Awaited<ReturnType<typeof openLedger>>;

/** Writes the journal: a frame for each entry, written at that time. */
function writeJournal({ dataDir, journal }: Ledger, frames: [number, string][]): void {
  mkdirSync(dataDir, { recursive: true });
  const bytes = frames.map(([atMs, lines]) =>
    encodeFrame([Buffer.from(lines)], Buffer.byteLength(lines), atMs),
  );
  writeFileSync(journal, Buffer.concat([encodeJournalHeader(newJournalId(), 0), ...bytes]));
}

async function revenue(url: string, query: string): Promise<Point[]> {
  const response = await fetch(`${url}/revenue?${query}`);
  expect(response.headers.get("cache-control")).toBe("no-store");
  const { points } = (await response.json()) as { points: Point[] };
  return points;
}

/** Waits until the server has nothing left to post. */
async function untilPosted(url: string): Promise<void> {
  await until(async () => {
    const response = await fetch(`${url}/readyz?reads`);
    return response.ok && ((await response.json()) as { lagBytes: number }).lagBytes === 0;
  });
}

test("events count in the minute of their frame: by name, without repeated ids, conflicts and bad lines", async () => {
  await using ledger = await openLedger({ EVENT_TYPES });
  const id = { id: "a" };
  writeJournal(ledger, [
    [AT, line("ann", 1) + line("ben", "0.1", id) + line("ann", 2, { name: "subtract_revenue" })],
    [
      AT + 1,
      line("ben", "0.1", id) + line("ben", 7, id) + "nonsense\n" + line("ann", 9, { name: "seen" }),
    ],
    [AT + MINUTE, line("ann", "999999999999999") + line("cid", 1, { id: "b" })],
    [AT - 2 * DAY, line("ben", 5, id) + line("cid", 1, { id: "b" }) + line("ann", -3)],
    [AT + HOUR, line("ann", "999999999999999").repeat(20)],
  ]);
  await using app = await ledger.start();
  await untilPosted(app.url);
  const range = "from=2026-03-02&to=2026-03-05";
  const point = (at: string, name: string, events: number, amount: string) => ({
    ...{ at: `2026-03-0${at}:00.000Z`, step: "minute", name, events, amount },
  });
  const minutes = await revenue(app.url, `step=minute&${range}`);
  expect(minutes).toEqual([
    point("2T05:06", "add_revenue", 1, "-3"),
    point("4T05:06", "add_revenue", 2, "1.1"),
    point("4T05:06", "seen", 1, "0"),
    point("4T05:06", "subtract_revenue", 1, "-2"),
    point("4T05:07", "add_revenue", 2, "1000000000000000"),
    point("4T06:06", "add_revenue", 20, "19999999999999980"),
  ]);
  const hours = await revenue(app.url, range);
  expect(hours.map(({ at, step, events }) => [at.slice(9, 13), step, events])).toEqual([
    ["2T05", "hour", 1],
    ["4T05", "hour", 4],
    ["4T05", "hour", 1],
    ["4T05", "hour", 1],
    ["4T06", "hour", 20],
  ]);
  const days = await revenue(app.url, `step=day&${range}`);
  expect(days.map(({ at, amount }) => [at, amount])).toEqual([
    ["2026-03-02T00:00:00.000Z", "-3"],
    ["2026-03-04T00:00:00.000Z", "20999999999999981.1"],
    ["2026-03-04T00:00:00.000Z", "0"],
    ["2026-03-04T00:00:00.000Z", "-2"],
  ]);
  expect(
    await revenue(app.url, "step=minute&from=2026-03-04T05:06:59Z&to=2026-03-04T05:07:59"),
  ).toEqual(minutes.slice(1, 4));
  expect(
    await revenue(app.url, "step=day&from=2026-03-03&to=2026-03-04T23:59:59.9%2B00:00"),
  ).toEqual([]);
});

test("the points of all sources add up to the balances, whoever posted them, and a file's are of when it was posted", async () => {
  await using ledger = await openLedger({ EVENT_TYPES });
  const file = ledger.write("a.jsonl", line("ann", 4).repeat(3) + line("ben", 1, { id: "x" }));
  const fromMs = Math.floor(Date.now() / MINUTE) * MINUTE;
  expect(await ledger.process([file]).exit()).toBe(0);
  await using app = await ledger.start();
  for (let i = 0; i < 200; i++) {
    const id = i % 3 === 0 ? { id: `${i % 30}` } : {};
    expect((await app.post(event(`user${i % 7}`, i, id))).status).toBe(201);
  }
  await untilPosted(app.url);
  const points = await revenue(app.url, "step=minute&from=1970-01-01&to=9999-01-01");
  for (const { at } of points) expect(Date.parse(at)).toBeWithin(fromMs, Date.now() + 1);
  const [{ sum } = { sum: "" }] = await ledger.select<{ sum: string }>(
    "select trim_scale(sum(revenue))::text as sum from users_revenue",
  );
  const total = points.reduce((sum, { amount }) => sum + Number(amount), 0);
  expect(`${total}`).toBe(sum);
});

test.each([
  ["step=week", "/step"],
  ["from=yesterday", "/from"],
  ["to=2026-13-01", "/to"],
  ["to=2026-03-04T05", "/to"],
  ["from=2026-03-05&to=2026-03-04", "/from"],
])("GET /revenue?%s is answered 422, which names %s", async (query, path) => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  const response = await fetch(`${app.url}/revenue?${query}`);
  expect(response.status).toBe(422);
  expect(((await response.json()) as { errors: { path: string }[] }).errors[0]?.path).toBe(path);
});

test("more than 10,000 points are answered 422, and a longer step answers them", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  await revenue(app.url, ""); // applies the schema
  const insert = (count: number) =>
    ledger.select(`
      insert into points select 'journal:a', 'minute', timestamptz '2026-01-01Z' + n * interval '1 minute', 'x', 1, 1
      from generate_series(1, ${count}) as n on conflict do nothing`);
  await insert(10_000);
  const range = "from=2026-01-01&to=2027-01-01";
  expect(await revenue(app.url, `step=minute&${range}`)).toHaveLength(10_000);
  await insert(10_001);
  expect((await fetch(`${app.url}/revenue?step=minute&${range}`)).status).toBe(422);
  expect(await revenue(app.url, `step=day&${range}`)).toHaveLength(7);
});
