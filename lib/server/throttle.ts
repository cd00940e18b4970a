/**
 * Slows down callers that present wrong credentials. Each address has some failures free; further
 * ones are paced. Only failures wait: a team behind one load balancer shares an address, and one
 * wrong secret must not lock out the others.
 */

/** The pace of failures from one address, and how many it may make at once before the pace holds. */
const FAILURE_MS = 100;
const FREE_FAILURES = 100;
const MAX_DELAY_MS = 5_000;
const MAX_ADDRESSES = 10_000;
/** Waiting requests hold connections and memory. */
const MAX_WAITING = 1_000;

/** `now` and `sleep` count milliseconds: a test passes its own. */
export function openThrottle({
  now = () => performance.now(),
  sleep = (ms: number) => Bun.sleep(ms),
} = {}) {
  /** By address, the time by which the pace allows for all its failures so far. */
  const allowedMs = new Map<string, number>();
  let waiting = 0;

  return {
    /** Returns when a failure of `address` may be answered; `false` when too many wait already. */
    async failed(address: string): Promise<boolean> {
      const nowMs = now();
      const earliestMs = nowMs - FREE_FAILURES * FAILURE_MS;
      const dueMs = Math.max(allowedMs.get(address) ?? earliestMs, earliestMs) + FAILURE_MS;
      allowedMs.delete(address); // moves it to the end of the Map, so it is evicted last
      // Capped, or a flood would be felt long after it ended.
      allowedMs.set(address, Math.min(dueMs, nowMs + MAX_DELAY_MS));
      const [oldest] = allowedMs.keys();
      if (allowedMs.size > MAX_ADDRESSES && oldest !== undefined) allowedMs.delete(oldest);
      if (dueMs <= nowMs) return true;
      if (waiting >= MAX_WAITING) return false;
      waiting++;
      await sleep(Math.min(dueMs - nowMs, MAX_DELAY_MS));
      waiting--;
      return true;
    },
  };
}
