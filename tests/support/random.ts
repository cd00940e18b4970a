/** Random choices that can be repeated, and how much a run tries. */
import { test } from "bun:test";

/** Above 1 in a long run, which tries slow things more often. */
export const FAULT_ROUNDS = Number(process.env["FAULT_ROUNDS"] ?? 1);
export const IS_LONG = FAULT_ROUNDS > 1;

/** A test of the long run. Elsewhere it is absent instead of skipped: a skipped test lacks something. */
export const longTest = (IS_LONG ? test : () => {}) as typeof test;

/** A generator of numbers from 0 to 1 (exclusive): the same ones for the same seed. */
export function randomOf(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** A test with random choices. When it fails it prints its seed; `TEST_SEED` repeats the same choices. */
export function seeded(body: (random: () => number) => Promise<void>) {
  return async () => {
    const seed = Number(process.env["TEST_SEED"] ?? Math.floor(Math.random() * 2 ** 32));
    await body(randomOf(seed)).catch((error) => {
      console.error(`TEST_SEED=${seed} repeats these choices`);
      throw error;
    });
  };
}
