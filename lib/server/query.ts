/**
 * The query of a request, as it was written. Elysia takes the last of several values, reads numbers as
 * JavaScript does (`1e2`, `0x10`, ` 1`), and names no parameter where a number is out of range.
 */
import { invalidQuery } from "./problem.ts";

/** The parameters of a route; a whole number has a minimum and a maximum. */
export interface QuerySchema {
  properties: Record<string, { minimum?: number; maximum?: number }>;
}

/** Throws the 422 for a parameter that is there twice, or is not the whole number that it must be. */
export function checkQuery(url: string, { properties }: QuerySchema): void {
  const query = new URLSearchParams(url.slice(url.indexOf("?")));
  for (const [name, { minimum, maximum }] of Object.entries(properties)) {
    const [value, ...more] = query.getAll(name);
    if (more.length > 0) throw invalidQuery(name, "must be given once");
    if (value === undefined || minimum === undefined || maximum === undefined) continue;
    if (!/^\d{1,15}$/.test(value) || Number(value) < minimum || Number(value) > maximum)
      throw invalidQuery(name, `must be a whole number from ${minimum} to ${maximum}`);
  }
}
