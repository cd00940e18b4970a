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

/** What one request holds; `using` releases it. */
export type Reservation = ReturnType<ReturnType<typeof openMemoryBudget>["admit"]>;

export function openMemoryBudget(budgetBytes = MAX_REQUESTS_BYTES) {
  let usedBytes = 0;
  let garbageBytes = 0;
  return {
    /** What all requests hold now. */
    usedBytes: () => usedBytes,
    /** Admits a request. Throws the 503 when there are too many. */
    admit() {
      let heldBytes = 0;
      let frameBytes = 0;
      const reserve = (bytes: number, limitBytes: number) => {
        if (usedBytes + bytes > limitBytes)
          throw unavailable("the server is overloaded; retry shortly");
        usedBytes += bytes;
        heldBytes += bytes;
      };
      const release = (bytes: number) => {
        usedBytes -= bytes;
        heldBytes -= bytes;
      };
      reserve(REQUEST_BYTES, budgetBytes);
      return {
        /** Adds `bytes` to the reservation. Throws the 503 when the budget is used up. */
        reserve: (bytes: number) => reserve(bytes, budgetBytes),
        /** The same for a part of a large body, which leaves the share of small requests alone. */
        reserveLarge: (bytes: number) => reserve(bytes, budgetBytes - SMALL_REQUESTS_BYTES),
        /** The same for the frame of a body, which the journal frees. */
        reserveFrame(bytes: number) {
          reserve(bytes, budgetBytes - SMALL_REQUESTS_BYTES);
          frameBytes += bytes;
        },
        /** Gives back a part of it. */
        release,
        /** Gives back what these bytes hold, which nobody reads any more, and their memory. */
        free(bytes: Uint8Array) {
          if (freeBytes(bytes)) release(bytes.length);
        },
        [Symbol.dispose]() {
          usedBytes -= heldBytes;
          // Small requests are collected in time: at 50,000 a second, forced collections for them
          // took an eighth of the time.
          garbageBytes += Math.max(0, heldBytes - frameBytes - REQUEST_BYTES);
          heldBytes = 0;
          if (garbageBytes < GARBAGE_BYTES) return;
          garbageBytes = 0;
          Bun.gc(true);
        },
      };
    },
  };
}
