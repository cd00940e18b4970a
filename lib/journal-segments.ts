/**
 * The files of a journal. `eventsPost.jsonl` is the active one, which grows; a full one is renamed
 * to `eventsPost.<base>.jsonl`, a segment, and never changes again. `base` is the position of its
 * first byte (its header), so the names tell the order, and each file begins where the one before
 * it ends. The oldest may have been removed: then the first one's base is not 0.
 */
import { basename, dirname, join } from "node:path";

import type { Disk } from "./journal-disk.ts";
import { JournalDamage, MAX_HEADER_BYTES, parseJournalHeader } from "./journal-frame.ts";

export interface Segment {
  path: string;
  /** Names the journal. */
  id: string;
  /** The position of its first byte, and of the first one behind it. */
  base: number;
  to: number;
  headerBytes: number;
}

/** What the active file `active` is called when it is full. */
export function segmentPath(active: string, base: number): string {
  return `${stem(active)}.${base}.jsonl`;
}

/** Paths and bases of the segments that belong to `active`, by their names, in order. */
export async function listSegmentFiles(
  active: string,
  disk: Disk,
): Promise<{ path: string; base: number }[]> {
  const directory = dirname(active);
  const begin = `${basename(stem(active))}.`;
  const files: { path: string; base: number }[] = [];
  for (const name of await disk.list(directory)) {
    const [, digits] = /^(\d{1,15})\.jsonl$/.exec(name.slice(begin.length)) ?? [];
    if (digits && name.startsWith(begin))
      files.push({ path: join(directory, name), base: Number(digits) });
  }
  return files.toSorted((a, b) => a.base - b.base);
}

/** The segments of `active`, oldest first, each ending where the next begins. Throws JournalDamage. */
export async function listSegments(active: string, disk: Disk): Promise<Segment[]> {
  const segments: Segment[] = [];
  for (const { path, base } of await listSegmentFiles(active, disk)) {
    const header = parseJournalHeader(await disk.read(path, 0, MAX_HEADER_BYTES));
    const before = segments.at(-1);
    if (header?.base !== base)
      throw new JournalDamage(path, 0, `it does not begin with the header of position ${base}`);
    if (before && before.id !== header.id)
      throw new JournalDamage(path, 0, `it belongs to another journal than ${before.path}`);
    if (before && before.to !== base)
      throw new JournalDamage(before.path, before.to - before.base, `the next file is ${path}`);
    const to = base + (await disk.size(path));
    segments.push({ path, id: header.id, base, to, headerBytes: header.bytes });
  }
  return segments;
}

function stem(active: string): string {
  return active.endsWith(".jsonl") ? active.slice(0, -".jsonl".length) : active;
}
