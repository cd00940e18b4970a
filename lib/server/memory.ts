/**
 * Room for requests: all that they hold in memory together, from the first byte of a body until the
 * answer, is bounded. Past the bound a request is refused at once, so that memory stays flat however
 * much more comes than the disk takes.
 */
import { unavailable } from "./problem.ts";

/** The largest body as it came, decompressed, and in the journal's frame: 3 of 16 MiB, and some. */
const ROOM_BYTES = 56 * 1024 * 1024;
/** Kept for small requests: some slow senders of large bodies must not shut out everybody. */
const RESERVE_BYTES = 4 * 1024 * 1024;
/**
 * After so much has been let go of, it is collected. Left to itself the collector comes late, for to
 * it a buffer is a small object: 60 bodies of 16 MiB then took 470 MB, so they take 240.
 */
const GARBAGE_BYTES = 16 * 1024 * 1024;
/** What a request costs besides its body: so their number is bounded too, to 14,336. */
const REQUEST_BYTES = 4096;

/** What one request holds; `using` gives it back. */
export interface Hold {
  /** Takes room for so many bytes more; throws the 503 when there is none. */
  take(bytes: number): void;
  /** The same for a part of a large body. */
  takeLarge(bytes: number): void;
  [Symbol.dispose](): void;
}

export function openRoom(roomBytes = ROOM_BYTES): { enter(): Hold } {
  let takenBytes = 0;
  let garbageBytes = 0;
  return {
    enter() {
      let heldBytes = 0;
      const take = (bytes: number, mostBytes: number) => {
        if (takenBytes + bytes > mostBytes)
          throw unavailable("more comes in than the disk takes; try again in a moment");
        takenBytes += bytes;
        heldBytes += bytes;
      };
      const hold: Hold = {
        take: (bytes) => take(bytes, roomBytes),
        takeLarge: (bytes) => take(bytes, roomBytes - RESERVE_BYTES),
        [Symbol.dispose]() {
          takenBytes -= heldBytes;
          // Without what small requests cost besides: they are collected in time, and at 50,000 a
          // second a forced collection for them took an eighth of the time.
          garbageBytes += Math.max(0, heldBytes - REQUEST_BYTES);
          heldBytes = 0;
          if (garbageBytes < GARBAGE_BYTES) return;
          garbageBytes = 0;
          Bun.gc(true);
        },
      };
      hold.take(REQUEST_BYTES);
      return hold;
    },
  };
}
