/** What `processor.ts --check` says about a journal's files, and what `--repair` does about it. */
import { dirname, join } from "node:path";

import type { Database } from "../ledger/database.ts";
import { decodeEvent, InvalidEvent, MAX_JOURNALED_BYTES } from "../event/event.ts";
import { checkJournal, type CheckedFile } from "../journal/check.ts";
import { disk } from "../journal/disk.ts";
import { JournalDamage } from "../journal/format.ts";
import type { JournalReader } from "../journal/reader.ts";
import {
  MIN_FILLER_BYTES,
  type Repaired,
  repairFile,
  requireRepairable,
} from "../journal/repair.ts";
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
import { counted } from "../progress.ts";

const BLOCK_BYTES = 1024 * 1024;

type Print = (line: string) => void;

/** Checks the journal whose active file is `path`; returns how much damage it found. */
export async function check(path: string, print: Print): Promise<number> {
  const { id, files } = await checkJournal(path, disk);
  if (files.length === 0) throw new Error(`${path}: there is no journal here`);
  for (const file of files) describe(file, print);
  const damage = files.flatMap((file) => file.damage);
  const frames = files.reduce((sum, file) => sum + file.frames, 0);
  const bytes = damage.reduce((sum, { from, to }) => sum + to - from, 0);
  print(
    `journal ${id ?? "(unknown)"}: ${counted(frames, "whole frame")} in ${counted(files.length, "file")}; ` +
      (damage.length === 0
        ? "nothing is damaged"
        : `damaged: ${counted(damage.length, "range")}, ${counted(bytes, "byte")}. Restore them from a copy, or stop the server and ` +
          "run bun run processor.ts --check --repair, which moves them aside and keeps the rest"),
  );
  return damage.length;
}

/** Checks a journal of a stream: each of its messages, and that they follow each other. */
export async function checkStreamed(journal: JournalReader, print: Print): Promise<number> {
  let frames = 0;
  let position = journal.start;
  try {
    for (;;) {
      const read = await journal.read(position);
      if (read.length === 0) break;
      frames += read.length;
      position = read.at(-1)?.to ?? position;
    }
    print(
      `journal ${journal.id}: ${frames} whole frames up to position ${position}; nothing is damaged`,
    );
    return 0;
  } catch (error) {
    if (!(error instanceof JournalDamage)) throw error;
    print(
      `journal ${journal.id}: ${frames} whole frames up to position ${position}; ${error.message}`,
    );
    return 1;
  }
}

/**
 * Moves damaged bytes aside and says what is lost. No other process may write the journal, and the
 * ledger must be available: it knows which of the lost bytes have been posted. Throws, and changes
 * nothing, where a file has the wrong length.
 */
export async function repair(path: string, database: Database, print: Print): Promise<void> {
  const lock = tryLock(join(dirname(path), JOURNAL_LOCK));
  if (!lock) throw new Error(`${path} is being written by another process; stop it first`);
  try {
    const { id, files } = await checkJournal(path, disk);
    if (!id)
      throw new Error(
        `${path}: no file says which journal this is; restore its first line by hand (the id is in ` +
          "the table checkpoints: journal:ID)",
      );
    const checkpoint = await readCheckpoint(database, journalKey(id));
    const posted = checkpoint?.position ?? 0;
    const last = files.at(-1);
    if (last) addMissingTail(last, posted);
    const damaged = files.filter(({ damage }) => damage.length > 0);
    if (damaged.length === 0) return print(`${path}: nothing is damaged`);
    for (const file of damaged) requireRepairable(file, id);
    for (const file of damaged) {
      splitAt(file, posted);
      // Before anything is changed: a repair that dies later must not leave a ledger that looks for a
      // frame that no longer exists.
      if (checkpoint) await forgetLostFrame(file, checkpoint, database);
      for (const lost of await repairFile(file, id, disk))
        await explain(file.path, lost, file.base + lost.from < posted, print);
    }
  } finally {
    lock.release();
  }
}

