/**
 * Reads a journal while it is being written, through all its files. A frame that is not complete, or does
 * not match its checksum yet, is the end for now. What cannot be read and has more after it is damage.
 *
 * At any moment the active file may be renamed to a segment, and a segment may be deleted. So each read
 * opens a file once, and takes header, length and frames from that descriptor: a rename changes nothing
 * for what is being read, and the next read finds the new file.
 */
import { disk as realDisk, type Disk, type ReadableFile } from "./disk.ts";
import {
  holdsFrame,
  isEventFile,
  isJournalPiece,
  JournalDamage,
  type JournalHeader,
  MAX_FRAME_BYTES,
  MAX_HEADER_BYTES,
  parseFrames,
  parseJournalHeader,
} from "./format.ts";
import {
  listSegmentFiles,
  openSegment,
  readSegment,
  type Segment,
  type SegmentFile,
} from "./segments.ts";

/** A chunk of the client, of up to 1 MiB, fits with its mark: else each is read twice, as a part and then whole. */
const BLOCK_BYTES = 1088 * 1024;
/** The largest frame fits. */
const MAX_BLOCK_BYTES = MAX_FRAME_BYTES + MAX_HEADER_BYTES;

/** A whole frame: `from` and `to` are positions of the journal, `header` lacks its newline. */
export interface Frame {
  from: number;
  to: number;
  header: string;
  payload: Buffer;
  /** When it was written, in milliseconds since 1970. */
  atMs: number;
}

export interface JournalReader {
  /** The id of the journal. */
  readonly id: string;
  /** The position of the first byte that is kept: 0, unless old segments were removed. */
  readonly start: number;
  /**
   * The whole frames from `position` on, as many as one read returns; none when there is nothing new.
   * Throws JournalDamage, or an Error when the file was replaced.
   */
  read(position: number): Promise<Frame[]>;
  /**
   * The position after the last byte that is there now, whole frame or not. In a stream, one before `expected`
   * only if it stays so: a leader that was cut off from the other nodes answers for some seconds, and does not
   * know what they have.
   */
  end(expected?: number): Promise<number>;
  /** Returns once everything that could be read so far is on the disk. */
  sync(): Promise<void>;
  /**
   * What an operator without a newer copy can do after an older one was restored. If it `hasGrown` since, it holds
   * new events at positions that the ledger has already posted.
   */
  remedy(hasGrown: boolean): string;
}

/** Where journals are: the files of a folder, which hold one, or a stream, which holds those of all servers. */
export interface Journals {
  /** For messages. */
  readonly name: string;
  /** Opens the journal with this id (in files, the one that is there); `null` when there is none (yet). */
  open(id: string): Promise<JournalReader | null>;
  /** Where each journal ends, by id. */
  ends(): Promise<Map<string, number>>;
}

/** The journal whose active file is `path`. */
export function fileJournals(path: string): Journals {
  return {
    name: path,
    open: () => openJournalReader(path),
    async ends() {
      const journal = await openJournalReader(path);
      return new Map(journal ? [[journal.id, await journal.end()]] : []);
    },
  };
}

/** Opens the journal whose active file is `path`; `null` when that is not a journal (yet). */
export async function openJournalReader(
  path: string,
  disk: Disk = realDisk,
): Promise<JournalReader | null> {
  const found = await findFiles(path, disk);
  if (!found) return null;
  const { id, start } = found;
  let { files } = found;

  return {
    id,
    start,
    sync: () => disk.syncFile(path),
    // Where the copy ended is unknown, so its new events cannot be told apart from those that were posted.
    remedy: (hasGrown) =>
      hasGrown
        ? "stop the server, move this journal's files to another folder, run bun run processor.ts --retire " +
          `journal:${id} --yes, and start again; the events accepted since the restore are then only in those files, so send them again`
        : "stop the server and run bun run processor.ts --check --repair, which marks what is missing as lost",
    async end() {
      for (;;) {
        const end = await withActive((file, { base }) => base + file.bytes);
        if (end !== null) return end;
        const last = (await listSegmentFiles(path, disk)).at(-1);
        if (!last) throw replaced();
        const segment = await openSegment(last, disk);
        if (segment) return segment.to;
      }
    },
    async read(position) {
      for (;;) {
        let activeBase: number | null = null;
        // A segment that another one follows needs no look at the active file, and no new list: with a
        // list for each, a reader a few thousand small segments back never caught up.
        if (indexOf(position) === files.length - 1) {
          const found = await withActive(async (file, header) => {
            const active = { ...header, path, to: Infinity, headerBytes: header.bytes };
            return active.base <= position ? await readFrames(file, active, position) : active.base;
          });
          if (Array.isArray(found)) return found;
          activeBase = found;
          files = await listSegmentFiles(path, disk);
        }
        const frames = await readSegmentAt(position, activeBase);
        if (frames) return frames;
        files = []; // the segment was deleted since it was listed
      }
    },
  };

  /** Index of the last segment that begins at or before `position`; -1 if there is none. */
  function indexOf(position: number): number {
    return files.findLastIndex(({ base }) => base <= position);
  }

  /** What `use` returns for the active file; `null` in the moment in which a new one takes its name. */
  function withActive<T>(use: (file: ReadableFile, header: JournalHeader) => T | Promise<T>) {
    return disk.withFile(path, async (file) => {
      const header = await readActiveHeader(path, file);
      if (header === "events") throw headerDamage(path);
      if (header && header.id !== id) throw replaced();
      return header && (await use(file, header));
    });
  }

  /** The frames from `position` on in its segment; `null` if that was deleted. */
  async function readSegmentAt(position: number, activeBase: number | null) {
    const index = indexOf(position);
    const file = files[index];
    if (files.length === 0 && activeBase === null) throw replaced();
    if (!file) throw missing(path, 0, position);
    const nextBase = files[index + 1]?.base ?? activeBase;
    return disk.withFile(file.path, async (opened) => {
      const segment = await readSegment(file, opened);
      if (segment.id !== id) throw new JournalDamage(file.path, 0, "it belongs to another journal");
      if (nextBase !== null && nextBase !== segment.to) {
        const what = `the next file begins at position ${nextBase}`;
        throw new JournalDamage(file.path, opened.bytes, what);
      }
      if (position > segment.to) throw missing(file.path, opened.bytes, position);
      return readFrames(opened, segment, position);
    });
  }

  function missing(path: string, offset: number, position: number): JournalDamage {
    return new JournalDamage(path, offset, `no file of this journal holds position ${position}`);
  }

  function replaced(): Error {
    return new Error(`${path} was replaced by another journal`);
  }
}

