/**
 * The query of a request, as it was written. Elysia takes the last of several values, reads numbers as
 * JavaScript does (`1e2`, `0x10`, ` 1`), and names no parameter where a number is out of range.
 */
import { invalidQuery } from "./problem.ts";

/** The parameters of a route. A whole number has a minimum and a maximum; a word is one of a fixed set. */
export interface QuerySchema {
  properties: Record<string, Parameter>;
}

interface Parameter {
  minimum?: number;
  maximum?: number;
  const?: unknown;
  anyOf?: { const?: unknown }[];
}

/** Throws the 422 for a parameter that is there twice, or is not the whole number or the word that it must be. */
export function checkQuery(url: string, { properties }: QuerySchema): void {
  const query = new URLSearchParams(url.slice(url.indexOf("?")));
  for (const [name, parameter] of Object.entries(properties)) {
    const { minimum, maximum, const: only, anyOf = [{ const: only }] } = parameter;
    const [value, ...more] = query.getAll(name);
    if (more.length > 0) throw invalidQuery(name, "must be given once");
    if (value === undefined) continue;
    const words = anyOf.map((each) => each.const).filter((word) => typeof word === "string");
    if (words.length > 0 && !words.includes(value))
      throw invalidQuery(name, `must be ${words.join(" or ")}`);
    if (minimum === undefined || maximum === undefined) continue;
    if (!/^\d{1,15}$/.test(value) || Number(value) < minimum || Number(value) > maximum)
      throw invalidQuery(name, `must be a whole number from ${minimum} to ${maximum}`);
  }
}
