/**
 * The journal on a simulated disk. The oracle is the list of acknowledged lines: after any number of
 * crashes the journal contains each of them once, whole, and no line that was never sent.
 *
 * A failing seed is printed. FAULT_SEED=N runs that one; FAULT_SEEDS=N runs N seeds from
 * FAULT_SEED_FIRST.
 */
import { expect, test } from "bun:test";

import { type CheckedFile, checkJournal, type Damage } from "../../lib/journal/check.ts";
import { JournalDamage } from "../../lib/journal/format.ts";
import { JournalBusy, JournalFailed, JournalFull, openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { repairFile } from "../../lib/journal/repair.ts";
import { readLines } from "../support/journal.ts";
import { randomOf } from "../support/random.ts";
import { count as figure } from "./figures.ts";
import { HARMLESS, SimulatedDisk } from "./simulated-disk.ts";

const { FAULT_SEED, FAULT_SEED_FIRST, FAULT_SEEDS = "1000" } = process.env;
const PATH = "data/eventsPost.jsonl";
const LIMIT_MS = 120_000 + 30 * Number(FAULT_SEEDS);

/** What an append may be rejected with. */
const PASSING_OR_FINAL = [JournalFull, JournalBusy, JournalFailed];

test(
  "acknowledged lines survive every crash of the simulated disk, once and whole",
  async () => {
    const first = Number(FAULT_SEED ?? FAULT_SEED_FIRST ?? Math.floor(Math.random() * 2 ** 30));
    const count = FAULT_SEED ? 1 : Number(FAULT_SEEDS);
    let acknowledged = 0;
    for (let seed = first; seed < first + count; seed++) {
      acknowledged += await live(seed).catch((error) => {
        throw new Error(`FAULT_SEED=${seed}: ${(error as Error).message}`, { cause: error });
      });
    }
    figure("disk seeds", count);
    // There are about nine for each seed. With fewer, the lives would end before anything happens.
    if (count > 1) expect(acknowledged).toBeGreaterThan(5 * count);
  },
  LIMIT_MS,
);

/** Runs several lives of one journal, each ended by a crash. Returns how many lines were acknowledged. */
async function live(seed: number): Promise<number> {
  const random = randomOf(seed);
  const odds = {
    noRoom: random() * 0.1,
    failedSync: random() * 0.05,
    failedChange: random() * 0.02,
  };
  const disk = new SimulatedDisk(random, odds);
  // A life rotates several times, or not at all.
  const segmentBytes = 100 + Math.floor(random() ** 2 * 100_000);
  const acknowledged = new Set<string>();
  const sent = new Set<string>();
  for (let life = 0; life < 4; life++) {
    await oneLife(disk, random, `${seed}.${life}`, acknowledged, sent, segmentBytes);
    disk.crash();
  }
  Object.assign(odds, { noRoom: 0, failedSync: 0, failedChange: 0 });
  const journal = await openJournal({ directory: "data", disk: disk.mount(), segmentBytes });
  await journal.append(Buffer.from("last\n"));
  sent.add("last");
  acknowledged.add("last");
  check(await readAll(disk), acknowledged, sent);
  return acknowledged.size;
}

test(
  "a flipped bit in any file of a journal is reported or truncates the last frame, and no line is ever wrong",
  async () => {
    const first = Number(FAULT_SEED ?? FAULT_SEED_FIRST ?? Math.floor(Math.random() * 2 ** 30));
    const count = FAULT_SEED ? 1 : Number(FAULT_SEEDS);
    const ends = { reported: 0, truncated: 0, "without effect": 0 };
    for (let seed = first; seed < first + count; seed++) {
      const end = await flip(seed).catch((error) => {
        throw new Error(`FAULT_SEED=${seed}: ${(error as Error).message}`, { cause: error });
      });
      ends[end]++;
    }
    figure("flipped bits", count);
    if (count >= 1000) for (const many of Object.values(ends)) expect(many).toBeGreaterThan(0);
  },
  LIMIT_MS,
);

test("a reader never returns a frame whose sync failed, although the reader's own sync succeeds", async () => {
  const odds = { noRoom: 0, failedSync: 0, failedChange: 0 };
  const disk = new SimulatedDisk(randomOf(1), odds);
  const mounted = disk.mount();
  const journal = await openJournal({ directory: "data", disk: mounted });
  await journal.append(Buffer.from("good\n"));
  odds.failedSync = 1;
  const refused = journal.append(Buffer.from("bad\n"));
  await expect(refused).rejects.toThrow(JournalFailed);
  odds.failedSync = 0;
  await expect(journal.append(Buffer.from("more\n"))).rejects.toThrow(JournalFailed);
  expect(await readAll(disk, mounted)).toEqual(["good"]);
});

test("close() waits for the appends that came before it", async () => {
  const disk = new SimulatedDisk(randomOf(1), HARMLESS);
  const mounted = disk.mount();
  const journal = await openJournal({ directory: "data", disk: mounted });
  const first = journal.append(Buffer.from("first\n"));
  const second = journal.append(Buffer.from("second\n"));
  const closing = journal.close();
  await Promise.all([first, second, closing]);
  expect(await readAll(disk, mounted)).toEqual(["first", "second"]);
  await expect(journal.append(Buffer.from("late\n"))).rejects.toThrow(JournalFailed);
});

test("a frame whose damaged length reaches beyond everything after it is reported", async () => {
  expect(await flip(1_081_058_769)).toBe("reported");
});

/** A journal of several segments with one bit flipped; returns how its readers found it. */
async function flip(seed: number): Promise<"reported" | "truncated" | "without effect"> {
  const random = randomOf(seed);
  const disk = new SimulatedDisk(random, HARMLESS);
  const mounted = disk.mount();
  const journal = await openJournal({
    directory: "data",
    disk: mounted,
    segmentBytes: 100 + random() * 2_000,
  });
  const frames: string[] = [];
  for (let i = Math.ceil(random() * 12); i > 0; i--) {
    frames.push(`${seed}.${i}${"x".repeat(Math.floor(random() ** 4 * 1_000))}`);
    await journal.append(Buffer.from(`${frames.at(-1)}\n`));
  }
  await journal.close();
  const path = disk.paths()[Math.floor(random() * disk.paths().length)] as string;
  disk.change(path, (bytes) => {
    const bit = Math.floor(random() * bytes.length * 8);
    bytes[bit >> 3] = (bytes[bit >> 3] as number) ^ (1 << (bit & 7));
    return bytes;
  });

  // First a processor reads it, then a server starts on it, then a processor reads it again.
  const orDamage = (error: unknown) => {
    if (!(error instanceof JournalDamage)) throw error;
    return error;
  };
  /** Whether the last line is missing. Throws if more are, or if a line is wrong. */
  const isPrefix = (lines: string[]) => {
    const whole = frames.slice(0, lines.length);
    if (lines.join() !== whole.join())
      throw new Error(`wrong lines: ${lines.join().slice(0, 200)}`);
    if (lines.length < frames.length - 1) throw new Error(`${path}: lost silently`);
    return lines.length < frames.length;
  };
  const isThere = (await openJournalReader(PATH, mounted).catch(orDamage)) !== null;
  const read = isThere ? await readAll(disk, mounted, journal.id).catch(orDamage) : null;
  if (read && !(read instanceof JournalDamage)) isPrefix(read);
  const again = await openJournal({ directory: "data", disk: mounted, segmentBytes: 2_000 }).catch(
    orDamage,
  );
  if (again instanceof JournalDamage) return "reported";
  if (!isThere) throw new Error(`${path}: a reader found no journal, and no start reported damage`);
  const left = await readAll(disk, mounted, journal.id).catch(orDamage);
  if (left instanceof JournalDamage) return "reported";
  const isShorter = isPrefix(left);
  await again.append(Buffer.from("last\n"));
  expect(await readAll(disk, mounted)).toEqual([...left, "last"]);
  return isShorter ? "truncated" : "without effect";
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
  // Opening may fail, or be interrupted by the crash. Then this life was a short one.
  const journal = await within(
    openJournal({ directory: "data", disk: mounted, segmentBytes }),
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
        if (!PASSING_OR_FINAL.some((kind) => error instanceof kind)) throw error;
      },
    );
    if (random() < 0.5) for (let turns = random() * 20; turns > 0; turns--) await Promise.resolve();
  }
}

