/**
 * The journal on a simulated disk. The oracle is the list of what was acknowledged: after any number
 * of crashes it is all there, once and in whole, and whatever else is there was at least sent.
 *
 * A seed that fails is printed; FAULT_SEED=N runs that one, FAULT_SEEDS=N so many from
 * FAULT_SEED_FIRST on.
 */
import { expect, test } from "bun:test";

import { JournalDamage } from "../../lib/journal-frame.ts";
import { JournalFailed, JournalFull, openJournal } from "../../lib/journal.ts";
import { openJournalReader } from "../../lib/journal-reader.ts";
import { count as figure } from "./figures.ts";
import { randomOf, SimulatedDisk } from "./simulated-disk.ts";

const { FAULT_SEED, FAULT_SEED_FIRST, FAULT_SEEDS = "1000" } = process.env;
const PATH = "data/eventsPost.jsonl";

test("what was acknowledged survives every crash of the simulated disk, once and whole", async () => {
  const first = Number(FAULT_SEED ?? FAULT_SEED_FIRST ?? Math.floor(Math.random() * 2 ** 30));
  const count = FAULT_SEED ? 1 : Number(FAULT_SEEDS);
  let acknowledged = 0;
  for (let seed = first; seed < first + count; seed++) {
    acknowledged += await live(seed).catch((error) => {
      throw new Error(`FAULT_SEED=${seed}: ${(error as Error).message}`, { cause: error });
    });
  }
  figure("disk seeds", count);
  if (count > 1) expect(acknowledged).toBeGreaterThan(count);
}, 120_000);

/** Some lives of one journal, each ended by a crash; returns how many lines were acknowledged. */
async function live(seed: number): Promise<number> {
  const random = randomOf(seed);
  const odds = { noRoom: random() * 0.1, failedSync: random() * 0.05 };
  const disk = new SimulatedDisk(random, odds);
  // Small enough that a life rotates some times, or not at all.
  const segmentBytes = 100 + Math.floor(random() ** 2 * 100_000);
  const acknowledged = new Set<string>();
  const sent = new Set<string>();
  for (let life = 0; life < 4; life++) {
    await oneLife(disk, random, `${seed}.${life}`, acknowledged, sent, segmentBytes);
    disk.crash();
  }
  Object.assign(odds, { noRoom: 0, failedSync: 0 });
  const journal = await openJournal("data", () => {}, disk.mount(), segmentBytes);
  await journal.append(Buffer.from("last\n"));
  sent.add("last");
  acknowledged.add("last");
  check(await readAll(disk), acknowledged, sent);
  return acknowledged.size;
}

async function oneLife(
  disk: SimulatedDisk,
  random: () => number,
  name: string,
  acknowledged: Set<string>,
  sent: Set<string>,
  segmentBytes: number,
): Promise<void> {
  const mounted = disk.mount();
  // Opening may fail, or be cut by the crash: then this life was a short one.
  const journal = await within(
    openJournal("data", () => {}, mounted, segmentBytes),
    400,
    (error) => {
      if (error instanceof JournalDamage) throw error;
    },
  );
  if (!journal) return;
  check(await readAll(disk, mounted), acknowledged, sent);
  const appends = Math.floor(random() * 12);
  for (let i = 0; i < appends; i++) {
    const text = `${name}.${i}${"x".repeat(Math.floor(random() ** 4 * 20_000))}`;
    sent.add(text);
    journal.append(Buffer.from(`${text}\n`)).then(
      () => acknowledged.add(text),
      (error) => {
        if (!(error instanceof JournalFull || error instanceof JournalFailed)) throw error;
      },
    );
    if (random() < 0.5) for (let turns = random() * 20; turns > 0; turns--) await Promise.resolve();
  }
}

async function readAll(disk: SimulatedDisk, mounted = disk.mount()): Promise<string[]> {
  const reader = await openJournalReader(PATH, mounted);
  const lines: string[] = [];
  for (let position = reader?.start ?? 0; reader;) {
    const frames = await reader.read(position);
    if (frames.length === 0) break;
    for (const { payload, to } of frames) {
      lines.push(...payload.toString().split("\n").slice(0, -1));
      position = to;
    }
  }
  return lines;
}

function check(lines: string[], acknowledged: Set<string>, sent: Set<string>): void {
  const found = new Set(lines);
  if (found.size !== lines.length) throw new Error("a line is there twice");
  for (const line of acknowledged)
    if (!found.has(line)) throw new Error(`lost: ${line.slice(0, 20)}`);
  for (const line of lines)
    if (!sent.has(line)) throw new Error(`never sent: ${line.slice(0, 20)}`);
}

/** What `promise` gives within so many turns, or `null`. */
async function within<T>(
  promise: Promise<T>,
  turns: number,
  failed: (error: unknown) => void,
): Promise<T | null> {
  let result: T | null = null;
  let error: unknown;
  promise.then(
    (value) => {
      result = value;
    },
    (reason) => {
      error = reason;
    },
  );
  for (let turn = 0; turn < turns && result === null && !error; turn++) await Promise.resolve();
  if (error) failed(error);
  return result;
}
