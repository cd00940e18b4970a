/**
 * The scanner and the sums, compared with the slow and plain way to do the same. SCAN_RUNS=N tries N
 * random blocks of lines; TEST_SEED repeats the first of them.
 */
import { expect, setDefaultTimeout, test } from "bun:test";

import { formatAmount, parseAmount } from "../../lib/event/amount.ts";
import {
  type Change,
  decodeEvent,
  InvalidEvent,
  openScanner,
  scannedChange,
} from "../../lib/event/event.ts";
import { eachEvent, eachLine } from "../../lib/event/lines.ts";
import { hashOf } from "../../lib/event/scanner.ts";
import { Sums } from "../../lib/event/sums.ts";
import { count } from "../faults/figures.ts";
import { collidingIds, event } from "../support/events.ts";
import { IS_LONG, randomOf } from "../support/random.ts";

const RUNS = Number(process.env["SCAN_RUNS"] ?? (IS_LONG ? 20_000 : 2_000));
const FIRST_SEED = Number(process.env["TEST_SEED"] ?? Math.floor(Math.random() * 2 ** 30));

setDefaultTimeout(60_000 + RUNS);

type Random = () => number;
const pick = <T>(random: Random, from: readonly T[]): T =>
  from[Math.floor(random() * from.length)] as T;

const USERS = [
  ...["u", "user1", "__proto__", "ü😀", "", "a b"],
  ...["\\n", '\\"', "x".repeat(256), "é".repeat(129)],
];
const NAMES = ["add_revenue", "subtract_revenue", "add_revenue", "subtract_revenue", "refund"];
const VALUES = "0 -0 1 98.5 0.000000001 999999999999999 -12.340 00 1. 1e3".split(" ");

/** A line that the scanner may recognize, often with a small fault. */
function randomLine(random: Random): Buffer {
  const space = () => (random() < 0.96 ? "" : pick(random, [" ", " ", "  ", "\t"]));
  const digits = () =>
    Array.from({ length: 1 + random() * 12 }, () => (random() * 10) | 0).join("");
  const sign = random() < 0.3 ? "-" : "";
  const decimals = random() < 0.5 ? `.${digits()}` : "";
  const value = random() < 0.5 ? pick(random, VALUES) : sign + digits() + decimals;
  const user = random() < 0.7 ? `user${Math.floor(random() * 50)}` : pick(random, USERS);
  const fields = [`"userId":${space()}"${user}"`, `"name":${space()}"${pick(random, NAMES)}"`];
  fields.push(`"value":${space()}${value}`);
  const id = pick(random, ["a", "", "é", "i".repeat(129)]);
  if (random() < 0.3) fields.push(`"id":${space()}"${id}"`);
  const end = pick(random, ["", "", "\r", " "]);
  const bytes = Buffer.from(`{${space()}${fields.join(`,${space()}`)}${space()}}${end}`);
  if (random() < 0.3) bytes[Math.floor(random() * bytes.length)] = random() * 256;
  return random() < 0.05 ? bytes.subarray(0, random() * bytes.length) : bytes;
}

/** Uses the full decoder alone: line breaks after the brace leave the JSON as it is, but stop the scanner. */
function decodeSlowly(line: Uint8Array): Change | InvalidEvent {
  if (line[0] !== 0x7b) return decodeEvent(line);
  return decodeEvent(Buffer.concat([Buffer.from("{\n\n"), line.subarray(1)]));
}

/** Where each event of `block` is and what it means, by both ways, and how many the scanner recognized. */
function readBothWays(block: Buffer) {
  const describe = (from: number, to: number, found: Change | InvalidEvent) =>
    `${from} ${to} ${found instanceof InvalidEvent ? found.reason : Object.values(found).join(" ")}`;
  const scanner = openScanner();
  const quick: string[] = [];
  let scanned = 0;
  eachEvent(
    block,
    scanner,
    (index) => {
      scanned++;
      quick.push(describe(index, scanner.end, scannedChange(scanner, block)));
    },
    (line, index) => quick.push(describe(index, index + line.length, decodeSlowly(line))),
  );
  const slow: string[] = [];
  eachLine(block, (line, index) => {
    slow.push(describe(index, index + line.length, decodeSlowly(line)));
  });
  return { quick, slow, scanned };
}

test("the full decoder reads every event that the scanner recognizes in the same way", () => {
  let scannedEvents = 0;
  for (let seed = FIRST_SEED; seed < FIRST_SEED + RUNS; seed++) {
    const random = randomOf(seed);
    const lines = Array.from({ length: 1 + random() * 4 }, () => randomLine(random));
    const ends = lines.map((_, i) =>
      Buffer.from(i < lines.length - 1 || random() < 0.5 ? "\n" : ""),
    );
    const block = Buffer.concat(lines.flatMap((line, i) => [line, ends[i] as Buffer]));
    const { quick, slow, scanned } = readBothWays(block);
    expect(quick, `TEST_SEED=${seed}: ${JSON.stringify(block.toString())}`).toEqual(slow);
    scannedEvents += scanned;
  }
  count("blocks of lines read both ways", RUNS);
  expect(scannedEvents).toBeGreaterThan(RUNS / 4);
});

const withByte = (text: string, byte: number) => {
  const bytes = Buffer.from(text);
  bytes[bytes.indexOf("?")] = byte;
  return bytes;
};

