/** The lag of posting, with a journal, a ledger and a clock of the test's own. */
import { afterEach, expect, setSystemTime, test } from "bun:test";

import type { Commit, Journal } from "../../lib/journal/writer.ts";
import { journalKey } from "../../lib/ledger/checkpoints.ts";
import { type Database, Unavailable } from "../../lib/ledger/database.ts";
import { watchPosted } from "../../lib/server/posted.ts";

const ID = "0b5e0000-0000-8000-8000-000000000000";
const START_MS = Date.UTC(2026, 0, 1);

afterEach(() => void setSystemTime());

/** A journal of which `write` commits bytes now, and a ledger that has posted `posted` of them. */
function openWorld() {
  const world = { end: 0, posted: 0, isDown: false };
  let listener: (commit: Commit) => void = () => {};
  const journal = {
    id: ID,
    path: "/nonexistent/eventsPost.jsonl",
    end: () => world.end,
    onCommit: (hear: typeof listener) => (listener = hear),
  } as unknown as Journal;
  const database = {
    use: async () => {
      if (world.isDown) throw new Unavailable("down", true);
      return [{ key: journalKey(ID), position: world.posted }];
    },
  } as unknown as Database;
  const write = (bytes: number) => {
    const from = world.end;
    world.end += bytes;
    listener({ from, atMs: Date.now(), bytes, appends: 1, syncMs: 0 });
  };
  setSystemTime(START_MS);
  const watch = watchPosted(journal, database);
  watch.compared.catch(() => {}); // there is no such journal on the disk
  return Object.assign(world, { watch, write });
}

test("the lag of the first event after a pause counts from that event", async () => {
  const world = openWorld();
  world.write(100);
  world.posted = 100;
  expect(await world.watch.refresh()).toEqual({ bytes: 0, seconds: 0 });
  setSystemTime(START_MS + 60_000);
  world.write(50);
  expect(world.watch.lag()).toEqual({ bytes: 50, seconds: 0.001 }); // never 0
  setSystemTime(START_MS + 63_000);
  expect(world.watch.lag()).toEqual({ bytes: 50, seconds: 3 });
  world.watch.close();
});

test("the lag keeps growing while the database is down", async () => {
  const world = openWorld();
  await world.watch.asked;
  world.isDown = true;
  world.write(10);
  setSystemTime(START_MS + 5_000);
  world.write(10);
  await expect(world.watch.refresh()).rejects.toThrow("down");
  expect(world.watch.isAnswering()).toBe(false);
  expect(world.watch.lag()).toEqual({ bytes: 20, seconds: 5 });
  world.watch.close();
});

test("a wait ends when the position is posted, when its time is over, and when the database is down", async () => {
  const world = openWorld();
  await world.watch.asked;
  const posted = world.watch.wait(ID, 100, 10_000);
  world.posted = 100;
  expect(await posted).toBe(true);
  expect(await world.watch.wait(ID, 101, 0)).toBe(false);
  world.isDown = true;
  await expect(world.watch.wait(ID, 101, 10_000)).rejects.toThrow("down");
  world.watch.close();
});
