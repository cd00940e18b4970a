/**
 * How long a body may take: it must not stand still for 30 s, and bring at least 1 kB/s over each minute. A
 * limit on the whole body would reject a large one on a slow link, again and again. One timer serves all
 * bodies: one for each took 5 % of the time of a small request.
 */
import { Problem } from "./problem.ts";

const STALL_MS = 30_000;
const WINDOW_MS = 60_000;
const MIN_WINDOW_BYTES = 60_000;
/** A small body is read in one go, so its progress is not seen: 64 KiB at 1 kB/s. */
const SMALL_MS = 66_000;
const LOOK_EVERY_MS = 1_000;

export type Arrival = ReturnType<ReturnType<typeof watchArrivals>["expect"]>;

/** Watches the bodies that are arriving. Rejects what is too slow with a 408. */
export function watchArrivals(nowMs = () => performance.now(), everyMs = LOOK_EVERY_MS) {
  const arriving = new Set<{ look(now: number): void }>();
  let timer: Timer | null = null;

  return {
    /**
     * What `reading` reads in one go: a small body, of which nobody will tell what has arrived. Rejects when it
     * is too slow. `Promise.race` would make two more promises for each request.
     */
    small<T>(reading: Promise<T>): Promise<T> {
      return new Promise((resolve, reject) => {
        const startMs = nowMs();
        const one = {
          look(now: number) {
            if (now - startMs <= SMALL_MS) return;
            arriving.delete(one);
            reject(tooSlow("did not arrive within a minute"));
          },
        };
        watch(one);
        reading.then(
          (body) => {
            arriving.delete(one);
            resolve(body);
          },
          (error) => {
            arriving.delete(one);
            reject(error);
          },
        );
      });
    },
    /** A body that begins to arrive. */
    expect() {
      let lastMs = nowMs();
      let windowMs = lastMs;
      let windowBytes = 0;
      const { promise, reject } = Promise.withResolvers<never>();
      promise.catch(() => {}); // the body may have failed in another way
      const late = (why: string) => reject(tooSlow(why));
      const one = {
        look(now: number) {
          if (now - lastMs > STALL_MS) late(`stood still for ${STALL_MS / 1000} s`);
          if (now - windowMs < WINDOW_MS) return;
          if (windowBytes < MIN_WINDOW_BYTES) late("brought less than 1 kB/s over a minute");
          windowMs = now;
          windowBytes = 0;
        },
      };
      watch(one);
      return {
        /** Rejects when the body is too slow. */
        tooSlow: promise,
        arrived(bytes: number) {
          lastMs = nowMs();
          windowBytes += bytes;
        },
        [Symbol.dispose]: () => void arriving.delete(one),
      };
    },
    look,
  };

  function watch(one: { look(now: number): void }) {
    arriving.add(one);
    timer ??= setInterval(look, everyMs);
  }

  function look() {
    const now = nowMs();
    for (const one of arriving) one.look(now);
    if (arriving.size > 0 || timer === null) return;
    clearInterval(timer);
    timer = null;
  }
}

function tooSlow(why: string): Problem {
  return new Problem(408, `the body ${why}; send it again`);
}
