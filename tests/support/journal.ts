/** Journals as bytes and as lines, without the writer. */
import { readdirSync } from "node:fs";

import { disk as realDisk, type Disk } from "../../lib/journal/disk.ts";
import { encodeFrame } from "../../lib/journal/format.ts";
import { type JournalReader, openJournalReader } from "../../lib/journal/reader.ts";

/** A frame of these lines, each with its newline, written at `atMs`. */
export function frame(lines: string, atMs = Date.now()): Buffer {
  const payload = Buffer.from(lines);
  return encodeFrame([payload], payload.length, atMs);
}

/** The frames of the journal at `path`, each read from the position after the one before. */
export async function readFrames(path: string, disk: Disk = realDisk) {
  const reader = await openJournalReader(path, disk);
  if (!reader) throw new Error(`${path} is not a journal`);
  const all: Awaited<ReturnType<JournalReader["read"]>> = [];
  for (let position = reader.start; ; position = all.at(-1)?.to ?? position) {
    const frames = await reader.read(position);
    if (frames.length === 0) return all;
    all.push(...frames);
  }
}

/** The lines of the journal at `path`, without their newlines. */
export async function readLines(path: string, disk: Disk = realDisk): Promise<string[]> {
  const frames = await readFrames(path, disk);
  return frames.flatMap(({ payload }) => payload.toString().trimEnd().split("\n"));
}

/** The names of the segments in `directory`, in the order of their positions. The active file is not one. */
export function segmentNames(directory: string): string[] {
  const base = (name: string) => Number(/^eventsPost\.(\d+)\.jsonl$/.exec(name)?.[1] ?? Number.NaN);
  const names = readdirSync(directory).filter((name) => base(name) >= 0);
  return names.toSorted((a, b) => base(a) - base(b));
}