/** The lines of the journal, which must be the one called `id`. */
async function readAll(
  disk: SimulatedDisk,
  mounted = disk.mount(),
  id?: string,
): Promise<string[]> {
  if (id) {
    const reader = await openJournalReader(PATH, mounted);
    if (reader?.id !== id) throw new Error(`the reader found journal ${reader?.id}, not ${id}`);
  }
  return readLines(PATH, mounted);
}

function check(lines: string[], acknowledged: Set<string>, sent: Set<string>): void {
  const found = new Set(lines);
  if (found.size !== lines.length) throw new Error("the journal contains a line twice");
  for (const line of acknowledged)
    if (!found.has(line)) throw new Error(`lost: ${line.slice(0, 20)}`);
  for (const line of lines)
    if (!sent.has(line)) throw new Error(`never sent: ${line.slice(0, 20)}`);
}

/** What `promise` resolves to within `turns` microtasks, or `null`. */
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

test(
  "a power cut during a repair leaves the file as it was or repaired, and the damaged bytes are kept",
  async () => {
    const first = Number(FAULT_SEED ?? FAULT_SEED_FIRST ?? Math.floor(Math.random() * 2 ** 30));
    const count = FAULT_SEED ? 1 : Math.ceil(Number(FAULT_SEEDS) / 5);
    const ends = { untouched: 0, repaired: 0 };
    for (let seed = first; seed < first + count; seed++) {
      const end = await interruptRepair(seed).catch((error) => {
        throw new Error(`FAULT_SEED=${seed}: ${(error as Error).message}`, { cause: error });
      });
      ends[end]++;
    }
    figure("repairs that died", count);
    if (count >= 200) for (const many of Object.values(ends)) expect(many).toBeGreaterThan(10);
  },
  LIMIT_MS,
);

