/** When the events of a journal are posted: at once when idle, together when many arrive. */
import { expect, setDefaultTimeout, test } from "bun:test";

import type { Frame, JournalReader } from "../../lib/journal/reader.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { openJournalBatches } from "../../lib/processor/batches.ts";
import { BatchLimit } from "../../lib/processor/fold.ts";
import { line } from "../support/events.ts";
import { testDatabase } from "../support/postgres.ts";

setDefaultTimeout(30_000);

const FRAME_BYTES = 100;

function frameAt(from: number): Frame {
  const to = from + FRAME_BYTES;
  return { from, to, header: "", payload: Buffer.from(line("ann", 1)), atMs: 0 };
}

/** The first batch of a journal; `read` says what is found by each of its reads. */
async function firstBatch(read: (count: number) => boolean, posting: Promise<unknown>) {
  await using database = await testDatabase();
  const opened = openDatabase(() => database.url, "test", 1);
  let end = 0;
  let reads = 0;
  const journal: JournalReader = {
    id: crypto.randomUUID(),
    start: 0,
    async read(position) {
      if (!read(++reads)) return [];
      end = position + FRAME_BYTES;
      return [frameAt(position)];
    },
    end: async () => end,
    async sync() {},
    remedy: () => "",
  };
  const batches = await openJournalBatches(
    { database: opened, path: "journal", limit: new BatchLimit(), ahead: new Map() },
    journal,
  );
  const batch = await batches.next(posting);
  await opened.close();
  return { events: batch?.events, reads };
}

test("an event that arrives while nothing is posted is posted at once", async () => {
  const { events, reads } = await firstBatch((count) => count === 1, Promise.resolve());
  expect({ events, reads }).toEqual({ events: 1, reads: 2 });
});

test("events that arrive during a posting wait until it has ended, and for what comes soon after", async () => {
  const { promise: posting, resolve } = Promise.withResolvers<void>();
  let settled = 0;
  const { events, reads } = await firstBatch((count) => {
    if (count === 3) resolve();
    if (count > 3) settled++;
    return count === 1 || count === 3 || settled === 2 || settled > 1_000;
  }, posting);
  expect(events).toBe(3);
  expect(reads).toBeLessThan(12); // it does not wait for ever
});

test("a batch ends although each read finds a few events more", async () => {
  const { promise: posting, resolve } = Promise.withResolvers<void>();
  const { events, reads } = await firstBatch((count) => {
    if (count === 3) resolve();
    return count < 1_000;
  }, posting);
  expect(events).toBe(reads);
  expect(reads).toBeLessThan(12);
});
