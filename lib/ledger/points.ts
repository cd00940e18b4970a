/** Revenue over time, as the posting statement has added it. */
import { type Database, READ_DEADLINE_MS } from "./database.ts";

export type Step = "minute" | "hour" | "day";

/** The events of one name, and by how much they changed the balances, in an interval that begins at `at`. */
export interface RevenuePoint {
  at: Date;
  step: Step;
  name: string;
  events: number;
  /** An exact decimal. */
  amount: string;
}

/**
 * The points from `from` to before `to`, each as long as `step`, or longer where only that is kept: at most
 * `limit` of them, oldest first. Throws Unavailable.
 */
export async function readPoints(
  database: Database,
  { step, from, to, limit }: { step: Step; from: Date; to: Date; limit: number },
): Promise<RevenuePoint[]> {
  const coarser = { minute: ["minute"], hour: ["minute", "hour"], day: ["minute", "hour", "day"] };
  const rows = await database.use(
    (sql) => sql<RevenuePoint[]>`
      select date_trunc(kept, at, 'UTC') as at, kept as step, name,
        sum(events)::float8 as events, trim_scale(sum(amount))::text as amount
      from (
        select *, case when step = any(${`{${coarser[step].join()}}`}::text::text[])
          then ${step} else step end as kept from points
      ) as point
      where at >= ${from} and at < ${to}
      group by 1, 2, 3 order by 1, 2, 3 limit ${limit}`,
    READ_DEADLINE_MS,
  );
  return [...rows];
}
