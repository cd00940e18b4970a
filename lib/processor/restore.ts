/** `processor.ts --restore DIR [FILE…]`: reads a backup (backup.ts describes it). */
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";

import { explain } from "../errors.ts";
import { checkJournal } from "../journal/check.ts";
import { OtherJournal, placeJournal } from "../journal/copy.ts";
import { disk } from "../journal/disk.ts";
import { JournalDamage } from "../journal/format.ts";
import { JOURNAL_FILE, JOURNAL_LOCK } from "../journal/writer.ts";
import { analyze, copyIn, emptyLedger, TABLES } from "../ledger/copy.ts";
import { CannotProceed, LEDGER_VERSION, type Transaction } from "../ledger/database.ts";
import { listRecountable, withRecountLock } from "../ledger/reconcile.ts";
import { tryLock } from "../lock.ts";
import { sayLines } from "../progress.ts";
import {
  type BackupRun,
  type File,
  FORMAT,
  type Manifest,
  MANIFEST,
  type Table,
} from "./backup.ts";
import { describeMissing, locateSources } from "./recount.ts";
import { keepRest } from "./retire.ts";
import { compare } from "./verify.ts";

const READ_BYTES = 1024 * 1024;
/** A ledger may know thousands of sources. */
const MAX_LISTED = 10;

/**
 * Restores the backup in `folder` into an empty ledger, and its journal where DATA_DIR has none, and
 * compares the ledger with the journal and the other `paths`. Sources that are missing are named; with `yes`
 * what they have added is kept as with --retire. Returns how many differences there are. All of the ledger
 * appears at once, at the end: after an interruption, call it again. Throws CannotProceed, having changed
 * nothing, where something is in the way.
 */
export async function restore(run: BackupRun & { yes: boolean }): Promise<number> {
  const { database, folder, journal, print, say } = run;
  const manifest = readManifest(folder);
  const copy = join(folder, "journal", JOURNAL_FILE);
  await requireIntact(copy, manifest.journal);
  const locks = [JOURNAL_LOCK, "processor.lock"].map((name) => join(dirname(journal), name));
  using _ = lockAll(locks);
  const differing = await withRecountLock(
    database,
    say,
    async (tx) => {
      refuseUsed(await emptyLedger(tx), manifest);
      await placeJournal(copy, journal).catch(refuseOther);
      for (const table of manifest.tables) await restoreTable(tx, join(folder, "ledger"), table);
      await analyze(tx);
      return compareRestored(tx, run);
    },
    "read committed", // what waits for a lock and then looks must see what is there then
  );
  print(`restored ${folder}, of ${manifest.at}`);
  return differing;
}

/** Throws CannotProceed for a folder that is no whole backup, or that of another version. */
function readManifest(folder: string): Manifest {
  const manifest = JSON.parse(readManifestFile(folder)) as Manifest;
  const { format, ledger, daybook } = manifest;
  if (format !== FORMAT || ledger !== LEDGER_VERSION)
    refuse(
      `${folder} was made by Daybook ${daybook} (format ${format}, ledger ${ledger}), and this program reads ` +
        `format ${FORMAT}, ledger ${LEDGER_VERSION}: restore it with the version that made it, and upgrade then`,
    );
  return manifest;
}

function readManifestFile(folder: string): string {
  const path = join(folder, MANIFEST);
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    const { code = "" } = error as NodeJS.ErrnoException;
    if (!["ENOENT", "ENOTDIR"].includes(code)) return refuse(explain(error));
    return refuse(
      `${folder} has no ${MANIFEST}: it is not a backup, or the backup was interrupted`,
    );
  }
}

/** Reads the whole journal of the backup. Throws JournalDamage. */
async function requireIntact(copy: string, files: File[]): Promise<void> {
  for (const { name, bytes } of files) {
    const found = await disk.size(join(dirname(copy), name));
    if (found !== bytes)
      throw new Error(
        `${join(dirname(copy), name)} has ${found} bytes, and ${bytes} are required: the backup is damaged`,
      );
  }
  for (const { path, damage } of (await checkJournal(copy, disk)).files)
    for (const { from, what } of damage) throw new JournalDamage(path, from, what);
}

/** Nobody else may write or follow the journal while it is restored. */
function lockAll(paths: string[]) {
  const locks = paths.map((path) => ({ path, lock: tryLock(path) }));
  const release = () => {
    for (const { lock } of locks) lock?.release();
  };
  const used = locks.find(({ lock }) => lock === null);
  if (!used) return { [Symbol.dispose]: release };
  release();
  return refuse(`${dirname(used.path)} is in use by another process: stop it first`);
}

/** Throws CannotProceed if something has been posted. */
function refuseUsed(posted: Awaited<ReturnType<typeof emptyLedger>>, { at }: Manifest): void {
  if (posted.length === 0) return;
  const lines = posted
    .slice(-MAX_LISTED)
    .map(({ key, position }) =>
      key === "users_revenue" ? `  ${position} balances` : `  ${key}, posted up to ${position}`,
    );
  refuse(
    [
      `the ledger is not empty, and may be ahead of this backup, which is of ${at}. A backup is restored into ` +
        "an empty one: name another database in DATABASE_URL, or without it another DATA_DIR. It holds:",
      ...lines,
    ].join("\n"),
  );
}

function refuseOther(error: unknown): never {
  if (!(error instanceof OtherJournal)) throw error;
  return refuse(`${error.message}. Nothing was changed: name another DATA_DIR, or move it away`);
}

async function restoreTable(tx: Transaction, folder: string, given: Table): Promise<void> {
  const { name, columns, bytes, sha256 } = given;
  const table = TABLES.find((known) => known === name) ?? refuse(`unknown table ${name}`);
  const hash = new Bun.CryptoHasher("sha256");
  const path = join(folder, table);
  await copyIn(tx, { table, columns }, readHashed(path, hash));
  const found = hash.digest("hex");
  if (found !== sha256)
    throw new Error(
      `${path} is damaged: its ${await disk.size(path)} bytes have the SHA-256 ${found}, and the ${bytes} bytes ` +
        `that were written have ${sha256}; nothing was restored to the ledger. Use another backup`,
    );
}

async function* readHashed(path: string, hash: Bun.CryptoHasher): AsyncGenerator<Uint8Array> {
  const size = await disk.size(path);
  for (let at = 0; at < size; at += READ_BYTES) {
    const bytes = await disk.withFile(path, (file) => file.read(at, at + READ_BYTES));
    if (!bytes) return;
    hash.update(bytes);
    yield bytes;
  }
}

/** Returns how many differences there are between what was restored and its sources. */
async function compareRestored(tx: Transaction, run: BackupRun & { yes: boolean }) {
  const { paths, say } = run;
  const all = await listRecountable(tx);
  const { missing: gone } = await locateSources(all, paths);
  if (gone.length === 0) {
    const { differing, behind, points } = await compare(tx, run);
    return differing + behind.length + points.length;
  }
  sayLines(gone.map(describeMissing).join("\n"));
  if (await keepRest(tx, { ...run, all, gone })) return 0;
  say(
    "the balances include what they have added, which is not verified: --verify with their paths does that, or " +
      "--retire keeps it without them",
  );
  return 0;
}

function refuse(reason: string): never {
  throw new CannotProceed(reason);
}
