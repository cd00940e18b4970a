/** Revenue over time: what `GET /revenue` reads from its query, and answers. */
import type { Database } from "../ledger/database.ts";
import { readPoints, type Step } from "../ledger/points.ts";
import { FIRST_MS, parseTime, TIME_RULE } from "../time.ts";
import { invalidQuery } from "./problem.ts";

const MAX_POINTS = 10_000;
const MINUTE_MS = 60_000;
const HOUR_MS = 60 * MINUTE_MS;
const DAY_MS = 24 * HOUR_MS;

/** The length of a step, and how much is answered unless the query says otherwise. */
const STEPS: Record<Step, { ms: number; defaultMs: number }> = {
  minute: { ms: MINUTE_MS, defaultMs: HOUR_MS },
  hour: { ms: HOUR_MS, defaultMs: DAY_MS },
  day: { ms: DAY_MS, defaultMs: 90 * DAY_MS },
};

/** The points of a query. Throws Unavailable, and the 422 for an invalid time and for too many points. */
export async function readRevenue(
  database: Database,
  query: { step?: Step | undefined; from?: string | undefined; to?: string | undefined },
) {
  const { step = "hour" } = query;
  const { ms, defaultMs } = STEPS[step];
  const roundDown = (timeMs: number) => Math.floor(timeMs / ms) * ms;
  const toMs = roundDown(query.to === undefined ? Date.now() : requireTime("to", query.to));
  const fromMs =
    query.from === undefined
      ? Math.max(toMs - defaultMs, FIRST_MS)
      : roundDown(requireTime("from", query.from));
  if (fromMs > toMs) throw invalidQuery("from", "must not be after `to`");
  const range = { step, from: new Date(fromMs), to: new Date(toMs), limit: MAX_POINTS + 1 };
  const points = await readPoints(database, range);
  if (points.length > MAX_POINTS)
    throw invalidQuery(
      "from",
      `this is more than ${MAX_POINTS} points: ask for less, or a longer step`,
    );
  return { points: points.map(({ at, ...point }) => ({ at: at.toISOString(), ...point })) };
}

function requireTime(name: string, text: string): number {
  const ms = parseTime(text.replace(" ", "+")); // a plus that was not escaped
  if (ms === undefined) throw invalidQuery(name, TIME_RULE);
  return ms;
}
