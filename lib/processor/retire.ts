/**
 * `processor.ts --retire SOURCE`: keeps what a source that is gone has added to the balances, as the
 * snapshot of removed segments does, so that the ledger can be recounted without it. What it has added is
 * what the balances hold beyond all other sources, which therefore have to be here.
 */
import { journalKey } from "../ledger/checkpoints.ts";
import { CannotProceed, type Transaction } from "../ledger/database.ts";
import {
  findRest,
  listRecountable,
  type Recountable,
  retireSource,
  withRecountLock,
} from "../ledger/reconcile.ts";
import { visible } from "../progress.ts";
import { openPath, recount, type Reconciliation } from "./recount.ts";

/**
 * Retires the sources `gone`, keys as `--verify` names them. Of several, only the sum of what they have
 * added is known: the first one's snapshot keeps it. Throws CannotProceed if one is unknown, or here and
 * whole, if another source is missing, and without `yes`, having said what it would keep.
 */
export async function retire(
  run: Reconciliation & { gone: string[]; yes: boolean },
): Promise<void> {
  const { database, say, print, paths, yes } = run;
  await withRecountLock(database, say, async (tx) => {
    const all = await listRecountable(tx);
    const gone = [...new Set(run.gone.map((source) => find(all, source)))];
    if (await keepRest(tx, { all, gone, paths, print, yes })) return;
    const names = gone.map(({ key }) => visible(key)).join(", ");
    throw new CannotProceed(
      `nothing was changed: add --yes to keep that as a snapshot, if ${names} is gone for good`,
    );
  });
}

/**
 * Prints what the sources `gone` of `all` have added, which is what the balances hold beyond the others; with
 * `yes`, also makes it their snapshot, and returns true. Throws CannotProceed if another source is missing.
 */
export async function keepRest(
  tx: Transaction,
  run: { all: Recountable[]; gone: Recountable[]; yes: boolean } & Pick<
    Reconciliation,
    "paths" | "print"
  >,
): Promise<boolean> {
  const { all, gone, paths, print, yes } = run;
  const starts: number[] = [];
  for (const one of gone) starts.push(await findStart(one, paths));
  const others = all.filter((each) => !gone.includes(each));
  const { tally } = await recount(tx, others, paths);
  const { users, revenue } = await findRest(tx, tally);
  const names = gone.map(({ key }) => key).join(", ");
  print(`${names}: added ${revenue} to ${users} ${users === 1 ? "balance" : "balances"}`);
  for (const [i, { key, position }] of gone.entries()) {
    const lostBytes = Math.max(0, (starts[i] as number) - position);
    const lost =
      lostBytes > 0
        ? `; ${lostBytes} bytes that followed are gone, and are not in the balances`
        : "";
    print(`${key}: posted up to ${position}${lost}`);
  }
  if (!yes) return false;
  for (const [i, { key, position }] of gone.entries())
    await retireSource(tx, {
      key,
      position: Math.max(position, starts[i] as number),
      hasRest: i === 0,
    });
  print(`retired: ${names}`);
  return true;
}

function find(all: Recountable[], source: string): Recountable {
  const found = all.find(({ key }) => key === source || key === `journal:${source}`);
  if (found) return found;
  const known = all.map(({ key, position }) => `  ${visible(key)} (posted up to ${position})`);
  const reason = source.startsWith("sent:")
    ? "what is sent over HTTP is in the journals"
    : "the ledger knows no such source";
  throw new CannotProceed([`${visible(source)}: ${reason}. It knows:`, ...known].join("\n"));
}

/** Where a journal that is here, but lacks its older segments, begins; 0 for a source that is not here. */
async function findStart(retired: Recountable, paths: Reconciliation["paths"]): Promise<number> {
  for (const path of paths) {
    const journal = await openPath(path);
    if (!journal || journalKey(journal.id) !== retired.key) continue;
    if (journal.start > retired.removedTo) return journal.start;
    const where = typeof path === "string" ? `, in ${visible(path)}` : "";
    throw new CannotProceed(
      `${visible(retired.key)} is here${where}: only what is gone can be retired`,
    );
  }
  return 0;
}
