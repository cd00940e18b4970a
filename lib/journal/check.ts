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
 * many; more at the end of an older copy that was restored; 0 at the end of a file whose length is wrong.
 */
export interface Damage {
  from: number;
  to: number;
  lostBytes: number;
  what: string;
}

/** What a file of the journal holds; `base` is the position of its first byte. */
export interface CheckedFile extends SegmentFile {
  bytes: number;
  frames: number;
  damage: Damage[];
  /** At the end of the active file: a frame that was never acknowledged, or is just being written. */
  tornBytes: number;
}

/** Reads every byte of the journal at `active`. `id` is `null` when no file has an intact header. */
export async function checkJournal(active: string, disk: Disk) {
  const id = await findId(active, disk);
  const files: CheckedFile[] = [];
  let last: CheckedFile | null;
  do {
    for (const segment of await listNew()) {
      const checked = await disk.withFile(segment.path, (file) =>
        checkFile(segment, file, { id, isActive: false }),
      );
      // Deleted in the meantime, and the older ones before it: what is kept begins after it.
      if (!checked) files.length = 0;
      else files.push(checked);
    }
    last = await disk.withFile(active, checkActive);
    // If the active file was renamed in the meantime, it is checked again as a segment.
  } while ((await listNew()).length > 0);
  // Empty: a rotation that died half-way, or nothing at all.
  if (last?.bytes) files.push(last);
  for (const [i, file] of files.entries()) checkLength(file, files[i + 1]);
  return { id, files };

  async function listNew() {
    const checked = files.at(-1)?.base ?? -1;
    return (await listSegmentFiles(active, disk)).filter(({ base }) => base > checked);
  }

  async function checkActive(file: ReadableFile) {
    const before = files.at(-1);
    const expected = before ? before.base + before.bytes : 0;
    const base = (await readHeader(file))?.base ?? expected;
    return checkFile({ path: active, base }, file, { id, isActive: true });
  }
}

/** The id in the newest file that has an intact header. */
async function findId(active: string, disk: Disk): Promise<string | null> {
  const segments = await listSegmentFiles(active, disk);
  for (const { path } of [{ path: active }, ...segments.toReversed()]) {
    const header = await disk.withFile(path, readHeader);
    if (header) return header.id;
  }
  return null;
}

/** Rot changes no lengths: in a file of the wrong length, bytes were inserted or removed, nobody knows where. */
function checkLength({ base, bytes, damage }: CheckedFile, next: CheckedFile | undefined): void {
  if (!next || next.base === base + bytes) return;
  const what = `it ends at position ${base + bytes}, but the next file begins at ${next.base}`;
  damage.push({ from: bytes, to: bytes, lostBytes: 0, what });
}

async function checkFile(
  { path, base }: SegmentFile,
  { bytes: size, read }: ReadableFile,
  { id, isActive }: { id: string | null; isActive: boolean },
): Promise<CheckedFile> {
  const damage: Damage[] = [];
  let frameCount = 0;
  let tornBytes = 0;
  const header = encodeJournalHeader(id ?? "…", base);
  const hasHeader = header.equals(await read(0, header.length));
  let at = hasHeader ? header.length : 0;
  /** Where unreadable bytes begin, and why they are unreadable. */
  let bad = hasHeader
    ? null
    : { from: 0, what: `it does not begin with ${header.toString().trim()}` };
  const endBad = (to: number) => {
    if (bad) damage.push({ ...bad, to, lostBytes: to - bad.from });
    bad = null;
  };
  while (at < size) {
    const bytes = await read(at, at + MAX_FRAME_BYTES + MAX_HEADER_BYTES);
    if (bytes.length === 0) break;
    const isEnd = at + bytes.length >= size;
    const { frames, endIndex, rest } = parseFrames(bytes);
    if (frames.length > 0) endBad(at);
    frameCount += frames.length;
    if (rest === "nothing" || (rest === "short" && !isEnd && endIndex > 0)) {
      at += endIndex;
      continue;
    }
    // The next start truncates a torn frame by the same rule.
    const mayBeTorn = rest === "short" || !rest.hasMore;
    if (isActive && isEnd && mayBeTorn && at + endIndex > 0) {
      endBad(at + endIndex);
      tornBytes = size - at - endIndex;
      break;
    }
    bad ??= { from: at + endIndex, what: rest === "short" ? "a frame is cut short" : rest.fault };
    const next = findNextFrame(bytes, endIndex);
    if (next >= 0) at += next;
    else at += isEnd ? bytes.length : Math.max(endIndex + 1, bytes.length - MAX_HEADER_BYTES);
  }
  endBad(size);
  return { path, base, bytes: size, frames: frameCount, damage, tornBytes };
}
