/**
 * `processor.ts --verify` and `--rebuild`: both count all sources again, at one point in time of the
 * database, while the system runs; the second one corrects what differs. Corrections are differences,
 * so posting may go on between the two.
 */
import { type Database, CannotProceed, type Sql } from "../ledger/database.ts";
import {
  alone,
  eachDrift,
  findDrift,
  listOtherTypes,
  mendDrift,
  openTally,
  settleTypes,
} from "../ledger/reconcile.ts";
import { getEventTypes } from "../event/event.ts";
import { showProgress } from "../progress.ts";
import { recount, type Recounted } from "./recount.ts";

type Print = (line: string) => void;

/** Returns how many users' balances differ from what `paths` (journals and files) hold. */
export async function verify(
  database: Database,
  paths: string[],
  print: Print,
  say: Print,
): Promise<number> {
  return alone(
    database,
    () => say("waiting for another recount to end"),
    async (sql) => (await compare(sql, paths, print)).differing,
  );
}

/**
 * Makes the balances what `paths` hold. Throws CannotProceed, having changed nothing, where one is missing,
 * or where lines that have counted are no events any more, or count otherwise (EVENT_TYPES), unless
 * `yes` accepts that.
 */
export async function rebuild(
  database: Database,
  paths: string[],
  yes: boolean,
  print: Print,
  say: Print,
): Promise<void> {
  await alone(
    database,
    () => say("waiting for another recount to end"),
    async (sql) => {
      const { differing, lost, strange, others } = await compare(sql, paths, print);
      if ((lost > 0 || strange > 0 || others.length > 0) && !yes)
        throw new CannotProceed(
          "nothing was changed; --yes makes all lines count as they do today",
        );
      await mendDrift(sql);
      await settleTypes(sql, getEventTypes());
      if (differing > 0) print(`${differing} balances were corrected`);
    },
  );
}

/** Names each user that differs; what differs then is in the table that `mendDrift` reads. */
async function compare(
  sql: Sql,
  paths: string[],
  print: Print,
): Promise<Recounted & { differing: number; others: string[] }> {
  let progress: ReturnType<typeof showProgress> | null = null;
  const compared = await sql.begin("isolation level repeatable read", async (tx) => {
    const tally = await openTally(tx);
    const recounted = await recount(tx, paths, tally, (bytes, totalBytes, events) => {
      progress ??= showProgress("counting again", totalBytes, 0);
      progress.update(bytes, events);
    });
    const others = await listOtherTypes(tx, getEventTypes());
    return { ...recounted, others, ...(await findDrift(tx, tally)) };
  });
  (progress as ReturnType<typeof showProgress> | null)?.stop();
  const { users, differing, lost, strange, first, others } = compared;
  await eachDrift(sql, ({ userId, wanted, found, excess }) =>
    print(
      `user ${JSON.stringify(userId)}: balance ${found ?? "missing"}, wanted ${wanted ?? "none"}; off by ${excess}`,
    ),
  );
  print(
    differing > 0
      ? `${differing} of ${users} balances differ from what was sent`
      : `${users} balances are what was sent`,
  );
  if (lost > 0)
    print(
      `${lost} ranges of a journal are lost and marked so by --repair: what had been posted of them counts for nothing here`,
    );
  if (first)
    print(
      `${strange} lines have counted and are no events now, the first at position ${first.position} of ${first.source}: ${first.reason}`,
    );
  if (others.length > 0)
    print(
      `events were posted as ${others.join(", ")}, which is not what EVENT_TYPES says today: what differs may be that`,
    );
  return compared;
}
