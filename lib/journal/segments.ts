/**
 * The files of a journal. `eventsPost.jsonl` is the active one, which grows; a full one is renamed
 * to `eventsPost.<base>.jsonl`, a segment, and never changes again. `base` is the position of its
 * first byte (its header), so the names tell the order, and each file begins where the one before
 * it ends. The oldest may have been removed: then the first one's base is not 0.
 */
import { basename, dirname, join } from "node:path";

import type { Disk } from "./disk.ts";
import { JournalDamage, MAX_HEADER_BYTES, parseJournalHeader } from "./format.ts";

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

/** The active file of the journal that `path` is a full file of; of anything else `path` itself. */
export async function activeOf(path: string, disk: Disk): Promise<string> {
  const [, stem, base] = /^(.*)\.(\d{1,15})\.jsonl$/s.exec(path) ?? [];
  if (stem === undefined) return path;
  const header = parseJournalHeader(await disk.read(path, 0, MAX_HEADER_BYTES));
  return header?.base === Number(base) ? `${stem}.jsonl` : path;
}

/** A file that is a segment by its name. */
export type SegmentFile = Pick<Segment, "path" | "base">;

/** The files that are segments of `active` by their names, in order. */
export async function listSegmentFiles(active: string, disk: Disk): Promise<SegmentFile[]> {
  const directory = dirname(active);
  const begin = `${basename(stem(active))}.`;
  const files: SegmentFile[] = [];
  for (const name of await disk.list(directory)) {
    const [, digits] = /^(\d{1,15})\.jsonl$/.exec(name.slice(begin.length)) ?? [];
    if (digits && name.startsWith(begin))
      files.push({ path: join(directory, name), base: Number(digits) });
  }
  return files.toSorted((a, b) => a.base - b.base);
}

/**
 * The segment in a file; `null` when it is there no more: a processor may let go of old ones at any
 * moment, and that was taken for damage. Throws JournalDamage.
 */
export async function openSegment(
  { path, base }: SegmentFile,
  disk: Disk,
): Promise<Segment | null> {
  const header = parseJournalHeader(await disk.read(path, 0, MAX_HEADER_BYTES));
  const to = base + (await disk.size(path));
  if (header?.base === base && to > base)
    return { path, id: header.id, base, to, headerBytes: header.bytes };
  if (!(await disk.list(dirname(path))).includes(basename(path))) return null;
  throw new JournalDamage(path, 0, `it does not begin with the header of position ${base}`);
}

/**
 * The segments of `active`, oldest first, each ending where the next begins: reads something of each
 * of them. Throws JournalDamage.
 */
export async function listSegments(active: string, disk: Disk): Promise<Segment[]> {
  const segments: Segment[] = [];
  for (const file of await listSegmentFiles(active, disk)) {
    const segment = await openSegment(file, disk);
    if (!segment) return listSegments(active, disk);
    const before = segments.at(-1);
    if (before && before.id !== segment.id)
      throw new JournalDamage(file.path, 0, `it belongs to another journal than ${before.path}`);
    if (before && before.to !== file.base)
      throw new JournalDamage(
        before.path,
        before.to - before.base,
        `the next file is ${file.path}`,
      );
    segments.push(segment);
  }
  return segments;
}

function stem(active: string): string {
  return active.endsWith(".jsonl") ? active.slice(0, -".jsonl".length) : active;
}
