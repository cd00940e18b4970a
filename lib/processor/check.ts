/** What `processor.ts --check` says of a journal's files, and what `--repair` does about it. */
import { dirname, join } from "node:path";

import type { Database } from "../ledger/database.ts";
import { decodeEvent, InvalidEvent } from "../event/event.ts";
import { checkJournal, type CheckedFile } from "../journal/check.ts";
import { disk } from "../journal/disk.ts";
import { canFill, repairFile, type Repaired } from "../journal/repair.ts";
import { JOURNAL_LOCK } from "../journal/writer.ts";
import {
  type Checkpoint,
  clearDigest,
  journalKey,
  parseFrameDigest,
  readCheckpoint,
} from "../ledger/checkpoints.ts";
import { eachLine, readBlocks, readFile } from "../event/lines.ts";
import { tryLock } from "../lock.ts";

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
    const checkpoint = await readCheckpoint(database, journalKey(id));
    const last = files.at(-1);
    if (last && checkpoint) missTail(last, checkpoint.position);
    const damaged = files.filter(({ damage }) => damage.length > 0);
    if (damaged.length === 0) return print(`${path}: nothing is damaged`);
    for (const file of damaged) {
      splitAt(file, checkpoint?.position ?? 0);
      // Before anything is changed: a repair that dies behind it must not leave a ledger that looks for
      // a frame which is no more.
      if (checkpoint) await forgetLost(file, checkpoint, database);
      const begins = positionsOf(file);
      for (const [i, lost] of (await repairFile(file, id, disk)).entries())
        await tell(file.path, lost, (begins[i] ?? 0) < (checkpoint?.position ?? 0), print);
    }
  } finally {
    lock.release();
  }
}

/** The position at which each damage of a file begins: others before it may have the wrong length. */
function positionsOf({ base, damage }: CheckedFile): number[] {
  let shift = base;
  return damage.map(({ from, to, length }) => {
    const position = from + shift;
    shift += length - (to - from);
    return position;
  });
}

/**
 * Makes two of a damage that is posted in part, each of which gets a frame in its place: the checkpoint
 * has to stay where a frame begins, or nothing behind it would ever be posted.
 */
function splitAt(file: CheckedFile, posted: number): void {
  const begins = positionsOf(file);
  file.damage = file.damage.flatMap((damage, i) => {
    const { from, to, length } = damage;
    const first = posted - (begins[i] ?? 0);
    if (first <= 0 || !canFill(first) || !canFill(length - first)) return [damage];
    const middle = Math.min(to, from + first);
    return [
      { ...damage, to: middle, length: first },
      { ...damage, from: middle, length: length - first },
    ];
  });
}

/** Lets the ledger go on behind a last frame that is damaged. */
async function forgetLost(file: CheckedFile, checkpoint: Checkpoint, database: Database) {
  const lastFrame = parseFrameDigest(checkpoint.digest)?.position ?? -1;
  const begins = positionsOf(file);
  const isLost = file.damage.some(({ from, to, length }, i) => {
    const begin = begins[i] ?? 0;
    return lastFrame >= begin && lastFrame < begin + Math.max(length, to - from);
  });
  if (isLost) await clearDigest(database, checkpoint);
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

/** Says what became of a damaged range. */
async function tell(
  path: string,
  { from, to, length, what, movedTo }: Repaired,
  isPosted: boolean,
  print: Print,
): Promise<void> {
  print(
    movedTo
      ? `${path}: ${to - from} bytes from byte ${from} on were moved to ${movedTo}: ${what}`
      : `${path}: ${length} bytes that are missing at byte ${from} are marked as lost: ${what}`,
  );
  if (isPosted)
    return print(
      "  it had been posted: the balances have its events, but they cannot be computed again " +
        "from the journal (--verify and --rebuild will say so)",
    );
  const events = movedTo ? await keepEvents(movedTo) : 0;
  print(
    events > 0
      ? `  it had not been posted: ${events} of its lines still are events. Look at ${movedTo}.events, ` +
          `for one of them may be what is damaged; bun run processor.ts ${movedTo}.events posts them`
      : "  it had not been posted, and none of it can be: the senders must send it again",
  );
}

/** Writes the lines of a file that still are events to another one, `.events`; how many there are. */
async function keepEvents(path: string): Promise<number> {
  let events = 0;
  const writer = Bun.file(`${path}.events`).writer();
  for await (const { bytes } of readBlocks(readFile(Bun.file(path)), 0, BLOCK_BYTES)) {
    eachLine(bytes, (line) => {
      if (decodeEvent(line) instanceof InvalidEvent) return;
      writer.write(line);
      writer.write("\n");
      events++;
    });
    await writer.flush();
  }
  await writer.end();
  if (events === 0) await disk.remove(`${path}.events`);
  return events;
}

type Print = (line: string) => void;
