/**
 * Room for postings on a disk that the embedded Postgres shares with the journal. Just after a checkpoint
 * of Postgres, each row that changes can add a whole page to its write-ahead log (200,000 users among 10
 * million: 421 MB). A Postgres without room for that log goes down, and reads with it. So batches become
 * smaller as the disk fills, and posting pauses before the last of the room is used.
 */
import { dirname } from "node:path";

import { diskSpace, reservedBytes } from "../journal/disk.ts";
import type { Database } from "../ledger/database.ts";
import { readLedgerBytes } from "../ledger/ledger.ts";

const PAGE_BYTES = 8192;
/** A new user with a long id, in the table, its index, and the log of both. */
const ROW_BYTES = 2048;
/** The same for a batch, as a multiple of its lines in the journal. */
const GROWTH = 8;
const MIB = 1024 * 1024;

/** Posting pauses until the disk has more room. */
export class DiskFull extends Error {}

export interface Room {
  /** How many users the next batch may change, while the one before may still be using its part. */
  maxUsers(): Promise<number>;
  /** Throws DiskFull or Unavailable unless `rows` can be changed, which `bytes` of lines name. */
  require(rows: number, bytes: number): Promise<void>;
}

/** The room on the disk of `path`, the folder of the embedded Postgres. */
export function openRoom(path: string, database: Database): Room {
  return {
    async maxUsers() {
      const room = roomOn(path) / 4; // the batch before is being posted, and this one may grow by a frame
      const users = room / (PAGE_BYTES + ROW_BYTES);
      if (users > 1_000_000) return Infinity;
      // A table that is smaller than that has fewer pages to log.
      return Math.max(users, (room - (await readLedgerBytes(database))) / ROW_BYTES);
    },
    async require(rows, bytes) {
      const room = roomOn(path);
      const added = Math.min(rows * ROW_BYTES, bytes * GROWTH);
      if (rows * PAGE_BYTES + added <= room) return;
      const needed = Math.min(rows * PAGE_BYTES, await readLedgerBytes(database)) + added;
      if (needed <= room) return;
      const free = Math.ceil((needed + keptOf(diskSpace(path).size)) / MIB);
      throw new DiskFull(
        `the disk of ${dirname(path)} is nearly full: posting needs ${free} MiB of free space there`,
      );
    },
  };
}

/** What postings may use. */
function roomOn(path: string): number {
  const { free, size } = diskSpace(path);
  return size === 0 ? Infinity : Math.max(0, free - keptOf(size));
}

/** Half of what the journal leaves free is for Postgres' own work. */
function keptOf(size: number): number {
  return reservedBytes(size) / 2;
}
