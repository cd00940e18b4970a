/** Counts what a test file tried. The long run (run.ts) reads the counts from a line on stdout. */
import { afterAll } from "bun:test";

const figures: Record<string, number> = {};

export function count(what: string, more = 1): void {
  figures[what] = (figures[what] ?? 0) + more;
}

afterAll(() => {
  if (process.env["FAULT_FIGURES"] && Object.keys(figures).length > 0)
    console.log(`faults: ${JSON.stringify(figures)}`);
  for (const what of Object.keys(figures)) delete figures[what];
});