/**
 * Splits damage of which a part is posted, so that each part is replaced by a frame of its own: the
 * checkpoint must stay where a frame begins, or nothing after it would ever be posted.
 */
function splitAt(file: CheckedFile, posted: number): void {
  const middle = posted - file.base;
  file.damage = file.damage.flatMap((damage) => {
    const { from, to, lostBytes } = damage;
    const firstBytes = middle - from;
    if (firstBytes < MIN_FILLER_BYTES || lostBytes - firstBytes < MIN_FILLER_BYTES) return [damage];
    return [
      { ...damage, to: middle, lostBytes: firstBytes },
      { ...damage, from: middle, lostBytes: to - middle },
    ];
  });
}

/** Lets the ledger resume after a last posted frame that is damaged. */
async function forgetLostFrame(
  { base, damage }: CheckedFile,
  checkpoint: Checkpoint,
  database: Database,
): Promise<void> {
  const offset = (parseFrameDigest(checkpoint.digest)?.position ?? -1) - base;
  const isLost = damage.some(({ from, lostBytes }) => offset >= from && offset < from + lostBytes);
  if (isLost) await clearDigest(database, checkpoint);
}

/** A torn tail that the ledger has posted was acknowledged; so was what an older copy lacks. */
function addMissingTail({ base, bytes, tornBytes, damage }: CheckedFile, posted: number): void {
  const from = bytes - tornBytes;
  const what = `the ledger has posted up to position ${posted}`;
  if (base + from < posted) damage.push({ from, to: bytes, lostBytes: posted - base - from, what });
}

function describe(file: CheckedFile, print: Print): void {
  const { path, frames, bytes, damage, tornBytes } = file;
  print(`${path}: ${frames} whole frames, ${bytes} bytes`);
  for (const { from, to, what } of damage)
    print(`${path}: damaged from byte ${from} to ${to}: ${what}`);
  if (tornBytes > 0)
    print(
      `${path}: the last ${tornBytes} bytes are not a whole frame: they are just being written, or were ` +
        "never acknowledged and are truncated by the next start",
    );
}

/** Says what became of a damaged range. */
async function explain(
  path: string,
  { from, to, lostBytes, what, movedTo }: Repaired,
  isPosted: boolean,
  print: Print,
): Promise<void> {
  print(
    movedTo
      ? `${path}: ${to - from} bytes from byte ${from} on were moved to ${movedTo}: ${what}`
      : `${path}: ${lostBytes} bytes that are missing at byte ${from} are marked as lost: ${what}`,
  );
  if (isPosted)
    return print(
      "  they had been posted: the balances include their events, but cannot be recomputed from the " +
        "journal (--verify and --rebuild will say so)",
    );
  const events = movedTo ? await keepEvents(movedTo) : 0;
  print(
    events > 0
      ? `  they had not been posted: ${events} of their lines are still events. Inspect ${movedTo}.events, ` +
          `since one of them may be the damaged one; bun run processor.ts ${movedTo}.events posts them`
      : "  they had not been posted, and contain no events: the senders must send them again",
  );
}

/** Copies the lines of a file that are still events to `FILE.events`; returns how many there are. */
async function keepEvents(path: string): Promise<number> {
  let events = 0;
  const writer = Bun.file(`${path}.events`).writer();
  for await (const { bytes } of readBlocks(readFile(Bun.file(path)), 0, BLOCK_BYTES)) {
    eachLine(
      bytes,
      (line) => {
        if (decodeEvent(line, MAX_JOURNALED_BYTES) instanceof InvalidEvent) return;
        writer.write(line);
        writer.write("\n");
        events++;
      },
      MAX_JOURNALED_BYTES,
    );
    await writer.flush();
  }
  await writer.end();
  if (events === 0) await disk.remove(`${path}.events`);
  return events;
}
