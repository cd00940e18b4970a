/** What `processor.ts --check` says of a journal's files, and what `--repair` does about it. */
import { dirname, join } from "node:path";

import type { Database } from "./database.ts";
import { decodeEvent, Refusal } from "./event.ts";
import { checkJournal, type CheckedFile } from "./journal-check.ts";
import { disk } from "./journal-disk.ts";
import { repairFile, type Repaired } from "./journal-repair.ts";
import { JOURNAL_LOCK } from "./journal.ts";
import { type Checkpoint, forgetDigest, readCheckpoint } from "./ledger.ts";
import { eachLine, readBlocks, readFile } from "./lines.ts";
import { tryLock } from "./lock.ts";

const BLOCK_BYTES = 1024 * 1024;

/** Checks the journal whose active file is `path`; returns how many ranges are damaged. */
export async function check(path: string, print: (line: string) => void): Promise<number> {
  const { id, files } = await checkJournal(path, disk);
  if (files.length === 0) throw new Error(`${path}: there is no journal here`);
  for (const file of files) describe(file, print);
  const damage = files.flatMap((file) => file.damage);
  const frames = files.reduce((sum, file) => sum + file.frames, 0);
  const bytes = damage.reduce((sum, { from, to }) => sum + to - from, 0);
  const whole = `journal ${id ?? "(nameless)"}: ${frames} whole frames in ${files.length} files`;
  if (damage.length === 0) print(`${whole}; nothing is damaged`);
  else
    print(
      `${whole}; damaged: ${damage.length} ranges, ${bytes} bytes. Restore them from a copy, or stop the ` +
        "server and run bun run processor.ts --check --repair, which moves them aside and keeps the rest",
    );
  return damage.length;
}

/**
 * Moves what is damaged aside and says what is lost. Nobody else may write the journal, and the
 * ledger must be there: it knows what of the lost had been posted.
 */
export async function repair(
  path: string,
  database: Database,
  print: (line: string) => void,
): Promise<void> {
  const lock = tryLock(join(dirname(path), JOURNAL_LOCK));
  if (!lock) throw new Error(`${path} is being written by another process; stop it first`);
  try {
    const { id, files } = await checkJournal(path, disk);
    if (!id)
      throw new Error(
        `${path}: no file says which journal it is; put its first line back by hand (its name is ` +
          "in the table checkpoints: journal:NAME)",
      );
    const checkpoint = await readCheckpoint(database, `journal:${id}`);
    const last = files.at(-1);
    if (last && checkpoint) missTail(last, checkpoint.position);
    const damaged = files.filter(({ damage }) => damage.length > 0);
    if (damaged.length === 0) return print(`${path}: nothing is damaged`);
    for (const file of damaged)
      for (const lost of await repairFile(file, id, disk))
        await tell(file, lost, checkpoint, database, print);
  } finally {
    lock.release();
  }
}

/** A torn tail that the ledger has posted was acknowledged; so was what an older copy lacks. */
function missTail({ base, bytes, tornBytes, damage }: CheckedFile, posted: number): void {
  const from = bytes - tornBytes;
  const what = `the ledger has posted up to position ${posted}`;
  if (base + from < posted) damage.push({ from, to: bytes, length: posted - base - from, what });
}

function describe({ path, frames, bytes, damage, tornBytes }: CheckedFile, print: Print): void {
  print(`${path}: ${frames} whole frames, ${bytes} bytes`);
  for (const { from, to, length, what } of damage)
    print(
      from === to
        ? `${path}: damaged at byte ${from}, where ${length} bytes are missing: ${what}`
        : `${path}: damaged from byte ${from} to ${to}: ${what}`,
    );
  if (tornBytes > 0)
    print(
      `${path}: the last ${tornBytes} bytes are no whole frame: they are just being written, or were ` +
        "never acknowledged, and the next start cuts them off",
    );
}

/** Says what became of a damaged range, and lets the ledger go on behind it. */
async function tell(
  { path, base }: CheckedFile,
  { from, to, length, what, movedTo }: Repaired,
  checkpoint: Checkpoint | null,
  database: Database,
  print: Print,
): Promise<void> {
  print(
    movedTo
      ? `${path}: ${to - from} bytes from byte ${from} on were moved to ${movedTo}: ${what}`
      : `${path}: ${length} bytes that are missing at byte ${from} are marked as lost: ${what}`,
  );
  const position = checkpoint?.position ?? 0;
  const [, lastFrame = ""] = /^(\d+) /.exec(checkpoint?.digest ?? "") ?? [];
  const behind = base + from + Math.max(length, to - from);
  const holdsLast = lastFrame && +lastFrame >= base + from && +lastFrame < behind;
  if (checkpoint && holdsLast) await forgetDigest(database, checkpoint);
  const events = movedTo ? await countEvents(movedTo) : 0;
  if (base + from < position)
    print(
      "  it had been posted: the balances have its events, but they cannot be computed again " +
        "from the journal (--verify and --rebuild will say so)",
    );
  else if (events > 0)
    print(
      `  it had not been posted: ${events} of its lines still are events, and ` +
        `bun run processor.ts ${movedTo} posts them`,
    );
  else print("  it had not been posted, and none of it can be: the senders must send it again");
}

async function countEvents(path: string): Promise<number> {
  let events = 0;
  for await (const { bytes } of readBlocks(readFile(Bun.file(path)), 0, BLOCK_BYTES))
    eachLine(bytes, (line) => {
      if (!(decodeEvent(line) instanceof Refusal)) events++;
    });
  return events;
}

type Print = (line: string) => void;