test.each([
  ["an event", event("user1", 98.5), 1],
  [
    "an event with an id, spaces and CRLF",
    '{ "userId": "é", "name": "add_revenue", "value": -1, "id": "ü" }\r\n',
    1,
  ],
  ["a user id that is not UTF-8", withByte(event("us?r"), 0xff), 0],
  ["a user id with half a character", withByte(event("u?"), 0xc3), 0],
  ["an id that is not UTF-8", withByte(event("u", 1, { id: "i?" }), 0x80), 0],
  ["15 significant digits", event("u", "123456.123456789"), 1],
  ["16 significant digits", event("u", "1234567.123456789"), 0],
  ["16 significant digits, the last one 0", event("u", "12345678.12345670"), 0],
  ["15 digits before the point and one behind it", event("u", "123456789012345.0"), 0],
  ["15 significant digits behind a zero", event("u", "0.123456789"), 1],
  ["10 decimals", event("u", "0.1234567890"), 0],
  ["a leading zero", event("u", "01"), 0],
  ["no digits behind the point", event("u", "1."), 0],
  ["an unknown name", event("u", 1, { name: "refund" }), 0],
  ["an empty user id", event(""), 0],
  ["a user id of 257 bytes", event("x".repeat(257)), 0],
  ["an id of 129 bytes", event("u", 1, { id: "x".repeat(129) }), 0],
  ["another field", event("u", 1, { more: 1 }), 0],
  ["bytes behind the brace", `${event("u")}x`, 0],
])("the scanner and the full decoder agree on %s", (_, line, scannedEvents) => {
  const { quick, slow, scanned } = readBothWays(Buffer.from(line as string));
  expect(quick).toEqual(slow);
  expect(scanned).toBe(scannedEvents);
});

test("the sums of users are exact, whatever their amounts and names are", () => {
  const names = ["a", "ü", 'q"uote', "back\\slash", "new\nline", "{,}", "null", "x".repeat(256)];
  for (let seed = FIRST_SEED; seed < FIRST_SEED + RUNS / 200; seed++) {
    const random = randomOf(seed);
    const sums = new Sums();
    const expected = new Map<string, bigint>();
    const users = Math.ceil(random() ** 3 * 9_000);
    const scale = Math.floor(random() * 16);
    for (let i = 0; i < users * 3; i++) {
      const number = Math.floor(random() * users);
      const user = names[number] ?? `user${number}`;
      const nines = "9".repeat(Math.ceil(random() * scale));
      const sign = random() < 0.5 ? "-" : "";
      const amount = parseAmount(`${sign}${nines}0.${Math.floor(random() * 1000)}`);
      if (typeof amount === "string") continue;
      expected.set(user, (expected.get(user) ?? 0n) + amount);
      sums.addTo(user, amount);
    }
    const found = [...sums.textArray().matchAll(/"((?:[^"\\]|\\.)*)"/gs)].map(([, name = ""]) =>
      name.replace(/\\(.)/gs, "$1"),
    );
    const amounts = sums.amountArray().slice(1, -1).split(",").map(withoutZeros);
    expect(found, `TEST_SEED=${seed}`).toEqual([...expected.keys()]);
    expect(sums.size).toBe(expected.size);
    expect(amounts.join(), `TEST_SEED=${seed}`).toBe(
      [...expected.values()].map(formatAmount).join(),
    );
  }
});

test.each([
  [["-3", "0.25"], "-2.750000000"],
  [["3", "-0.25"], "2.750000000"],
  [["-0.25"], "-0.250000000"],
  [["0.75", "0.75"], "1.500000000"],
  [["-0.75", "-0.25"], "-1"],
  [["-1", "0.5", "0.5"], "0"],
])("%j add up to %s", (values, sum) => {
  const sums = new Sums();
  for (const value of values) sums.addTo("a", parseAmount(value) as bigint);
  expect(sums.amountArray()).toBe(`{${sum}}`);
});

test("two users whose ids have the same hash are two users", () => {
  const users = ["costarring", "liquid", "declinate", "macallums"].map((user) => Buffer.from(user));
  const [a, b, c, d] = users.map((user) => hashOf(user, 0, user.length));
  expect([a, c]).toEqual([b, d]);
  const sums = new Sums();
  for (const user of [...users, ...users]) sums.addTo(user.toString(), parseAmount("1") as bigint);
  expect(sums.amountArray()).toBe("{2,2,2,2}");
});

test("users whose ids collide are found with as few comparisons as others", () => {
  const ids = collidingIds(1_024);
  expect(new Set(ids.map((id) => hashOf(id, 0, id.length))).size).toBe(1);
  const sums = new Sums();
  let compared = 0;
  const counted = sums as unknown as { isText(...parts: unknown[]): boolean };
  const { isText } = counted;
  counted.isText = function (...parts) {
    compared++;
    return isText.apply(this, parts);
  };
  for (const id of [...ids, ...ids]) sums.addTo(id.toString(), 1_000_000_000n);
  expect(sums.size).toBe(ids.length);
  expect(sums.amountArray()).toBe(`{${ids.map(() => 2).join()}}`);
  expect(compared).toBeLessThanOrEqual(8 * 2 * ids.length);
});

test("a sum beyond 2^53 stays exact", () => {
  const sums = new Sums();
  for (let i = 0; i < 30; i++) sums.addTo("a", parseAmount("999999999999999") as bigint);
  sums.addTo("a", parseAmount("-0.000000001") as bigint);
  expect(sums.amountArray()).toBe("{29999999999999969.999999999}");
});

function withoutZeros(decimal: string): string {
  return decimal.includes(".") ? decimal.replace(/\.?0+$/, "") : decimal;
}
