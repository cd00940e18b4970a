/**
 * The scanner and the sums, beside the slow and plain way to do the same. SCAN_RUNS=N tries more:
 * each run is a block of some lines.
 */
import { expect, setDefaultTimeout, test } from "bun:test";

import { formatAmount, parseAmount } from "../../lib/event/amount.ts";
import {
  type Change,
  decodeEvent,
  openScanner,
  InvalidEvent,
  scannedChange,
} from "../../lib/event/event.ts";
import { eachEvent, eachLine } from "../../lib/event/lines.ts";
import { hashOf } from "../../lib/event/scanner.ts";
import { Sums } from "../../lib/event/sums.ts";
import { count } from "../faults/figures.ts";
import { randomOf } from "../faults/simulated-disk.ts";

const RUNS = Number(process.env["SCAN_RUNS"] ?? 20_000);
const FIRST = Number(process.env["TEST_SEED"] ?? Math.floor(Math.random() * 2 ** 30));

setDefaultTimeout(60_000 + RUNS);

type Random = () => number;
const one = <T>(random: Random, of: readonly T[]): T => of[Math.floor(random() * of.length)] as T;

const USERS = [
  "u",
  "user1",
  "__proto__",
  "ü😀",
  "",
  "a b",
  "\\n",
  '\\"',
  "x".repeat(256),
  "é".repeat(129),
];
const VALUES = [
  "0",
  "-0",
  "1",
  "98.5",
  "0.000000001",
  "999999999999999",
  "-12.340",
  "00",
  "1.",
  "1e3",
];
const DIGITS = "0123456789";

function lineOf(random: Random): Buffer {
  const space = () => (random() < 0.96 ? "" : one(random, [" ", " ", "  ", "\t"]));
  const digits = () =>
    Array.from({ length: 1 + random() * 12 }, () => one(random, [...DIGITS])).join("");
  const value =
    random() < 0.5
      ? one(random, VALUES)
      : `${random() < 0.3 ? "-" : ""}${digits()}${random() < 0.5 ? `.${digits()}` : ""}`;
  const user = random() < 0.7 ? `user${Math.floor(random() * 50)}` : one(random, USERS);
  const name = one(random, [
    "add_revenue",
    "subtract_revenue",
    "add_revenue",
    "subtract_revenue",
    "refund",
  ]);
  const id =
    random() < 0.3
      ? `,${space()}"id":${space()}"${one(random, ["a", "", "é", "i".repeat(129)])}"`
      : "";
  const text = `{${space()}"userId":${space()}"${user}",${space()}"name":${space()}"${name}",${space()}"value":${space()}${value}${id}${space()}}${one(random, ["", "", "\r", " "])}`;
  const bytes = Buffer.from(text);
  if (random() < 0.3) bytes[Math.floor(random() * bytes.length)] = random() * 256;
  return random() < 0.05 ? bytes.subarray(0, random() * bytes.length) : bytes;
}

/** The full decoder alone: line breaks behind the brace are still the same JSON, but not for the scanner. */
function decodeSlowly(line: Uint8Array): Change | InvalidEvent {
  const text = Buffer.from(line);
  if (text[0] !== 0x7b) return decodeEvent(line);
  return decodeEvent(Buffer.concat([Buffer.from("{\n\n"), text.subarray(1)]));
}

test("what the scanner takes the full decoder takes, in the same place and with the same meaning", () => {
  let scannedEvents = 0;
  for (let seed = FIRST; seed < FIRST + RUNS; seed++) {
    const random = randomOf(seed);
    const lines = Array.from({ length: 1 + random() * 4 }, () => lineOf(random));
    const end = one(random, ["", "\n"]);
    const block = Buffer.concat([
      ...lines.flatMap((line, i) => (i ? [Buffer.from("\n"), line] : [line])),
      Buffer.from(end),
    ]);
    const scanner = openScanner();
    const found: string[] = [];
    const tell = (at: number, to: number, what: Change | InvalidEvent) =>
      found.push(
        `${at} ${to} ${what instanceof InvalidEvent ? what.reason : Object.values(what).join(" ")}`,
      );
    eachEvent(
      block,
      scanner,
      (at) => {
        scannedEvents++;
        tell(at, scanner.end, scannedChange(scanner, block));
      },
      (line, at) => tell(at, at + line.length, decodeSlowly(line)),
    );
    const wanted: string[] = [];
    eachLine(block, (line, at) => {
      const what = decodeSlowly(line);
      wanted.push(
        `${at} ${at + line.length} ${what instanceof InvalidEvent ? what.reason : Object.values(what).join(" ")}`,
      );
    });
    expect(found, `TEST_SEED=${seed}: ${JSON.stringify(block.toString())}`).toEqual(wanted);
  }
  count("blocks of lines read both ways", RUNS);
  expect(scannedEvents).toBeGreaterThan(RUNS / 4); // it is not for nothing
});

test("the sums of users are exact, whatever their amounts and names", () => {
  for (let seed = FIRST; seed < FIRST + RUNS / 200; seed++) {
    const random = randomOf(seed);
    const sums = new Sums();
    const wanted = new Map<string, bigint>();
    const names = ["a", "ü", 'q"uote', "back\\slash", "new\nline", "{,}", "null", "x".repeat(256)];
    const users = Math.ceil(random() ** 3 * 9_000);
    const scale = Math.floor(random() * 16);
    for (let i = 0; i < users * 3; i++) {
      const number = Math.floor(random() * users);
      const user = number < names.length ? (names[number] as string) : `user${number}`;
      const written = `${random() < 0.5 ? "-" : ""}${"9".repeat(Math.ceil(random() * scale))}0.${Math.floor(random() * 1000)}`;
      const amount = parseAmount(written);
      if (typeof amount === "string") continue;
      wanted.set(user, (wanted.get(user) ?? 0n) + amount);
      sums.addTo(user, amount);
    }
    const found = [...sums.userArray().matchAll(/"((?:[^"\\]|\\.)*)"/gs)].map(([, name = ""]) =>
      name.replace(/\\(.)/gs, "$1"),
    );
    const amounts = sums.amountArray().slice(1, -1).split(",");
    expect(found, `TEST_SEED=${seed}`).toEqual([...wanted.keys()]);
    expect(sums.size).toBe(wanted.size);
    for (const [i, amount] of [...wanted.values()].entries())
      expect(exact(amounts[i] ?? ""), `TEST_SEED=${seed}`).toBe(formatAmount(amount));
  }
});

test("two users with the same hash are two users", () => {
  const users = ["costarring", "liquid", "declinate", "macallums"].map((user) => Buffer.from(user));
  const [a, b, c, d] = users.map((user) => hashOf(user, 0, user.length));
  expect([a, c]).toEqual([b, d]);
  const sums = new Sums();
  for (const user of [...users, ...users]) sums.addTo(user.toString(), parseAmount("1") as bigint);
  expect(sums.amountArray()).toBe("{2,2,2,2}");
});

test("ten values of the largest size stay exact", () => {
  const sums = new Sums();
  for (let i = 0; i < 30; i++) sums.addTo("a", parseAmount("999999999999999") as bigint);
  sums.addTo("a", parseAmount("-0.000000001") as bigint);
  expect(sums.amountArray()).toBe("{29999999999999969.999999999}");
});

/** Without zeros behind the last decimal. */
function exact(written: string): string {
  return written.includes(".") ? written.replace(/\.?0+$/, "") : written;
}
