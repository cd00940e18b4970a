/** The end of a journal cut at every byte, and with every bit flipped. */
import { expect, test } from "bun:test";

import type { Disk } from "../../lib/journal/disk.ts";
import { encodeJournalHeader, JournalDamage } from "../../lib/journal/format.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { event } from "../support/events.ts";
import { frame, readFrames, readLines } from "../support/journal.ts";
import { randomOf } from "../support/random.ts";
import { HARMLESS, SimulatedDisk } from "./simulated-disk.ts";

const PATH = "data/eventsPost.jsonl";
const ID = "3f5bd0c6-5cf3-4f0e-9a0c-0a6d7f6a2b11";

/** A journal of `count` frames of one or two events each, and where each frame begins. */
function makeJournal(count: number) {
  const random = randomOf(1);
  const parts = [encodeJournalHeader(ID, 0)];
  const frames: { from: number; to: number; at: [number, number]; lines: string[] }[] = [];
  let end = (parts[0] as Buffer).length;
  for (let number = 0; number < count; number++) {
    const lines = Array.from({ length: random() < 0.3 ? 2 : 1 }, (_, i) => event(`u${number}`, i));
    const text = lines.map((event) => `${event}\n`).join("");
    const bytes = frame(text, 1_700_000_000_000 + number);
    const digits = bytes.indexOf('"at":') + 5;
    frames.push({
      from: end,
      to: end + bytes.length,
      at: [end + digits, end + digits + 13],
      lines,
    });
    end += bytes.length;
    parts.push(bytes);
  }
  return { bytes: Buffer.concat(parts), frames };
}

let starts = 0;

/** The lines that are left after a start on these bytes, or the damage that it reported. */
async function start(bytes: Buffer): Promise<string[] | JournalDamage> {
  const disk = new SimulatedDisk(randomOf(1), HARMLESS);
  const mounted = disk.mount();
  await mounted.openForAppend(PATH);
  disk.change(PATH, () => bytes);
  try {
    await (await openJournal({ directory: "data", disk: mounted })).close();
    // The next start finds the journal whole. Checking this for all starts would take half as long again.
    const say = (line: string) => {
      throw new Error(`the next start reported: ${line}`);
    };
    if (starts++ % 4 === 0) await openJournal({ directory: "data", say, disk: mounted });
  } catch (error) {
    if (error instanceof JournalDamage) return error;
    throw error;
  }
  return readLines(PATH, mounted);
}

test("a journal cut at any byte of its last 200 frames keeps exactly its whole frames", async () => {
  const { bytes, frames } = makeJournal(220);
  let whole = frames.slice(0, 20).flatMap(({ lines }) => lines);
  for (const { from, to, lines } of frames.slice(20)) {
    for (let cut = from; cut < to; cut++) {
      const left = await start(bytes.subarray(0, cut));
      if (left instanceof JournalDamage || left.join() !== whole.join())
        throw new Error(`cut at ${cut}: ${left}`);
    }
    whole = [...whole, ...lines];
  }
  expect(await start(bytes)).toEqual(whole);
}, 300_000);

test("a flipped bit in the last 20 frames is reported with the position of its frame, or truncates the very last one", async () => {
  const { bytes, frames } = makeJournal(30);
  const all = frames.flatMap(({ lines }) => lines).join();
  const butLast = frames.slice(0, -1).flatMap(({ lines }) => lines);
  for (const [index, { from, to, at }] of frames.slice(-20).entries()) {
    for (let bit = from * 8; bit < to * 8; bit++) {
      const byte = bit >> 3;
      const flipped = Buffer.from(bytes);
      flipped[byte] = (flipped[byte] as number) ^ (1 << (bit & 7));
      const found = await start(flipped);
      const named = found instanceof JournalDamage && found.message.includes(`at byte ${from}:`);
      // Only reports depend on the time of a frame.
      const unnoticed = byte >= at[0] && byte < at[1] && `${found}` === all;
      const truncated = index === 19 && `${found}` === butLast.join();
      if (!named && !unnoticed && !truncated) throw new Error(`bit ${bit}: ${found}`);
    }
  }
  expect(butLast.length).toBeGreaterThan(29);
}, 300_000);

/** Flips each bit from byte `from` to byte `to` in turn, and calls `check` with what a reader finds. */
async function eachFlip(
  disk: SimulatedDisk,
  path: string,
  [from, to]: [number, number],
  check: (found: unknown, bit: number) => void,
) {
  const flip = (bit: number) =>
    disk.change(path, (bytes) => {
      bytes[bit >> 3] = (bytes[bit >> 3] as number) ^ (1 << (bit & 7));
      return bytes;
    });
  for (let bit = 8 * from; bit < 8 * to; bit++) {
    flip(bit);
    check(await read(disk.mount()).catch((error) => error), bit);
    flip(bit);
  }
}

/** The journal's id, and its frames with their positions. */
async function read(mounted: Disk): Promise<string> {
  const reader = await openJournalReader(PATH, mounted);
  const frames = await readFrames(PATH, mounted);
  return [reader?.id, ...frames.map(({ from, payload }) => `${from} ${payload}`)].join("\n");
}

test("no flipped bit of a journal's id makes it another journal", async () => {
  const disk = new SimulatedDisk(randomOf(1), HARMLESS);
  const mounted = disk.mount();
  const journal = await openJournal({ directory: "data", disk: mounted });
  await journal.append(Buffer.from("line\n"));
  const [name] = encodeJournalHeader(journal.id, 0).toString().split(journal.id) as [string];
  await eachFlip(disk, PATH, [name.length, name.length + journal.id.length], (found, bit) => {
    if (!(found instanceof JournalDamage)) throw new Error(`bit ${bit}: ${found}`);
  });
  expect(await read(disk.mount())).toStartWith(journal.id);
});

test("no flipped bit of any header moves an event", async () => {
  const disk = new SimulatedDisk(randomOf(1), HARMLESS);
  const mounted = disk.mount();
  const journal = await openJournal({ directory: "data", disk: mounted, segmentBytes: 250 });
  for (let i = 0; i < 6; i++) await journal.append(Buffer.from(`line ${i} ${"x".repeat(100)}\n`));
  const whole = await read(mounted);
  const header = encodeJournalHeader(journal.id, 0).length; // including its newline
  expect(disk.paths().length).toBeGreaterThan(2);
  for (const path of disk.paths())
    await eachFlip(disk, path, [0, header], (found, bit) => {
      if (!(found instanceof JournalDamage) && found !== whole)
        throw new Error(`${path}, bit ${bit}: ${found}`);
    });
});
