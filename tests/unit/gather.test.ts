/** What a body and an answer hold in memory. */
import { expect, test } from "bun:test";

import { Gather } from "../../lib/server/gather.ts";
import { fitting, MAX_ANSWER_BYTES, openAnswers } from "../../lib/server/held-answer.ts";
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
  const answers = openAnswers({ budget: openMemoryBudget(3 * MIB) });
  const document = { text: "x".repeat(MIB) };
  const open = () => {
    using held = answers.hold();
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

test("a page that is read holds its memory, too; a small one and HEAD hold none", async () => {
  const answers = openAnswers({ budget: openMemoryBudget(MIB) });
  const large = { text: "x".repeat(MIB / 2) };
  const read = (method: string, document: object) =>
    answers.read(requestOf(method), async () => document);
  const response = (await read("GET", large)) as unknown as Response;
  await expect(read("GET", large)).rejects.toThrow("overloaded");
  const small = { text: "" };
  expect(await read("GET", small)).toBe(small);
  expect(await read("HEAD", large)).toBe(large);
  expect(await response.json()).toEqual(large);
  await read("GET", large);
});

test("few pages are read at a time, whatever becomes of them; one that waits too long is rejected", async () => {
  const MAX_READS = 4;
  const answers = openAnswers({ maxWaitMs: 1 });
  const database = Promise.withResolvers<void>();
  let running = 0;
  let most = 0;
  let started = 0;
  const read = () =>
    answers.read(requestOf("GET"), async () => {
      most = Math.max(most, ++running);
      started++;
      await database.promise;
      running--;
      if (started % 2 === 0) throw new Error("the database is gone");
      return {};
    });
  const first = Array.from({ length: MAX_READS }, read);
  const waiting = Array.from({ length: 500 }, read);
  await Bun.sleep(2);
  database.resolve();
  await Promise.allSettled(first);
  for (const { status, reason } of (await Promise.allSettled(waiting)) as PromiseRejectedResult[])
    expect([status, String(reason)]).toEqual([
      "rejected",
      expect.stringContaining("too many large"),
    ]);
  expect([started, most]).toEqual([MAX_READS, MAX_READS]);
  await Promise.allSettled([read(), read()]);
  expect([started, most]).toEqual([MAX_READS + 2, MAX_READS]);
});

test("a page has as many rows as an answer holds, in bytes of its JSON", async () => {
  const rows = Array.from({ length: 1_000 }, () => "\u0001".repeat(4_096));
  const fit = await fitting(rows);
  const bytes = JSON.stringify(fit).length;
  expect(bytes).toBeLessThanOrEqual(MAX_ANSWER_BYTES + 2);
  expect(bytes).toBeGreaterThan(MAX_ANSWER_BYTES - 30_000);
  expect(await fitting(["a", "b"])).toEqual(["a", "b"]);
});

function requestOf(method: string): Request {
  return new Request("http://a", { method });
}
