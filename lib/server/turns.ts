/**
 * Long work in slices, so that no request delays another: after a slice it waits until the event loop has
 * served what is ready. One slice runs in each turn of the loop, however many bodies there are. Without
 * it, 16 kB of gzip (8,388,608 bad lines) stopped all answers for 8.6 s.
 */

/** The work between two turns, in bytes of events in their usual form: about 4 ms. */
export const SLICE_WORK = 512 * 1024;

const waiting: (() => void)[] = [];

/** Returns in a turn of its own. */
export function nextTurn(): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>();
  if (waiting.push(resolve) === 1) setImmediate(run);
  return promise;
}

function run(): void {
  waiting[0]?.();
  waiting.shift();
  if (waiting.length > 0) setImmediate(run);
}

/** Returns a function that does at most `most` pieces of work at a time, in the order of its calls. */
export function atMost(most: number) {
  const waiting: (() => void)[] = [];
  let running = 0;
  return async <T>(work: () => Promise<T>): Promise<T> => {
    if (running < most) running++;
    else await new Promise<void>((resolve) => waiting.push(resolve));
    try {
      return await work();
    } finally {
      const next = waiting.shift();
      if (next) next();
      else running--;
    }
  };
}
