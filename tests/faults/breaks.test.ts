/** The breaks are tried one by one by `bun run faults --breaks`; here, that they still are breaks. */
import { expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";

import { root } from "./altered.ts";
import { BREAKS } from "./breaks.ts";

test("every break finds its place in the code, once, and the tests that must notice it", () => {
  const places = BREAKS.map(({ what, file, find }) => ({
    what,
    places: readFileSync(join(root, file), "utf8").split(find).length - 1,
  }));
  expect(places.filter(({ places }) => places !== 1)).toEqual([]);
  const tests = new Set(BREAKS.flatMap(({ tests }) => tests));
  expect([...tests].filter((name) => !existsSync(join(root, name)))).toEqual([]);
});
