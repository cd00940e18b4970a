/**
 * `processor.ts --verify` and `--rebuild`: both recount all sources as of one moment of the database,
 * while posting continues; `--rebuild` also corrects what differs. Corrections are differences, so it does
 * not matter what was posted since.
 */
import { getEventTypes } from "../event/event.ts";
import { parseKey } from "../ledger/checkpoints.ts";
import { CannotProceed, type Transaction } from "../ledger/database.ts";
import { findPointDifferences } from "../ledger/points.ts";
import {
  correctDifferences,
  findDifferences,
  listOtherTypes,
  listRecountable,
  readDifferences,
  withRecountLock,
} from "../ledger/reconcile.ts";
import { recount, type Reconciliation } from "./recount.ts";

/** Returns how many balances differ from what the sources at `paths` hold. */
export async function verify(run: Reconciliation): Promise<number> {
  const { database, say } = run;
  return withRecountLock(database, say, async (tx) => {
    const { differing, behind, points } = await compare(tx, run);
    return differing + behind.length + points.length;
  });
}

/**
 * Makes the balances what the sources at `paths` hold. Throws CannotProceed, having changed nothing, if
 * one is missing, or if lines that have counted are not events any more or count otherwise (EVENT_TYPES),
 * unless `yes` accepts that.
 */
export async function rebuild(run: Reconciliation & { yes: boolean }): Promise<void> {
  const { database, print, say, yes } = run;
  let correcting: Promise<void> | null = null;
  let differing = 0;
  let correctedPoints = 0;
  const rebuilding = withRecountLock(database, say, async (found) => {
    const compared = await compare(found, run);
    differing = compared.differing;
    if (!compared.isCertain && !yes)
      throw new CannotProceed(
        "nothing was changed: add --yes to make every line count as it does today",
      );
    const { behind, points } = compared;
    correctedPoints = points.length;
    correcting = correctDifferences(database, found, { types: getEventTypes(), behind, points });
    await correcting;
  });
  await rebuilding.catch(async (error) => {
    if (!correcting) throw error;
    await correcting; // it decides, even if the connection of the comparison has died since
  });
  if (differing > 0) print(`balances corrected: ${differing}`);
  if (correctedPoints > 0) print(`points of revenue over time corrected: ${correctedPoints}`);
}

/**
 * Names each user that differs; `correctDifferences` can then correct them. `isCertain`: every line counts
 * today as it did when it was posted.
 */
export async function compare(tx: Transaction, { paths, print }: Reconciliation) {
  const recountable = await listRecountable(tx);
  const behind = recountable.filter(({ position, removedTo }) => position < removedTo);
  const { tally, lost, invalid, firstInvalid } = await recount(tx, recountable, paths);
  const journals = recountable.flatMap(({ key }) =>
    parseKey(key).generation === null ? [key] : [],
  );
  const points = await findPointDifferences(tx, journals);
  const others = await listOtherTypes(tx, getEventTypes());
  const { users, differing } = await findDifferences(tx, tally);
  for await (const differences of readDifferences(tx))
    for (const { userId, expected, balance, excess } of differences)
      print(
        `user ${JSON.stringify(userId)}: balance ${balance ?? "missing"}, expected ${expected ?? "none"}; off by ${excess}`,
      );
  const findings = [
    differing > 0
      ? `${differing} of ${users} balances differ from their sources`
      : `${users} balances match their sources`,
    ...behind.map(
      ({ key, position, removedTo }) =>
        `${key} has been posted up to ${position}, and its snapshot ends at ${removedTo}: --rebuild adds the ` +
        "snapshot, and posting continues after it",
    ),
    points.length > 0 &&
      `${points.length} points of revenue over time differ from their sources, the first at ${points[0]?.at} (${points[0]?.name}, ${points[0]?.source})`,
    lost > 0 &&
      `ranges of a journal marked as lost by --repair: ${lost}; what had been posted of them is not expected here`,
    firstInvalid &&
      `lines that have counted and are not events by today's rules: ${invalid}, the first at position ${firstInvalid.position} of ${firstInvalid.key}: ${firstInvalid.reason}`,
    others.length > 0 &&
      `EVENT_TYPES differs from what events were posted as (${others.join(", ")}), which may explain differences`,
  ];
  for (const finding of findings) if (finding) print(finding);
  return { differing, behind, points, isCertain: lost + invalid + others.length === 0 };
}