async function interruptRepair(seed: number): Promise<"untouched" | "repaired"> {
  const random = randomOf(seed);
  const disk = new SimulatedDisk(random, HARMLESS);
  const journal = await openJournal({ directory: "data", disk: disk.mount() });
  for (let i = 0; i < 3; i++) await journal.append(Buffer.from(`${"x".repeat(9_000)}${i}\n`));
  await journal.close();
  let bad = Buffer.alloc(0);
  disk.change(PATH, (bytes) => {
    bytes.fill("y", 10_000, 12_000); // in the second frame
    bad = Buffer.from(bytes);
    return bytes;
  });
  const broken = await checkJournal(PATH, disk.mount());
  const [file] = broken.files as [CheckedFile];
  const [damage] = file.damage as [Damage];
  const { id } = broken;
  await within(repairFile(file, id as string, disk.mount()), 20 + random() * 100, (error) => {
    throw error;
  });
  disk.crash();
  const mounted = disk.mount();
  const [now] = (await checkJournal(PATH, mounted)).files as [CheckedFile];
  const contents = (path: string) => mounted.withFile(path, (file) => file.read(0, file.bytes));
  const lost = (await contents(`${PATH}.lost-${damage.from}`)) ?? Buffer.alloc(0);
  if (now.damage.length > 0) {
    if (!bad.equals((await contents(PATH)) ?? Buffer.alloc(0))) throw new Error("half repaired");
    return "untouched";
  }
  if (!lost.equals(bad.subarray(damage.from, damage.to)))
    throw new Error(`${lost.length} of ${damage.to - damage.from} damaged bytes are kept`);
  const lines = (await readAll(disk, mounted)).filter((line) => line.trim() !== "");
  expect(lines).toHaveLength(3);
  return "repaired";
}
