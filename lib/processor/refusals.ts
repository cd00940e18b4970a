/**
 * What to do when Postgres refuses a batch for what its rows contain. A batch cannot be halved, because
 * checkpoints stand at frame ends and the fold hides lines. So, in this order:
 *
 * 1. If Postgres refuses to add zero to every balance that it is asked about, the table is the cause, and
 *    not the lines: posting pauses and repeats only this question.
 * 2. Else its functions find the users it refuses, and the lines of these users. The batch is folded
 *    again without these lines, which go to quarantine and claim no id.
 * 3. If nobody is found (a trigger for the whole statement), or everything is refused on a ledger that
 *    holds no balance to ask about, posting pauses. No line is quarantined by guess.
 */
import { formatAmount } from "../event/amount.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import type { Batch } from "../ledger/ledger.ts";
import {
  type CountedLine,
  findRefusedBalances,
  findRefusedLines,
  findRefusedUsers,
} from "../ledger/refusals.ts";
import type { BatchReader, BatchSource } from "./batches.ts";

/** Throws Unavailable while Postgres refuses to change any balance at all. */
export async function requireWritableBalances(database: Database, batch: Batch): Promise<number> {
  const { tried, why } = await findRefusedBalances(database, batch);
  if (why !== null)
    throw new Unavailable(
      `it refuses every change of users_revenue (${why}); posting pauses`,
      false,
    );
  return tried;
}

/**
 * The lines of `batch` that Postgres refuses, by position, with its reasons. `open` opens the batches at
 * the checkpoint again. Throws Unavailable when the lines are not the cause, or cannot be found.
 */
export async function findRefusedOf(
  batch: Batch,
  reason: string,
  options: {
    database: Database;
    open(counted: BatchSource["counted"]): Promise<BatchReader | null>;
  },
): Promise<Map<number, string>> {
  const { database, open } = options;
  const tried = await requireWritableBalances(database, batch);
  const users = await findRefusedUsers(database, batch);
  const isAll = users.size >= batch.totals.size;
  if (users.size === 0 || (isAll && tried === 0))
    throw new Unavailable(
      users.size === 0
        ? `it refuses a batch, but none of its lines alone (${reason}); posting pauses`
        : `it refuses every line, and holds no balance to compare with (${reason}); posting pauses`,
      false,
    );
  const lines: CountedLine[] = [];
  await using batches = await open((position, { userId, amount, id = null }) => {
    if (users.has(userId) && position < batch.to)
      lines.push({ position, userId, amount: formatAmount(amount), id });
  });
  for (let at = batch.from; at < batch.to;) {
    const next = await batches?.next(Promise.resolve());
    if (next?.from !== at) break; // another processor has posted it meanwhile
    at = next.to;
  }
  return findRefusedLines(database, lines);
}
