/** `bun run faults --breaks` tries the breaks; this checks that each still breaks something. */
import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { join } from "node:path";

import { findPlaces, patternOf, root } from "./altered.ts";
import { BREAKS } from "./breaks.ts";

test("every break finds its place in the program exactly once", () => {
  const misplaced = BREAKS.map((one) => ({ what: one.what, places: findPlaces(one) }));
  expect(misplaced.filter(({ places }) => places.length !== 1)).toEqual([]);
});

test("every break names tests that exist", () => {
  const files = new Set(BREAKS.flatMap(({ tests }) => tests));
  expect([...files].filter((file) => !existsSync(join(root, file)))).toEqual([]);
});

test.each([
  ["a line break", "keep(\n  one,\n  two,\n);"],
  ["no white space", "keep(one,two);"],
  ["a comment of a line", "keep(\n  // the first\n  one, // and\n  /* the second */ two\n)\n;"],
])("tokens are found whatever lies between them: %s", (_, code) => {
  expect(`0; ${code} 1;`.replace(patternOf("keep(one, two);"), "")).toBe("0;  1;");
});

test("a token is a whole word, and a string keeps its quotes", () => {
  const pattern = patternOf('sync("a")');
  expect('fdatasync("a")'.match(pattern)).toBeNull();
  expect("sync(a)".match(pattern)).toBeNull();
  expect('sync("a", b)'.match(pattern)).toBeNull();
});

test("a comma at the end of the tokens goes with them where there is one", () => {
  const pattern = patternOf("key: [1],");
  expect("{ key: [1], more }".replace(pattern, "")).toBe("{  more }");
  expect("{ key: [1] }".replace(pattern, "")).toBe("{  }");
});
