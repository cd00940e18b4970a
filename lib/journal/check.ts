/**
 * Checks all files of a journal: headers, frames, checksums, and that each file begins where the one
 * before it ends. Unlike a reader it does not stop at damage but resumes at the next whole frame. It
 * needs the memory of one frame, and works while the journal is being written.
 */
import type { Disk, ReadableFile } from "./disk.ts";
import {
  encodeJournalHeader,
  findNextFrame,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  parseFrames,
} from "./format.ts";
import { listSegmentFiles, readHeader, type SegmentFile } from "./segments.ts";

/**
 * Bytes `from` to `to` of a file that cannot be read. `lostBytes` of the journal are lost with them: as
 * many, or more at the end of an older copy that was restored.
 */
export interface Damage {
  from: number;
  to: number;
  lostBytes: number;
  what: string;
}

/** What a file of the journal holds; `base` is the position of its first byte. */
export interface CheckedFile {
  path: string;
  base: number;
  bytes: number;
  frames: number;
  damage: Damage[];
  /**
   * Where the next file begins, if this one does not end there; else `null`. Rot changes no lengths: bytes
   * were inserted or removed, and nobody knows where.
   */
  nextBase: number | null;
  /** At the end of the active file: a frame that was never acknowledged, or is just being written. */
  tornBytes: number;
}

export interface CheckedJournal {
  /** The id of the journal; `null` when no file has it. */
  id: string | null;
  files: CheckedFile[];
}

/** Reads every byte of the journal at `active`. */
export async function checkJournal(active: string, disk: Disk): Promise<CheckedJournal> {
  /** Segments that are whole: they never change, and are not read again. */
  const whole = new Map<string, CheckedFile>();
  for (;;) {
    const before = await listSegmentFiles(active, disk);
    const checked = await checkFiles(active, before, disk, whole);
    // A file that was renamed or removed in the meantime was not checked as what it is.
    const after = await listSegmentFiles(active, disk);
    if (Bun.deepEquals(before, after)) return checked;
    for (const file of checked.files)
      if (file.path !== active && !isDamaged(file)) whole.set(file.path, file);
  }
}

export function isDamaged({ damage, nextBase }: CheckedFile): boolean {
  return damage.length > 0 || nextBase !== null;
}

async function checkFiles(
  active: string,
  segments: SegmentFile[],
  disk: Disk,
  whole: ReadonlyMap<string, CheckedFile>,
): Promise<CheckedJournal> {
  const headers = [];
  for (const path of [...segments.map(({ path }) => path), active])
    headers.push(await disk.withFile(path, readHeader));
  const id = headers.findLast((header) => header)?.id ?? null;
  const activeBase = headers.at(-1)?.base;
  const files: CheckedFile[] = [];
  for (const [i, segment] of segments.entries()) {
    const nextBase = segments[i + 1]?.base ?? activeBase;
    const file =
      whole.get(segment.path) ??
      (await disk.withFile(segment.path, async (opened) => {
        const checked = await checkFile({ ...segment, id, file: opened, isActive: false });
        // Where the header of the active file is unreadable, or a rotation is under way, any length is right.
        const isRight = nextBase === undefined || segment.base + opened.bytes === nextBase;
        return { ...checked, nextBase: isRight ? null : nextBase };
      }));
    if (file) files.push(file);
  }
  const last = files.at(-1);
  const base = activeBase ?? (last ? last.base + last.bytes : 0);
  const checked = await disk.withFile(active, (file) =>
    // Empty: a rotation that died half-way, or nothing at all.
    file.bytes === 0 ? null : checkFile({ path: active, base, id, file, isActive: true }),
  );
  if (checked) files.push(checked);
  return { id, files };
}

async function checkFile(opened: {
  path: string;
  base: number;
  id: string | null;
  file: ReadableFile;
  isActive: boolean;
}): Promise<CheckedFile> {
  const { path, base, id, file, isActive } = opened;
  const size = file.bytes;
  const checked: CheckedFile = {
    path,
    base,
    bytes: size,
    frames: 0,
    damage: [],
    nextBase: null,
    tornBytes: 0,
  };
  const header = encodeJournalHeader(id ?? "…", base);
  let at = header.length;
  /** Where unreadable bytes begin, and why they are unreadable. */
  let bad: { from: number; what: string } | null = null;
  const endBad = (to: number) => {
    if (bad) checked.damage.push({ ...bad, to, lostBytes: to - bad.from });
    bad = null;
  };
  if (!header.equals(await file.read(0, header.length))) {
    bad = { from: 0, what: `it does not begin with ${header.toString().trim()}` };
    at = 0;
  }
  while (at < size) {
    const bytes = await file.read(at, at + MAX_FRAME_BYTES + MAX_HEADER_BYTES);
    if (bytes.length === 0) break;
    const isEnd = at + bytes.length >= size;
    const { frames, endIndex, rest } = parseFrames(bytes);
    if (frames.length > 0) endBad(at);
    checked.frames += frames.length;
    if (rest === "nothing" || (rest === "short" && !isEnd && endIndex > 0)) {
      at += endIndex;
      continue;
    }
    // The next start truncates a torn frame by the same rule.
    const mayBeTorn = rest === "short" || !rest.hasMore;
    if (isActive && isEnd && mayBeTorn && at + endIndex > 0) {
      endBad(at + endIndex);
      checked.tornBytes = size - at - endIndex;
      break;
    }
    bad ??= { from: at + endIndex, what: rest === "short" ? "a frame is cut short" : rest.fault };
    const next = findNextFrame(bytes, endIndex);
    if (next >= 0) at += next;
    else at += isEnd ? bytes.length : Math.max(endIndex + 1, bytes.length - MAX_HEADER_BYTES);
  }
  endBad(size);
  return checked;
}
