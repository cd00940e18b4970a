/**
 * Admission control: what all requests hold in memory together, from the first byte of a body until
 * the answer, is bounded. Beyond the budget a request is rejected at once, so memory stays flat
 * however much faster senders are than the disk.
 */
import { freeBytes } from "../buffers.ts";
import { unavailable } from "./problem.ts";

/** Three bodies of 16 MiB, since one is held as received, decompressed and in the frame; and some. */
export const MAX_REQUESTS_BYTES = 56 * 1024 * 1024;
/** Reserved for small requests: a few slow senders of large bodies must not lock everybody out. */
const SMALL_REQUESTS_BYTES = 4 * 1024 * 1024;
/**
 * Force a collection after every 32 MiB released that were not freed: buffers look small to the collector, which
 * then waits too long (60 bodies of 16 MiB: 470 MB; forced: 240).
 */
const GARBAGE_BYTES = 32 * 1024 * 1024;
/** What a request costs besides its body. It bounds their number too, to 14,336. */
export const REQUEST_BYTES = 4096;

interface Budget {
  readonly bytes: number;
  usedBytes: number;
  garbageBytes: number;
}

/** What one request holds; `using` releases it. A class, since each request makes one: no closures. */
export class Reservation {
  private heldBytes = 0;
  private frameBytes = 0;

  constructor(private readonly budget: Budget) {}

  /** Adds `bytes` to the reservation. Throws the 503 when the budget is used up. */
  reserve(bytes: number): void {
    this.reserveUpTo(this.budget.bytes, bytes);
  }

  /** The same for a part of a large body, which leaves the share of small requests alone. */
  reserveLarge(bytes: number): void {
    this.reserveUpTo(this.budget.bytes - SMALL_REQUESTS_BYTES, bytes);
  }

  /** The same for the frame of a body, which the journal frees. */
  reserveFrame(bytes: number): void {
    this.reserveLarge(bytes);
    this.frameBytes += bytes;
  }

  /** Gives back a part of it. */
  release(bytes: number): void {
    this.budget.usedBytes -= bytes;
    this.heldBytes -= bytes;
  }

  /** Gives back what these bytes hold, which nobody reads any more, and their memory. */
  free(bytes: Uint8Array): void {
    if (freeBytes(bytes)) this.release(bytes.length);
  }

  [Symbol.dispose](): void {
    const { budget } = this;
    // Small requests are collected in time: at 50,000 a second, forced collections for them
    // took an eighth of the time.
    budget.garbageBytes += Math.max(0, this.heldBytes - this.frameBytes - REQUEST_BYTES);
    this.release(this.heldBytes);
    if (budget.garbageBytes < GARBAGE_BYTES) return;
    budget.garbageBytes = 0;
    Bun.gc(true);
  }

  private reserveUpTo(limitBytes: number, bytes: number): void {
    if (this.budget.usedBytes + bytes > limitBytes)
      throw unavailable("the server is overloaded; retry shortly");
    this.budget.usedBytes += bytes;
    this.heldBytes += bytes;
  }
}

export function openMemoryBudget(bytes = MAX_REQUESTS_BYTES) {
  const budget: Budget = { bytes, usedBytes: 0, garbageBytes: 0 };
  return {
    /** What all requests hold now. */
    usedBytes: () => budget.usedBytes,
    /** Admits a request. Throws the 503 when there are too many. */
    admit(): Reservation {
      const reservation = new Reservation(budget);
      reservation.reserve(REQUEST_BYTES);
      return reservation;
    },
  };
}
