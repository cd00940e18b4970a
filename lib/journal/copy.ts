/**
 * Copying a journal while it is being written. What is copied ends with the last frame that was whole when
 * the active file was opened. The caller keeps segments from being deleted meanwhile.
 */
import { basename, dirname, join } from "node:path";

import { copyFile, disk, linkFile } from "./disk.ts";
import { JournalDamage, MAX_FRAME_BYTES, MAX_HEADER_BYTES, parseFrames } from "./format.ts";
import { openJournalReader } from "./reader.ts";
import { listSegmentFiles, readHeader } from "./segments.ts";

/** What is where a journal shall be restored is another one, or lacks what the copy has. */
export class OtherJournal extends Error {}

/**
 * Gives the segments of `active` before the position `end` a second name in the folder `to` (a copy where
 * that is impossible), unless they are there. Segments never change: a repair replaces them.
 */
export async function linkSegments(active: string, to: string, end = Infinity) {
  for (const { path, base } of await listSegmentFiles(active, disk)) {
    const target = join(to, basename(path));
    // One that is gone was about to be deleted when segments began to be kept: the ledger's snapshot has it.
    if (base < end && (await disk.size(target)) === 0) await linkFile(path, target);
  }
}

/** Copies what `linkSegments` has not: newer segments, and the active file up to its last whole frame. */
export async function copyRest(active: string, to: string): Promise<void> {
  // Held by its descriptor: if it is renamed meanwhile, it is still the file after all segments before `base`.
  const base = await disk.withFile(active, async (file) => {
    const header = await readHeader(file);
    if (!header) return null;
    const copy = await disk.openForAppend(join(to, basename(active)));
    try {
      await copy.append(await file.read(0, header.bytes));
      for (let at = header.bytes; ;) {
        const bytes = await file.read(at, at + MAX_FRAME_BYTES + MAX_HEADER_BYTES);
        const { endIndex, rest } = parseFrames(bytes);
        if (endIndex > 0) await copy.append(bytes.subarray(0, endIndex));
        else if (typeof rest === "object" && rest.hasMore)
          throw new JournalDamage(active, at, rest.fault);
        else break;
        at += endIndex;
      }
      await copy.sync();
    } finally {
      await copy.close();
    }
    return header.base;
  });
  // In the moment in which a new file takes its name there is no active file: the segments are all.
  await linkSegments(active, to, base ?? Infinity);
  await disk.syncDirectory(to);
}

/**
 * Puts the copy of a journal at `copy` (its active file) into the place of `active`. Its files appear newest
 * first and each at once, so that a journal which begins too late, and nothing worse, is what a death in
 * between leaves; the next call continues. A journal that is there must be the same one, not behind the
 * copy, and gets the older segments that it lacks. Throws OtherJournal.
 */
export async function placeJournal(copy: string, active: string): Promise<void> {
  const given = await openJournalReader(copy);
  if (!given) return;
  const base = (await disk.withFile(copy, readHeader))?.base ?? (await given.end());
  const here = await openJournalReader(active);
  if (here) await requireSame(here.id, await here.end(), here.start);
  else if ((await disk.size(copy)) > 0) await copyFile(copy, active);
  await disk.syncDirectory(dirname(active));
  const segments = await listSegmentFiles(copy, disk);
  for (const { path, base } of segments.toReversed()) {
    if (base >= (here?.start ?? Infinity)) continue;
    await linkFile(path, join(dirname(active), basename(path)));
    await disk.syncDirectory(dirname(active));
  }

  async function requireSame(id: string, end: number, start: number) {
    const what = `${active} is there, and is `;
    if (id !== given?.id)
      throw new OtherJournal(`${what}journal ${id}, not ${given?.id} of the backup`);
    if (end < (await given.end()))
      throw new OtherJournal(
        `${what}behind the backup: it ends at position ${end}, the backup at ${await given.end()}`,
      );
    if (start > base)
      throw new OtherJournal(
        `${what}without the segments from position ${base} to ${start}, which no file of the backup holds whole`,
      );
  }
}
