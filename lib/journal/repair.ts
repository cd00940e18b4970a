/**
 * Takes damage out of a journal. Positions must not move: the ledger's checkpoint is one. So a range that
 * cannot be read is copied to a file of its own, and replaced by a frame of the same length, which says
 * in one line what was there:
 *
 *     {"lost":{"bytes":580,"file":"eventsPost.jsonl.lost-1093"}}
 *
 * The processor quarantines that line like any other that is not an event. The repaired file is written
 * beside the damaged one and gets its name once it is on the disk: a repair that dies has changed nothing.
 */
import { basename, dirname } from "node:path";

import type { CheckedFile, Damage } from "./check.ts";
import type { Disk, JournalFile } from "./disk.ts";
import { encodeFrame, encodeJournalHeader, encodeLost, MAX_HEADER_BYTES } from "./format.ts";

const COPY_BYTES = 8 * 1024 * 1024;
/** More lost bytes than this are replaced by several frames. */
export const MAX_FILLER_BYTES = 16 * 1024 * 1024;
/** A frame is at least this long. */
export const MIN_FILLER_BYTES = encodeFrame([], 0, 0).length;

/** Damage that was taken out, and the file that its bytes were moved to, if there were any. */
export interface Repaired extends Damage {
  movedTo: string | null;
}

/**
 * Throws where no frame of the same length can replace the damage: bytes were inserted or removed, so
 * nobody knows the positions of the frames after them.
 */
export function requireRepairable({ path, base, damage }: CheckedFile, id: string): void {
  for (const { from, lostBytes, what } of damage) {
    const left = from === 0 ? lostBytes - encodeJournalHeader(id, base).length : lostBytes;
    if (left < MIN_FILLER_BYTES && !(from === 0 && left === 0))
      throw new Error(
        `cannot repair ${path}: ${what}; bytes were inserted or removed, so restore it from a copy`,
      );
  }
}

/** Repairs `file` of journal `id`, which is repairable. */
export async function repairFile(file: CheckedFile, id: string, disk: Disk): Promise<Repaired[]> {
  const { path, base } = file;
  requireRepairable(file, id);
  const repaired = await openNew(`${path}.repairing`, disk);
  const moved: Repaired[] = [];
  let at = 0;
  for (const damage of file.damage) {
    const { from, to, lostBytes } = damage;
    const movedTo = to > from ? await moveAside(path, damage, disk) : null;
    moved.push({ ...damage, movedTo });
    await copy(path, [at, from], repaired, disk);
    const header = from === 0 ? encodeJournalHeader(id, base) : Buffer.alloc(0);
    await repaired.append(header);
    for (const filler of fillers(lostBytes - header.length, movedTo)) await repaired.append(filler);
    at = to;
  }
  await copy(path, [at, file.bytes], repaired, disk);
  await repaired.sync();
  await repaired.close();
  await disk.rename(`${path}.repairing`, path);
  await disk.syncDirectory(dirname(path));
  return moved;
}

async function moveAside(path: string, { from, to }: Damage, disk: Disk): Promise<string> {
  let aside = `${path}.lost-${from}`;
  for (let again = 2; (await disk.size(aside)) > 0; again++)
    aside = `${path}.lost-${from}-${again}`;
  const file = await openNew(aside, disk);
  await copy(path, [from, to], file, disk);
  await file.sync();
  await file.close();
  await disk.syncDirectory(dirname(path));
  return aside;
}

async function openNew(path: string, disk: Disk): Promise<JournalFile> {
  const file = await disk.openForAppend(path);
  await file.truncate(0);
  return file;
}

async function copy(path: string, range: [number, number], into: JournalFile, disk: Disk) {
  const [from, to] = range;
  await disk.withFile(path, async (file) => {
    for (let at = from; at < to; at += COPY_BYTES)
      await into.append(await file.read(at, Math.min(to, at + COPY_BYTES)));
  });
}

/** Frames that together are `bytes` long and say what they replace. */
export function* fillers(bytes: number, movedTo: string | null): Generator<Buffer> {
  for (let left = bytes; left > 0;) {
    const length = left > MAX_FILLER_BYTES + 2 * MAX_HEADER_BYTES ? MAX_FILLER_BYTES : left;
    yield fillerOf(length, bytes, movedTo && basename(movedTo));
    left -= length;
  }
}

/** A frame of `bytes` bytes that says what is lost: without the file's name where that does not fit. */
function fillerOf(bytes: number, lostBytes: number, file: string | null): Buffer {
  const left = bytes - MIN_FILLER_BYTES;
  const payloadBytes = left - `${left}`.length + 1;
  // 98 has one digit less than the 100 bytes that are left: then the time has one more.
  const atMs = `${payloadBytes}`.length < `${left}`.length ? 10 : 0;
  const payload = Buffer.alloc(payloadBytes, " ");
  const marks = [encodeLost(lostBytes, file), encodeLost(lostBytes, null)];
  marks.find(({ length }) => length <= payloadBytes)?.copy(payload);
  if (payloadBytes > 0) payload[payloadBytes - 1] = 10;
  return encodeFrame([payload], payloadBytes, atMs);
}
