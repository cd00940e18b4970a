/**
 * Reads a journal while it is being written, through all its files. A frame that is not all there,
 * or does not fit its checksum yet, is the end for now; what lies behind more bytes and cannot be
 * read is damage.
 *
 * The active file may become a segment at any moment, and another one take its name. So its header is
 * looked at before and after each read: the same base means that it was the same file all along.
 */
import { disk as realDisk, type Disk } from "./journal-disk.ts";
import {
  findFrame,
  type Frame,
  JournalDamage,
  type JournalHeader,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  parseFrames,
  parseJournalHeader,
} from "./journal-frame.ts";
import { listSegments } from "./journal-segments.ts";

const BLOCK_BYTES = 1024 * 1024;

export interface JournalReader {
  /** Names the journal. */
  readonly id: string;
  /** The position of the first byte that is kept: 0, unless old segments were removed. */
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

/** Where a position is: a segment has an end that stays. */
interface Place {
  path: string;
  base: number;
  headerBytes: number;
  to?: number;
}

/** Opens the journal whose active file is `path`, or returns `null` when it is not (yet) one. */
export async function openJournalReader(
  path: string,
  disk: Disk = realDisk,
): Promise<JournalReader | null> {
  let id: string | undefined;
  // In this order: what is renamed in between is then found by its new name.
  const active = await readHeader();
  const segments = await listSegments(path, disk);
  id = active?.id ?? segments.at(-1)?.id;
  if (!id) return null;
  const last = segments.at(-1);
  const isRenamed = segments.some(({ base }) => base === active?.base);
  if (active && last && !isRenamed && (last.id !== id || last.to !== active.base))
    throw new JournalDamage(
      path,
      0,
      `the file before it is ${last.path}, which ends at ${last.to}`,
    );
  const start = segments[0]?.base ?? active?.base ?? 0;
  let segment: Place | undefined;

  return {
    id,
    start,
    sync: () => disk.syncFile(path),
    async end() {
      for (;;) {
        const before = await readHeader();
        const size = await disk.size(path);
        const after = await readHeader();
        if (before && before.base === after?.base) return before.base + size;
        const last = (await listSegments(path, disk)).at(-1);
        if (!before && !after && last) return last.to;
        if (!before && !after) throw notHere();
      }
    },
    async read(position) {
      let wanted = BLOCK_BYTES;
      for (;;) {
        const place = await find(position);
        const from = Math.max(position - place.base, place.headerBytes);
        const bytes = await disk.read(place.path, from, from + wanted);
        if (!place.to && (await readHeader())?.base !== place.base) continue;
        const { frames, end, rest } = parseFrames(bytes);
        const begin = place.base + from;
        if (frames.length > 0)
          return frames.map((frame) => ({
            ...frame,
            from: begin + frame.from,
            to: begin + frame.to,
          }));
        const all = MAX_FRAME_BYTES + MAX_HEADER_BYTES;
        if (rest !== "nothing" && bytes.length === wanted && wanted < all) {
          wanted = Math.min(2 * wanted, all);
          continue;
        }
        const fault = typeof rest === "object" ? rest.fault : "a frame is cut short";
        const behind = typeof rest === "object" ? rest.behind : false;
        if (behind || (place.to && begin + bytes.length > position))
          throw new JournalDamage(place.path, from + end, fault);
        return [];
      }
    },
  };

  async function find(position: number): Promise<Place> {
    if (segment?.to && segment.base <= position && position < segment.to) return segment;
    const active = await readHeader();
    if (active && active.base <= position)
      return { path, base: active.base, headerBytes: active.bytes };
    const segments = await listSegments(path, disk);
    if (segments.length === 0 && !active) throw notHere();
    segment = segments.findLast(({ base }) => base <= position);
    // At its end and no active file: that is just being made.
    if (segment?.to && position < segment.to + (active ? 0 : 1)) return segment;
    const at = segment?.to ? segment.to - segment.base : 0;
    const what = `no file of this journal holds its position ${position}`;
    throw new JournalDamage(segment?.path ?? path, at, what);
  }

  /** The header of the active file, `null` for the moment in which one takes the place of another. */
  async function readHeader(): Promise<JournalHeader | null> {
    const head = await disk.read(path, 0, 2 * MAX_HEADER_BYTES);
    const header = parseJournalHeader(head);
    // Whole frames, too, may lie in another journal, at the same place.
    if (header && id && header.id !== id) throw notHere();
    // A file that is just being made has no whole line yet, one of mere events has no frames.
    if (!header && (id ? head.includes("\n") : findFrame(head) >= 0))
      throw new JournalDamage(path, 0, "it does not begin with the header of a journal");
    return header;
  }

  function notHere(): Error {
    return new Error(`${path} is not the journal any more that it was`);
  }
}
