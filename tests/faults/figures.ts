/** What the faults amount to, for the table of the long run: told as one line when a file is done. */
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
