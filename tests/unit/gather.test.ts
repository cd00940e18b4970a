/** What a body and an answer hold in memory. */
import { expect, test } from "bun:test";

import { Gather } from "../../lib/server/gather.ts";
import { holdAnswer } from "../../lib/server/held-answer.ts";
import { openMemoryBudget } from "../../lib/server/memory.ts";

const MIB = 1024 * 1024;

test.each([1, 3, 100, 16 * 1024 - 1, 16 * 1024, 100_000])(
  "chunks of %d bytes are put together in few parts, and reserve about what has arrived",
  (size) => {
    let reserved = 0;
    const gather = new Gather((bytes) => (reserved += bytes));
    const whole = Uint8Array.from({ length: MIB + 12_345 }, (_, i) => i * 7);
    for (let at = 0; at < whole.length; at += size) {
      gather.add(whole.subarray(at, at + size));
      expect(reserved).toBeGreaterThanOrEqual(gather.bytes);
      expect(reserved).toBeLessThanOrEqual(2 * gather.bytes + 4096);
    }
    expect(gather.parts.length).toBeLessThanOrEqual(100);
    expect(Buffer.compare(gather.whole(), whole)).toBe(0);
  },
);

test("a large answer holds its memory until it is read or its reader is gone", async () => {
  const budget = openMemoryBudget(3 * MIB);
  const document = { text: "x".repeat(MIB) };
  const open = () => {
    using held = holdAnswer(budget);
    held.reserve(MIB);
    return held.answer(document, 201) as unknown as Response;
  };
  const first = open();
  const second = open();
  expect(open).toThrow("overloaded");
  expect(first.status).toBe(201);
  expect(await first.json()).toEqual(document);
  open();
  expect(open).toThrow("overloaded");
  await second.body?.cancel();
  open();
  expect(open).toThrow("overloaded");
});
