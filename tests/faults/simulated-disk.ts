/**
 * A disk in memory that does what disks do when the power fails: what was not synced is lost page by
 * page, out of order, or stays; a file whose name was not synced may be gone; writes are cut short,
 * there is no room, a sync fails and forgets what it should have written: the next one then succeeds
 * and has written nothing, as Linux has it. All by one seed.
 */
import type { Disk, JournalFile, ReadableFile } from "../../lib/journal/disk.ts";

const PAGE = 4096;

/** Numbers from 0 to 1, the same for the same seed (mulberry32). */
export function randomOf(seed: number): () => number {
  let state = seed | 0;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

interface SimulatedFile {
  /** What a program reads. */
  bytes: Buffer;
  /** What is on the platter: survives the crash for sure. */
  platter: Buffer;
  /** The pages that the next sync writes. */
  dirty: Set<number>;
}

/** What was done to the directory: a file got a name, or (`null`) a name was taken away. */
type Naming = Map<string, SimulatedFile | null>;

export interface Odds {
  noRoom: number;
  failedSync: number;
  /** Of a cut, a rename, a sync of the directory. */
  failedChange: number;
}

export const HARMLESS: Odds = { noRoom: 0, failedSync: 0, failedChange: 0 };

export class SimulatedDisk {
  private files = new Map<string, SimulatedFile>();
  /** The directory as it is on the platter, and what was done to it since, in order. */
  private named = new Map<string, SimulatedFile>();
  private namings: Naming[] = [];
  /** Each crash ends a life: calls that belong to an earlier one never come back. */
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
      // Somewhere in between is the moment at which a crash may come.
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
    };
  }

  /** The power fails. */
  crash(): void {
    this.life++;
    // Of what was done to the directory since its last sync, anything may have arrived.
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

  /** Of what was not synced, any page may be there, or zeros, or be missing at the end. */
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

  /** The files that have something in them, in the order of their names. */
  paths(): string[] {
    return [...this.files.keys()].filter((path) => this.files.get(path)?.bytes.length).toSorted();
  }

  /** Changes what is on the disk, as rot or a person does. */
  change(path: string, change: (bytes: Buffer) => Buffer): void {
    const file = this.files.get(path);
    if (file) file.bytes = file.platter = change(Buffer.from(file.bytes));
  }
}

const empty = Buffer.alloc(0);
const pageOf = (byte: number) => Math.floor(byte / PAGE);

/** Writes the dirty pages to the platter, those that `arrives` lets; clean are then all of them. */
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
