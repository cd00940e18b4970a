/**
 * Takes damage out of a journal. Positions must stay: the ledger's checkpoint is one. So a range that
 * cannot be read is copied to a file of its own, and a frame of the same length takes its place,
 * which says in one line what was there:
 *
 *     {"lost":{"bytes":580,"file":"eventsPost.jsonl.lost-1093"}}
 *
 * The processor quarantines that line like any other that is no event. A file is written anew beside
 * the damaged one and takes its name when it is on the disk: a repair that dies has changed nothing.
 */
import { basename, dirname } from "node:path";

import type { CheckedFile, Damage } from "./check.ts";
import type { Disk, JournalFile } from "./disk.ts";
import { encodeFrame, encodeJournalHeader, encodeLost, MAX_HEADER_BYTES } from "./format.ts";

const COPY_BYTES = 8 * 1024 * 1024;
/** A frame in the place of more than this is followed by another one: no reader takes more than 24 MiB. */
const MAX_FILLER_BYTES = 16 * 1024 * 1024;

/** Damage that was taken out of `path`, and the file it is in now, if there was anything. */
export interface Repaired extends Damage {
  movedTo: string | null;
}

/** Mends `file` of journal `id`. */
export async function repairFile(file: CheckedFile, id: string, disk: Disk): Promise<Repaired[]> {
  const { path, base } = file;
  const repaired = await openNew(`${path}.repairing`, disk);
  const moved: Repaired[] = [];
  let at = 0;
  for (const damage of file.damage) {
    const { from, to, length } = damage;
    const movedTo = to > from ? await moveAside(path, damage, disk) : null;
    moved.push({ ...damage, movedTo });
    await copy(path, at, from, repaired, disk);
    const header = from === 0 ? encodeJournalHeader(id, base) : Buffer.alloc(0);
    await repaired.append(header);
    for (const filler of fillers(length - header.length, movedTo)) await repaired.append(filler);
    at = to;
  }
  await copy(path, at, file.bytes, repaired, disk);
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
  await copy(path, from, to, file, disk);
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

async function copy(path: string, from: number, to: number, into: JournalFile, disk: Disk) {
  for (let at = from; at < to; at += COPY_BYTES)
    await into.append(await disk.read(path, at, Math.min(to, at + COPY_BYTES)));
}

/**
 * Frames that together are `bytes` long and say what they stand for. Fewer bytes than a frame has
 * were never one: somebody has put them in, and nothing takes their place.
 */
function* fillers(bytes: number, movedTo: string | null): Generator<Buffer> {
  for (let left = bytes; left > 0;) {
    const length = left > MAX_FILLER_BYTES + 2 * MAX_HEADER_BYTES ? MAX_FILLER_BYTES : left;
    const filler = fillerOf(length, bytes, movedTo && basename(movedTo));
    if (!filler) return;
    yield filler;
    left -= length;
  }
}

/** Whether a frame can be so long. */
export function canFill(bytes: number): boolean {
  return fillerOf(bytes, bytes, null) !== null;
}

/** A frame of `bytes` bytes that says what is lost: without the file's name where that has no room. */
function fillerOf(bytes: number, lostBytes: number, file: string | null): Buffer | null {
  const marks = [encodeLost(lostBytes, file), encodeLost(lostBytes, null)];
  // Where the number of bytes gets one digit more there is a length that no frame has: then the time
  // is written with one digit more.
  for (const at of [0, 10]) {
    for (let digits = 1; digits <= 9; digits++) {
      const payloadBytes = bytes - encodeFrame([], 0, at).length + 1 - digits;
      if (payloadBytes < 0 || `${payloadBytes}`.length !== digits) continue;
      const payload = Buffer.alloc(payloadBytes, " ");
      marks.find(({ length }) => length <= payloadBytes)?.copy(payload);
      if (payloadBytes > 0) payload[payloadBytes - 1] = 10;
      return encodeFrame([payload], payloadBytes, at);
    }
  }
  return null;
}