/** The same for a file that a person names: it may be one of events, with lines that look like frames. */
export async function openNamedJournal(path: string): Promise<JournalReader | null> {
  const head = await realDisk.withFile(path, (file) => file.read(0, 2 * MAX_HEADER_BYTES));
  return head && isEventFile(head) ? null : await openJournalReader(path);
}

/** What keeps a file that a person names from being read, if it is of a journal; `null` if nothing does. */
export async function explainPiece(
  path: string,
  { head, isCompressed }: { head: Buffer; isCompressed: boolean },
): Promise<string | null> {
  if (isCompressed)
    return parseJournalHeader(head) || isJournalPiece(head)
      ? "this is a compressed journal: decompress it, and name the plain file"
      : null;
  const bytes = await realDisk.withFile(path, (file) => file.read(0, MAX_BLOCK_BYTES));
  return bytes && isJournalPiece(bytes)
    ? "this is a piece of a journal: it begins with a frame instead of the journal's header; name the whole journal"
    : null;
}

/** The id of the journal, where it begins, and its segments; `null` when it is not one (yet). */
async function findFiles(
  path: string,
  disk: Disk,
): Promise<{ id: string; start: number; files: SegmentFile[] } | null> {
  // The active file first: if it is renamed in between, the list has it under its new name.
  const active = await disk.withFile(path, (file) => readActiveHeader(path, file));
  if (active === "events") return null;
  const files = await listSegmentFiles(path, disk);
  const lastFile = files.at(-1);
  const last = lastFile && (await openSegment(lastFile, disk));
  if (last === null) return findFiles(path, disk);
  const id = active?.id ?? last?.id;
  if (!id) return null;
  const isRenamed = files.some(({ base }) => base === active?.base);
  if (active && last && !isRenamed && (last.id !== id || last.to !== active.base)) {
    const what = `the file before it is ${last.path}, which ends at position ${last.to}`;
    throw new JournalDamage(path, 0, what);
  }
  return { id, start: files[0]?.base ?? active?.base ?? 0, files };
}

/** The header of the active file: `null` while it is being created, "events" for a file of mere events. */
async function readActiveHeader(
  path: string,
  file: ReadableFile,
): Promise<JournalHeader | "events" | null> {
  const head = await file.read(0, 2 * MAX_HEADER_BYTES);
  const header = parseJournalHeader(head);
  if (!header && holdsFrame(head)) throw headerDamage(path);
  return header ?? (head.includes("\n") ? "events" : null);
}

/**
 * Reads the frames from `position` on, at most a block of them, or one that is larger. The active file
 * is a segment without an end.
 */
async function readFrames(file: ReadableFile, segment: Segment, position: number) {
  const { path, base, to, headerBytes } = segment;
  const from = Math.max(position - base, headerBytes);
  for (let block = BLOCK_BYTES; ; block = Math.min(2 * block, MAX_BLOCK_BYTES)) {
    const bytes = await file.read(from, from + block);
    const { frames, endIndex, rest } = parseFrames(bytes);
    if (frames.length > 0)
      return frames.map(({ fromIndex, toIndex, ...frame }): Frame => {
        const begin = base + from;
        return { from: begin + fromIndex, to: begin + toIndex, ...frame };
      });
    if (rest !== "nothing" && bytes.length === block && block < MAX_BLOCK_BYTES) continue;
    const { fault, hasMore } =
      typeof rest === "object" ? rest : { fault: "a frame is cut short", hasMore: false };
    // All that is in a segment was acknowledged.
    if (hasMore || (to < Infinity && base + from + bytes.length > position))
      throw new JournalDamage(path, from + endIndex, fault);
    return [];
  }
}

function headerDamage(path: string): JournalDamage {
  return new JournalDamage(path, 0, "it does not begin with the header of a journal");
}
