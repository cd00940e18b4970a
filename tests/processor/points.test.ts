/** Revenue over time: exact, by the minute in which an event was stored, without what does not count. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";

import { encodeFrame, encodeJournalHeader, newJournalId } from "../../lib/journal/format.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { foldPoints } from "../../lib/ledger/points.ts";
import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { connectTest } from "../support/postgres.ts";
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
  ["step=day&step=hour", "/step"],
  ["from=2026-01-01&from=2026-01-02", "/from"],
  ["from=yesterday", "/from"],
  ["to=2026-13-01", "/to"],
  ["from=2026-02-30", "/from"],
  ["to=0000-06-01", "/to"],
  ["to=2026-03-04T05", "/to"],
  ["from=2026-03-05&to=2026-03-04", "/from"],
])("GET /revenue?%s is answered 422, which names %s", async (query, path) => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  const response = await fetch(`${app.url}/revenue?${query}`);
  expect(response.status).toBe(422);
  const { errors } = (await response.json()) as { errors: [{ path: string; message: string }] };
  expect(errors[0].path).toBe(path);
  if (query === "step=week") expect(errors[0].message).toBe("must be minute or hour or day");
});

test("a range at either end of the calendar is answered, and is not taken for an outage", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  for (const step of ["minute", "hour", "day"])
    for (const range of [
      "to=0001-01-01T00:00:00Z",
      "to=0001-01-02",
      "from=0001-01-01&to=9999-12-31T23:59:59.999Z",
      "from=9999-12-31T23:59:59Z&to=9999-12-31T23:59:59.999Z",
    ])
      expect(await revenue(app.url, `step=${step}&${range}`)).toEqual([]);
  expect(app.stderr.text()).not.toContain("database");
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

/** The points of a ledger, whole. */
const pointsOf = (ledger: Ledger) =>
  ledger.select<{ step: string; at: string; name: string; events: string; amount: string }>(
    `select step, (at at time zone 'UTC')::text as at, name, events, amount from points
     order by at, step, name`,
  );

test("--verify finds a point that differs, and --rebuild corrects it, at the step that is kept", async () => {
  await using ledger = await openLedger({ EVENT_TYPES, JOURNAL_SEGMENT_BYTES: "1000" });
  const id = { id: "a" };
  writeJournal(ledger, [
    [AT, line("ann", 1).repeat(3) + line("ben", "0.1", id)],
    [AT + MINUTE, line("ann", 2, { name: "subtract_revenue" }) + line("ben", "0.1", id) + "bad\n"],
    [AT + 2 * DAY, line("ann", 5)],
  ]);
  await using app = await ledger.start();
  await untilPosted(app.url);
  const verify = async () => (await ledger.tool(["--verify"])).code;
  expect(await verify()).toBe(0);
  const before = await pointsOf(ledger);
  await ledger.select("update points set events = events + 1 where name = 'subtract_revenue'");
  await ledger.select("delete from points where at > '2026-03-05'");
  await ledger.select(
    "insert into points select source, step, at, 'seen', 4, 0 from points limit 1 on conflict do nothing",
  );
  const verified = await ledger.tool(["--verify"]);
  expect(verified.code).toBe(1);
  expect(verified.stdout).toContain("3 points of revenue over time differ from their sources");
  expect((await ledger.tool(["--rebuild"])).stdout).toContain(
    "points of revenue over time corrected: 3\n",
  );
  expect(await pointsOf(ledger)).toEqual(before);

  // Hours and days: what is folded is compared as it is kept.
  await ledger.select("update boundary set day = '2026-03-20'");
  const database = openDatabase(() => ledger.url, "test", 1);
  expect(await foldPoints(database)).toBe(false);
  expect((await pointsOf(ledger)).map(({ step, at, events }) => [step, at, events])).toEqual([
    ["hour", "2026-03-04 05:00:00", "4"],
    ["hour", "2026-03-04 05:00:00", "1"],
    ["hour", "2026-03-06 05:00:00", "1"],
  ]);
  expect(await verify()).toBe(0);
  await ledger.select("update boundary set day = '2026-06-04'");
  await foldPoints(database);
  await ledger.select("update points set amount = amount + 1 where step = 'day'");
  expect(await verify()).toBe(1);
  expect((await ledger.tool(["--rebuild"])).code).toBe(0);
  expect(await verify()).toBe(0);
  expect(
    (await pointsOf(ledger)).map(({ step, at, amount }) => [step, at, Number(amount)]),
  ).toEqual([
    ["day", "2026-03-04 00:00:00", 3.1],
    ["day", "2026-03-04 00:00:00", -2],
    ["hour", "2026-03-06 05:00:00", 5],
  ]);
  // A minute that arrives late is folded again.
  await ledger.select(
    "insert into points select source, 'minute', '2026-03-04 05:06Z', 'add_revenue', 1, 1 from points limit 1",
  );
  await foldPoints(database);
  expect((await pointsOf(ledger))[0]).toMatchObject({ step: "day", events: "5", amount: "4.1" });
  await database.close();
});

test("a checkpoint that is being posted is folded later, and nobody waits for it", async () => {
  await using ledger = await openLedger();
  writeJournal(ledger, [[AT, line("ann", 1)]]);
  await ledger.tool([ledger.journal]);
  await using sql = connectTest(ledger.url);
  const database = openDatabase(() => ledger.url, "test", 1);
  const steps = async () => (await pointsOf(ledger)).map(({ step }) => step);
  await sql.begin(async (tx) => {
    await tx`select from checkpoints for update`;
    await foldPoints(database);
    expect(await steps()).toEqual(["minute"]);
  });
  await foldPoints(database);
  expect(await steps()).toEqual(["day"].map(() => expect.stringMatching(/hour|day/)));
  await database.close();
});

test("points of removed segments are kept in their snapshot, and recounts still match", async () => {
  await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "1000" });
  {
    await using app = await ledger.start();
    for (let i = 0; i < 60; i++)
      await app.post(event(`u${i % 3}`, 1, i % 2 ? {} : { id: `${i % 20}` }));
    await app.postLines(line("x") + line("y", 2, { id: "0" }));
    await untilPosted(app.url);
  }
  const before = await pointsOf(ledger);
  await using _ = await ledger.start({ JOURNAL_KEEP_DAYS: "0" });
  await until(() => segmentNames(ledger.dataDir).length === 0);
  const verify = async () => (await ledger.tool(["--verify"])).stdout;
  expect(await verify()).toEndWith("match their sources\n");
  expect(await pointsOf(ledger)).toEqual(before);
  await ledger.select("update points set amount = amount + 1");
  expect((await ledger.tool(["--rebuild"])).code).toBe(0);
  expect(await pointsOf(ledger)).toEqual(before);
  // A line of a removed segment that leaves the quarantine counts in its minute, also in the snapshot.
  await ledger.select("delete from ids");
  const { stdout } = await ledger.tool(["--quarantine=retry"]);
  const posted = Number(/lines posted: (\d+);/.exec(stdout)?.[1]);
  expect(posted).toBeGreaterThan(0);
  expect(await verify()).toEndWith("match their sources\n");
  const sum = (points: { events: string }[]) =>
    points.reduce((total, { events }) => total + Number(events), 0);
  expect(sum(await pointsOf(ledger))).toBe(sum(before) + posted);
});
