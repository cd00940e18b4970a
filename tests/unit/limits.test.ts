/** Limits of different modules that depend on each other. */
import { expect, test } from "bun:test";

import { MAX_EVENT_BYTES, MAX_SOURCE_BYTES } from "../../lib/event/event.ts";
import {
  encodeFrame,
  encodeJournalHeader,
  isLost,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  newJournalId,
  parseFrames,
} from "../../lib/journal/format.ts";
import { fillers, MAX_FILLER_BYTES, MIN_FILLER_BYTES } from "../../lib/journal/repair.ts";
import { encodeSourceMark } from "../../lib/journal/source-mark.ts";
import { MAX_GROUP_BYTES } from "../../lib/journal/writer.ts";
import { MAX_BATCH_BYTES } from "../../lib/processor/fold.ts";
import { MAX_EVENTS_BYTES } from "../../lib/server/body.ts";
import { openMemoryBudget } from "../../lib/server/memory.ts";

test("a frame holds the largest body and the largest mark of its source", () => {
  // One blank byte before the shortest possible events: the mark has to say where each of them ends.
  const lineBytes = '{"userId":"a","name":"x","value":1}\n'.length;
  const events = Math.floor((MAX_EVENTS_BYTES - 1) / lineBytes);
  const mark = encodeSourceMark({
    name: "\u0001".repeat(MAX_SOURCE_BYTES), // six bytes each in JSON
    from: Number.MAX_SAFE_INTEGER - MAX_EVENTS_BYTES,
    to: Number.MAX_SAFE_INTEGER,
    digest: "f".repeat(64),
    events,
    ends: Array.from({ length: events }, (_, i) => (i + 1) * lineBytes),
  });
  expect(events * lineBytes + mark.length).toBeLessThanOrEqual(MAX_FRAME_BYTES);
});

test("a body holds the largest event, a frame a group of appends, a batch a frame", () => {
  expect(MAX_EVENT_BYTES).toBeLessThan(MAX_EVENTS_BYTES);
  expect(MAX_GROUP_BYTES).toBeLessThanOrEqual(MAX_FRAME_BYTES);
  expect(MAX_FRAME_BYTES).toBeLessThanOrEqual(MAX_BATCH_BYTES);
});

test("the memory budget holds the largest body three times: as received, decompressed and framed", () => {
  using reservation = openMemoryBudget().admit();
  for (let copy = 0; copy < 3; copy++) reservation.reserveLarge(MAX_EVENTS_BYTES);
});

test("the longest header lines are as long as a header may be, or shorter", () => {
  const longest = 10 ** 15 - 1;
  const frame = encodeFrame([Buffer.alloc(1)], MAX_FRAME_BYTES, longest).indexOf("\n") + 1;
  expect(frame).toBeLessThanOrEqual(MAX_HEADER_BYTES);
  expect(encodeJournalHeader(newJournalId(), longest).length).toBeLessThanOrEqual(MAX_HEADER_BYTES);
});

test("frames of any length from the shortest on replace lost bytes, and every reader accepts them", () => {
  const around = (bytes: number) => Array.from({ length: 9 }, (_, i) => bytes - 4 + i);
  const lengths = [
    ...Array.from({ length: 1_200 }, (_, i) => MIN_FILLER_BYTES + i),
    ...around(10_000),
    ...around(100_000),
    ...around(1_000_000),
    ...around(MAX_FILLER_BYTES),
    ...around(MAX_FILLER_BYTES + 2 * MAX_HEADER_BYTES),
    2 * MAX_FILLER_BYTES + 2 * MAX_HEADER_BYTES + 1,
  ];
  for (const bytes of lengths) {
    const filler = Buffer.concat([...fillers(bytes, "/data/eventsPost.jsonl.lost-580")]);
    expect(filler.length).toBe(bytes);
    const { frames, rest } = parseFrames(filler);
    expect(rest, `${bytes} bytes`).toBe("nothing");
    // In less than that, not even the shorter of the two lines has room.
    if (bytes > MIN_FILLER_BYTES + 50)
      for (const { payload } of frames)
        expect(isLost(payload.subarray(0, payload.indexOf("\n")))).toBe(true);
  }
});
