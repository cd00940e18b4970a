/**
 * Reads a journal while it is being written. A frame that is not all there, or does not fit its
 * checksum yet, is the end for now; what lies behind more bytes and cannot be read is damage.
 */
import { disk as realDisk, type Disk } from "./journal-disk.ts";
import {
  type Frame,
  JournalDamage,
  type JournalHeader,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  parseFrames,
  parseJournalHeader,
} from "./journal-frame.ts";

const BLOCK_BYTES = 1024 * 1024;

export interface JournalReader {
  /** Names the journal. */
  readonly id: string;
  /** The position of the first frame. */
  readonly start: number;
  /**
   * The whole frames from `position` on, as many as one read brings, with positions of the
   * journal; none when there is nothing new. Throws JournalDamage, or when the file is replaced.
   */
  read(position: number): Promise<Frame[]>;
  /** The position behind the last byte that is there now, whole frame or not. */
  end(): Promise<number>;
  /** Returns once all that could be read so far is on the disk. */
  sync(): Promise<void>;
}

/** Opens the journal file `path`, or returns `null` when it is not (yet) one. */
export async function openJournalReader(
  path: string,
  disk: Disk = realDisk,
): Promise<JournalReader | null> {
  const header = await readJournalHeader(path, disk);
  if (!header) return null;
  const { id, base } = header;

  return {
    id,
    start: base + header.bytes,
    end: async () => base + (await disk.size(path)),
    sync: () => disk.syncFile(path),
    async read(position) {
      const from = position - base;
      let wanted = BLOCK_BYTES;
      for (;;) {
        const bytes = await disk.read(path, from, from + wanted);
        // Somebody may have put another journal in its place: whole frames, too, may lie there.
        if ((await readJournalHeader(path, disk))?.id !== id)
          throw new Error(`${path} is not the journal any more that it was`);
        const { frames, end, rest } = parseFrames(bytes);
        if (frames.length > 0)
          return frames.map((frame) => ({
            ...frame,
            from: position + frame.from,
            to: position + frame.to,
          }));
        const all = MAX_FRAME_BYTES + MAX_HEADER_BYTES;
        if (rest !== "nothing" && bytes.length === wanted && wanted < all) {
          wanted = Math.min(2 * wanted, all);
          continue;
        }
        if (typeof rest === "object" && rest.behind)
          throw new JournalDamage(path, from + end, rest.fault);
        return [];
      }
    },
  };
}

/** The header of `path` where it is a journal file, else `null`. */
export async function readJournalHeader(
  path: string,
  disk: Disk = realDisk,
): Promise<JournalHeader | null> {
  return parseJournalHeader(await disk.read(path, 0, MAX_HEADER_BYTES));
}
