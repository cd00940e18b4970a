/**
 * Looks through all files of a journal: headers, frames, checksums, and that each file begins where
 * the one before it ends. Unlike a reader it does not stop at damage, but goes on at the next whole
 * frame. In memory bounded by a frame, while the journal is being written or not.
 */
import type { Disk } from "./disk.ts";
import {
  encodeJournalHeader,
  findNextFrame,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  parseFrames,
  parseJournalHeader,
} from "./format.ts";
import { listSegmentFiles } from "./segments.ts";

/**
 * Bytes `from` to `to` of a file that cannot be read. `length` is how many there should be, as far as
 * that is known: the next file's name tells where this one must end.
 */
export interface Damage {
  from: number;
  to: number;
  length: number;
  what: string;
}

/** What a file of the journal holds; `base` is the position of its first byte. */
export interface CheckedFile {
  path: string;
  base: number;
  bytes: number;
  frames: number;
  damage: Damage[];
  /** At the end of the active file: a frame that was never acknowledged, or is just being written. */
  tornBytes: number;
}

export interface CheckedJournal {
  /** Names the journal; `null` when no file says so. */
  id: string | null;
  files: CheckedFile[];
}

/** Reads every byte of the journal at `active`. */
export async function checkJournal(active: string, disk: Disk): Promise<CheckedJournal> {
  /** Full files that are whole: they never change, and are not read again. */
  const whole = new Map<string, CheckedFile>();
  for (;;) {
    const before = await listSegmentFiles(active, disk);
    const checked = await checkFiles(active, before, disk, whole);
    // A file that was renamed or removed under it was not checked as what it is.
    const after = await listSegmentFiles(active, disk);
    if (Bun.deepEquals(before, after)) return checked;
    for (const file of checked.files)
      if (file.path !== active && file.damage.length === 0) whole.set(file.path, file);
  }
}

async function checkFiles(
  active: string,
  segments: { path: string; base: number }[],
  disk: Disk,
  whole: ReadonlyMap<string, CheckedFile>,
): Promise<CheckedJournal> {
  const paths = [...segments, { path: active, base: Number.NaN }];
  const headers = [];
  for (const { path } of paths)
    headers.push(parseJournalHeader(await disk.read(path, 0, MAX_HEADER_BYTES)));
  const id = headers.findLast((header) => header !== null)?.id ?? null;
  const files: CheckedFile[] = [];
  for (const [i, { path, base: named }] of paths.entries()) {
    const known = whole.get(path);
    if (known) {
      files.push(known);
      continue;
    }
    const isLast = i === paths.length - 1;
    const header = headers[i] ?? null;
    const before = files.at(-1);
    const bytes = await disk.size(path);
    const base = isLast ? (header?.base ?? (before ? before.base + before.bytes : 0)) : named;
    if (isLast && bytes === 0) break; // a rotation that died half-way, or nothing at all
    const next = paths[i + 1];
    // Where the active file's header says nothing (or a rotation is under way, or died), this one is as long as it is.
    const nextBase = next && (Number.isNaN(next.base) ? headers[i + 1]?.base : next.base);
    const length = (nextBase ?? base + bytes) - base;
    const file: CheckedFile = { path, base, bytes, frames: 0, damage: [], tornBytes: 0 };
    await checkFile(file, disk, { id: id ?? "", isLast, length });
    files.push(file);
  }
  return { id, files };
}

/** Fills in `file`, which should be `length` bytes long where another file follows. */
async function checkFile(
  file: CheckedFile,
  disk: Disk,
  wanted: { id: string; isLast: boolean; length: number },
): Promise<void> {
  const { path, base, bytes: size, damage } = file;
  const header = encodeJournalHeader(wanted.id, base);
  let at = header.length;
  /** Where the last whole frame begins that begins before the file should end. */
  let lastFrame = at;
  /** Where what cannot be read begins, and why. */
  let bad: { from: number; what: string } | null = null;
  const isGood = (to: number) => {
    if (bad) damage.push({ ...bad, to, length: to - bad.from });
    bad = null;
  };
  if (!header.equals(await disk.read(path, 0, header.length))) {
    const name = wanted.id || "…";
    bad = { from: 0, what: `it does not begin with the header of journal ${name}, base ${base}` };
    at = 0;
  }
  while (at < size) {
    const bytes = await disk.read(path, at, at + MAX_FRAME_BYTES + MAX_HEADER_BYTES);
    if (bytes.length === 0) break;
    const atEnd = at + bytes.length >= size;
    const { frames, end, rest } = parseFrames(bytes);
    if (frames.length > 0) isGood(at);
    file.frames += frames.length;
    for (const frame of frames) if (at + frame.from < wanted.length) lastFrame = at + frame.from;
    if (rest === "nothing" || (rest === "short" && !atEnd && end > 0)) {
      at += end;
      continue;
    }
    // What the next start takes for a frame that was never acknowledged, by the same rule.
    const mayBeTorn = rest === "short" || !rest.behind;
    if (wanted.isLast && atEnd && mayBeTorn && at + end > 0) {
      isGood(at + end);
      file.tornBytes = size - at - end;
      break;
    }
    bad ??= { from: at + end, what: rest === "short" ? "a frame is cut short" : rest.fault };
    const found = findNextFrame(bytes, end);
    if (found >= 0) at += found;
    else at += atEnd ? bytes.length : Math.max(end + 1, bytes.length - MAX_HEADER_BYTES);
  }
  isGood(size);

  const lacks = wanted.length - size;
  if (lacks === 0 || wanted.isLast) return;
  // Bytes were taken away or put in: where something else is wrong, that was there. Otherwise it was
  // where no checksum is (the time of a frame), and the last frame makes good for it.
  const [first] = damage;
  const what = `the next file begins at position ${base + wanted.length}`;
  const from = lacks > 2 * MAX_HEADER_BYTES ? size : lastFrame;
  if (first) first.length = Math.max(0, first.length + lacks);
  else damage.push({ from, to: size, length: wanted.length - from, what });
}
