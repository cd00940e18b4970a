/** How a soak decides that a measure grew, and that a balance is wrong. */
import { expect, test } from "bun:test";

import { openOracle } from "./soak-load.ts";
import { judge, type Sample } from "./soak-watch.ts";

/** A sample a second, for 400 seconds. */
const samples = (valueAt: (atS: number) => number) =>
  Array.from({ length: 400 }, (_, atS): Sample => [atS, valueAt(atS)]);

test("a measure grew if its median is 5 % higher in the last quarter than in the second", () => {
  const state = (valueAt: (atS: number) => number) =>
    judge("memory", "MiB", samples(valueAt), 400).state;
  expect(state((atS) => 100 + atS / 20)).toBe("grew"); // by 10
  expect(state((atS) => 100 + atS / 50)).toBe("steady"); // by 4
  expect(state((atS) => (atS < 100 ? atS : 100))).toBe("steady"); // before the second quarter
  expect(state((atS) => (atS % 10 === 0 ? 100 + atS : 100))).toBe("steady"); // now and then
  expect(judge("memory", "MiB", samples(() => 1).slice(0, 150), 400).state).toBe("too few samples");
});

test("of few descriptors, one more is no growth", () => {
  const verdict = (more: number) =>
    judge(
      "descriptors",
      "count",
      samples((atS) => (atS < 200 ? 10 : 10 + more)),
      400,
    ).state;
  expect([verdict(2), verdict(3)]).toEqual(["steady", "grew"]);
});

test("an event without an answer may have counted once or not, and any other difference is named", () => {
  const oracle = openOracle();
  oracle.add("ann", 100);
  oracle.add("ann", -30);
  oracle.add("ben", 5);
  oracle.doubt("ben", 7);
  oracle.doubt("cat", 9);
  const differing = (balances: [string, number][]) => oracle.differences(new Map(balances));
  expect(
    differing([
      ["ann", 70],
      ["ben", 5],
    ]),
  ).toEqual([]);
  expect(
    differing([
      ["ann", 70],
      ["ben", 12],
      ["cat", 9],
    ]),
  ).toEqual([]);
  expect(
    differing([
      ["ann", 71],
      ["ben", 19],
      ["cat", 18],
      ["dan", 1],
    ]),
  ).toEqual([
    "ann has 71, expected 70",
    "ben has 19, expected 5 or 12",
    "cat has 18, expected 0 or 9",
    "dan has 1, expected 0",
  ]);
});
