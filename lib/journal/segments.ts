/**
 * The files of a journal. `eventsPost.jsonl` is the active one, which grows; a full one is renamed
 * to `eventsPost.<base>.jsonl`, a segment, and never changes again. `base` is the position of its
 * first byte (its header), so the names give the order, and each file begins where the one before
 * it ends. The oldest may have been removed: then the first base is not 0.
 */
import { basename, dirname, join } from "node:path";

import type { Disk, ReadableFile } from "./disk.ts";
import {
  JournalDamage,
  type JournalHeader,
  MAX_HEADER_BYTES,
  parseJournalHeader,
} from "./format.ts";

export interface Segment {
  path: string;
  /** The id of its journal. */
  id: string;
  /** The position of its first byte, and of the first one after it. */
  base: number;
  to: number;
  headerBytes: number;
}

/** A file that is a segment by its name. */
export type SegmentFile = Pick<Segment, "path" | "base">;

/** The path of the active file `active` once it is full. */
export function segmentPath(active: string, base: number): string {
  return `${stem(active)}.${base}.jsonl`;
}

/** The active file of the journal of which `path` is a segment; `path` itself if it is none. */
export async function activeOf(path: string, disk: Disk): Promise<string> {
  const [, stem, base] = /^(.*)\.(\d{1,15})\.jsonl$/s.exec(path) ?? [];
  if (stem === undefined) return path;
  const header = await disk.withFile(path, readHeader);
  return header?.base === Number(base) ? `${stem}.jsonl` : path;
}

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

/** The header of an open file of a journal; `null` when it does not begin with one. */
export async function readHeader(file: ReadableFile): Promise<JournalHeader | null> {
  return parseJournalHeader(await file.read(0, MAX_HEADER_BYTES));
}

/** The segment in a file that is open. Throws JournalDamage. */
export async function readSegment(
  { path, base }: SegmentFile,
  file: ReadableFile,
): Promise<Segment> {
  const header = await readHeader(file);
  if (header?.base !== base)
    throw new JournalDamage(path, 0, `it does not begin with the header of position ${base}`);
  return { path, id: header.id, base, to: base + file.bytes, headerBytes: header.bytes };
}

/**
 * The segment in a file; `null` if the file is gone: a processor may delete old ones at any moment,
 * which is not damage. Throws JournalDamage.
 */
export function openSegment(file: SegmentFile, disk: Disk): Promise<Segment | null> {
  return disk.withFile(file.path, (opened) => readSegment(file, opened));
}

/**
 * The segments of `active`, oldest first, each ending where the next begins. Reads the header of each.
 * Throws JournalDamage.
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
