/**
 * A disk in memory that behaves as disks do when the power fails. Unsynced pages are lost or kept, in any
 * order. A file whose name was not synced may be missing. Writes are cut short, or find no room. After a
 * failed sync the pages count as written, so that the next sync succeeds without writing them, as on Linux.
 * One seed determines everything.
 */
import type { Disk, JournalFile, ReadableFile } from "../../lib/journal/disk.ts";

const PAGE = 4096;

interface SimulatedFile {
  /** What programs read. */
  bytes: Buffer;
  /** What is on the platter, and survives a crash. */
  platter: Buffer;
  /** The pages that the next sync writes. */
  dirty: Set<number>;
}

/** A change of the directory: names that were given to files, or removed (`null`). */
type Naming = Map<string, SimulatedFile | null>;

export interface Odds {
  noRoom: number;
  failedSync: number;
  /** Of a truncation, a rename, a sync of the directory. */
  failedChange: number;
}

export const HARMLESS: Odds = { noRoom: 0, failedSync: 0, failedChange: 0 };

export class SimulatedDisk {
  private files = new Map<string, SimulatedFile>();
  /** The directory on the platter, and the changes since, in order. */
  private named = new Map<string, SimulatedFile>();
  private namings: Naming[] = [];
  /** Each crash ends a life: calls of an earlier life never settle. */
  private life = 0;
  private locked = -1;
  syncs = 0;

  constructor(
    private readonly random: () => number,
    readonly odds: Odds,
  ) {}

  /** The disk as one life of the program sees it. */
  mount(): Disk {
    const life = ++this.life;
    const alive = async <T>(act: () => T): Promise<T> => {
      // A crash may happen at any of these turns.
      for (let turns = Math.floor(this.random() * 3); turns >= 0; turns--) await Promise.resolve();
      if (life !== this.life) return new Promise<never>(() => {});
      return act();
    };
    const fail = (code: string) => Object.assign(new Error(code), { code });
    const readable = (file: SimulatedFile): ReadableFile => {
      const size = file.bytes.length;
      return {
        bytes: size,
        read: (from, to) => alive(() => Buffer.from(file.bytes.subarray(from, Math.min(to, size)))),
      };
    };
    const openForAppend = (path: string): JournalFile => {
      const file = this.files.get(path) ?? { bytes: empty, platter: empty, dirty: new Set() };
      if (!this.files.has(path)) this.name(new Map([[path, file]]));
      const write = (bytes: Uint8Array) => {
        const from = file.bytes.length;
        file.bytes = Buffer.concat([file.bytes, bytes]);
        for (let page = pageOf(from); page * PAGE < file.bytes.length; page++) file.dirty.add(page);
      };
      return {
        ...readable(file),
        append: (bytes) =>
          alive(() => {
            if (this.random() < this.odds.noRoom) {
              write(bytes.subarray(0, Math.floor(this.random() * bytes.length)));
              throw fail("ENOSPC");
            }
            write(bytes);
          }),
        sync: () =>
          alive(() => {
            this.syncs++;
            if (this.random() < this.odds.failedSync) {
              flush(file, () => this.random() < 0.5);
              throw fail("EIO");
            }
            flush(file);
          }),
        truncate: (bytes) =>
          alive(() => {
            if (this.random() < this.odds.failedChange) throw fail("EIO");
            if (bytes >= file.bytes.length) return;
            file.bytes = file.bytes.subarray(0, bytes);
            for (const page of file.dirty) if (page * PAGE >= bytes) file.dirty.delete(page);
          }),
        is: (path, bytes) => this.files.get(path) === file && file.bytes.length === bytes,
        close: () => alive(() => {}),
      };
    };
    const files = () => this.files;
    return {
      openForAppend: (path) => alive(() => openForAppend(path)),
      syncDirectory: () =>
        alive(() => {
          if (this.random() < this.odds.failedChange) throw fail("EIO");
          this.named = new Map(this.files);
          this.namings = [];
        }),
      makeDirectory: () => alive(() => {}),
      list: () => alive(() => [...this.files.keys()].map((path) => path.slice("data/".length))),
      rename: (from, to) =>
        alive(() => {
          if (this.random() < this.odds.failedChange) throw fail("EIO");
          const file = this.files.get(from);
          if (!file) throw fail("ENOENT");
          this.name(new Map<string, SimulatedFile | null>([[from, null]]).set(to, file));
        }),
      remove: (path) => alive(() => this.name(new Map([[path, null]]))),
      modifiedMs: () => alive(() => 0),
      size: (path) => alive(() => this.files.get(path)?.bytes.length ?? 0),
      async withFile(path, use) {
        const file = await alive(() => files().get(path));
        return file ? use(readable(file)) : null;
      },
      syncFile: (path) =>
        alive(() => {
          const file = this.files.get(path);
          if (file) flush(file);
        }),
      lock: () => {
        if (this.locked === life) return null;
        this.locked = life;
        return {
          release: () => {
            this.locked = -1;
          },
        };
      },
      now: () => 1_700_000_000_000 + this.syncs,
      turn: async () => {},
    };
  }

  /** The power fails. */
  crash(): void {
    this.life++;
    // Any of the changes of the directory since its last sync may have arrived.
    for (const naming of this.namings) if (this.random() < 0.5) apply(this.named, naming);
    this.files = new Map(this.named);
    this.namings = [];
    for (const file of new Set(this.files.values())) {
      file.bytes = file.platter = this.leftOf(file);
      file.dirty.clear();
    }
  }

  private name(naming: Naming): void {
    apply(this.files, naming);
    this.namings.push(naming);
  }

  /** What a crash leaves: any unsynced page may be kept, be zeros, or be missing at the end. */
  private leftOf({ bytes, platter, dirty }: SimulatedFile): Buffer {
    const longest = Math.max(bytes.length, platter.length);
    const shortest = Math.min(platter.length, bytes.length);
    const length = shortest + Math.floor(this.random() * (longest - shortest + 1));
    const left = Buffer.alloc(length);
    platter.copy(left, 0, 0, Math.min(length, platter.length));
    for (let page = 0; page < length; page += PAGE) {
      const end = Math.min(page + PAGE, length, bytes.length);
      if (end > page && dirty.has(pageOf(page)) && this.random() < 0.5)
        bytes.copy(left, page, page, end);
    }
    return left;
  }

  /** The files that are not empty, in the order of their names. */
  paths(): string[] {
    return [...this.files.keys()].filter((path) => this.files.get(path)?.bytes.length).toSorted();
  }

  /** Changes what is on the disk, as bit rot or an editor does. */
  change(path: string, change: (bytes: Buffer) => Buffer): void {
    const file = this.files.get(path);
    if (file) file.bytes = file.platter = change(Buffer.from(file.bytes));
  }
}

const empty = Buffer.alloc(0);
const pageOf = (byte: number) => Math.floor(byte / PAGE);

/** Writes the dirty pages for which `arrives` returns true to the platter. All are clean afterwards. */
function flush(file: SimulatedFile, arrives = () => true): void {
  const { bytes, platter, dirty } = file;
  const written = Buffer.alloc(bytes.length);
  platter.copy(written, 0, 0, Math.min(platter.length, bytes.length));
  for (const page of dirty)
    if (arrives()) bytes.copy(written, page * PAGE, page * PAGE, (page + 1) * PAGE);
  file.platter = written;
  dirty.clear();
}

function apply(directory: Map<string, SimulatedFile>, naming: Naming): void {
  for (const [path, file] of naming)
    if (file) directory.set(path, file);
    else directory.delete(path);
}
