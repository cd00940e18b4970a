/** How long a body may take to arrive, on a clock of its own. */
import { expect, test } from "bun:test";

import { watchArrivals } from "../../lib/server/arrivals.ts";

/** A body that brings `bytes` every `everyS` seconds for `seconds`; returns when it is rejected, and why. */
async function arrive(options: {
  bytes: number;
  everyS: number;
  seconds: number;
  isSmall?: boolean;
}) {
  const { bytes, everyS, seconds, isSmall } = options;
  let now = 0;
  const arrivals = watchArrivals(() => now, 2 ** 30);
  using arrival = isSmall ? null : arrivals.expect();
  const arriving = arrival?.tooSlow ?? arrivals.small(new Promise<never>(() => {}));
  let rejected = null as string | null;
  arriving.catch((error: Error) => (rejected = error.message));
  for (let second = 1; second <= seconds && rejected === null; second++) {
    now += 1_000;
    if (second % everyS === 0) arrival?.arrived(bytes);
    arrivals.look();
    await Promise.resolve();
    await Promise.resolve();
  }
  return { atS: now / 1_000, rejected };
}

test.each([
  [{ bytes: 28_000, everyS: 1, seconds: 600 }],
  [{ bytes: 1_100, everyS: 1, seconds: 600 }],
  [{ bytes: 64_000, everyS: 29, seconds: 600 }],
  [{ bytes: 0, everyS: 1, seconds: 65, isSmall: true }],
])("%j may go on", async (options) => {
  expect(await arrive(options)).toEqual({ atS: options.seconds, rejected: null });
});

test.each([
  [{ bytes: 1, everyS: 1, seconds: 600 }, 60, "brought less than 1 kB/s over a minute"],
  [{ bytes: 900, everyS: 1, seconds: 600 }, 60, "brought less than 1 kB/s over a minute"],
  [{ bytes: 1e6, everyS: 40, seconds: 600 }, 31, "stood still for 30 s"],
  [{ bytes: 0, everyS: 1, seconds: 600, isSmall: true }, 67, "did not arrive within a minute"],
] as const)("%j is rejected after %d s", async (options, atS, why) => {
  expect(await arrive(options)).toEqual({ atS, rejected: `the body ${why}; send it again` });
});

test("a body that was fast for a minute and then drips is rejected", async () => {
  let now = 0;
  const arrivals = watchArrivals(() => now, 2 ** 30);
  using arrival = arrivals.expect();
  const rejected: Promise<string> = arrival.tooSlow.catch((error: Error) => error.message);
  for (let second = 1; second <= 180; second++) {
    now += 1_000;
    arrival.arrived(second <= 60 ? 100_000 : 10);
    arrivals.look();
  }
  expect(await rejected).toContain("less than 1 kB/s");
});

test("a small body that arrives, or whose sender is gone, is passed on", async () => {
  const arrivals = watchArrivals();
  const bytes = new Uint8Array([1]);
  expect(await arrivals.small(Promise.resolve(bytes))).toBe(bytes);
  const ended = arrivals.small(Promise.reject(new Error("the sender is gone")));
  await expect(ended).rejects.toThrow("the sender is gone");
});
