/**
 * Reads a journal while it is being written, through all its files. A frame that is not all there,
 * or does not fit its checksum yet, is the end for now; what lies behind more bytes and cannot be
 * read is damage.
 *
 * The active file may become a segment at any moment, and another one take its name. So its header is
 * looked at before and after each read: the same base means that it was the same file all along.
 */
import { disk as realDisk, type Disk } from "./disk.ts";
import {
  type Frame,
  holdsFrame,
  JournalDamage,
  type JournalHeader,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  parseFrames,
  parseJournalHeader,
} from "./format.ts";
import { listSegmentFiles, openSegment, type Segment, type SegmentFile } from "./segments.ts";

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
  const head = await readHead();
  const active = headerOf(head);
  // A file of mere events, whatever is called like a segment beside it.
  if (!active && head.includes("\n")) return null;
  let files = await listSegmentFiles(path, disk);
  const lastFile = files.at(-1);
  const last = lastFile && (await openSegment(lastFile, disk));
  if (last === null) return openJournalReader(path, disk);
  id = active?.id ?? last?.id;
  if (!id) return null;
  const isRenamed = files.some(({ base }) => base === active?.base);
  if (active && last && !isRenamed && (last.id !== id || last.to !== active.base))
    throw new JournalDamage(
      path,
      0,
      `the file before it is ${last.path}, which ends at ${last.to}`,
    );
  const start = files[0]?.base ?? active?.base ?? 0;
  let segment: Segment | undefined;

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
        if (before || after) continue;
        const last = (await listSegmentFiles(path, disk)).at(-1);
        if (!last) throw notHere();
        const segment = await openSegment(last, disk);
        if (segment) return segment.to;
      }
    },
    async read(position) {
      let wanted = BLOCK_BYTES;
      for (;;) {
        const place = await find(position);
        const from = Math.max(position - place.base, place.headerBytes);
        const bytes = await disk.read(place.path, from, from + wanted);
        if (!place.to && (await readHeader())?.base !== place.base) continue;
        if (place.to && bytes.length === 0 && position < place.to) {
          segment = undefined; // let go of since it was found
          files = [];
          continue;
        }
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
    if (segment && segment.base <= position && position < segment.to) return segment;
    const active = await readHeader();
    if (active && active.base <= position)
      return { path, base: active.base, headerBytes: active.bytes };
    // The last file of a list may not be the last any more. To look each time what there is took longer
    // than to post it: behind a few thousand small files nobody caught up.
    const isBefore = ({ base }: SegmentFile) => base <= position;
    if (files.findLastIndex(isBefore) === files.length - 1)
      files = await listSegmentFiles(path, disk);
    if (files.length === 0 && !active) throw notHere();
    const at = files.findLastIndex(isBefore);
    const file = files[at];
    const opened = file && (await openSegment(file, disk));
    if (opened === null) {
      files = [];
      return find(position);
    }
    const next = files[at + 1]?.base ?? active?.base ?? 0;
    if (opened && opened.id !== id)
      throw new JournalDamage(opened.path, 0, "it belongs to another journal");
    if (opened && next > opened.base && next !== opened.to) {
      const end = opened.to - opened.base;
      throw new JournalDamage(opened.path, end, `the next file begins at position ${next}`);
    }
    segment = opened;
    // At its end and no active file: that is just being made.
    if (segment && position < segment.to + (active ? 0 : 1)) return segment;
    const what = `no file of this journal holds its position ${position}`;
    throw new JournalDamage(segment?.path ?? path, segment ? segment.to - segment.base : 0, what);
  }

  /** The header of the active file, `null` for the moment in which one takes the place of another. */
  async function readHeader(): Promise<JournalHeader | null> {
    return headerOf(await readHead());
  }

  function readHead(): Promise<Buffer> {
    return disk.read(path, 0, 2 * MAX_HEADER_BYTES);
  }

  function headerOf(head: Buffer): JournalHeader | null {
    const header = parseJournalHeader(head);
    // Whole frames, too, may lie in another journal, at the same place.
    if (header && id && header.id !== id) throw notHere();
    // A file that is just being made has no whole line yet, one of mere events has no frames.
    if (!header && (id ? head.includes("\n") : holdsFrame(head)))
      throw new JournalDamage(path, 0, "it does not begin with the header of a journal");
    return header;
  }

  function notHere(): Error {
    return new Error(`${path} is not the journal any more that it was`);
  }
}
