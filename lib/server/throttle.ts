/**
 * Slows down who presents wrong secrets: an address has some failures free, and then so many each
 * second. Only failures wait. A team behind one load balancer is one address, and somebody's wrong
 * secret must not shut out the others.
 */

/** The pace of failures from one address, and how many may come at once before it holds. */
const EVERY_MS = 100;
const FREE = 100;
/** Nobody waits longer: who sends that much has that many connections open. */
const MAX_MS = 5_000;
/** Memory is bounded: of so many addresses, and so many who wait. */
const MAX_ADDRESSES = 10_000;
const MAX_WAITING = 1_000;

export interface Throttle {
  /** Returns when a failure of `address` may be answered; `false`: not at all, too many wait. */
  failed(address: string): Promise<boolean>;
}

export function openThrottle(now: () => number = () => performance.now()): Throttle {
  /** When the pace of each address allows for all its failures so far. */
  const paidMs = new Map<string, number>();
  let waiting = 0;

  return {
    async failed(address) {
      const nowMs = now();
      const free = nowMs - FREE * EVERY_MS;
      const paid = Math.max(paidMs.get(address) ?? free, free) + EVERY_MS;
      // No more debt than is ever waited for, or a flood would be felt long after it.
      paidMs.delete(address); // to the end of the Map: the last to be forgotten
      paidMs.set(address, Math.min(paid, nowMs + MAX_MS));
      const [oldest] = paidMs.keys();
      if (paidMs.size > MAX_ADDRESSES && oldest !== undefined) paidMs.delete(oldest);
      if (paid <= nowMs) return true;
      if (waiting >= MAX_WAITING) return false;
      waiting++;
      await Bun.sleep(Math.min(paid - nowMs, MAX_MS));
      waiting--;
      return true;
    },
  };
}
