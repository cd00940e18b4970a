/**
 * `processor.ts --backup DIR`. A backup is a folder, which `--restore DIR` (restore.ts) reads:
 *
 *     journal/       the journal's files, under their own names
 *     ledger/        a file for each table, as COPY writes it
 *     backup.json    what is in the two; written last, so a folder without it is an interrupted backup
 *
 * The ledger is copied as of one moment, and the active file of the journal after that moment: so the
 * ledger of a backup is never ahead of its journal, while events are accepted and posted. What keeps other
 * recounts out keeps segments from being deleted.
 */
import { existsSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";

import { version } from "../../package.json";
import { copyRest, linkSegments } from "../journal/copy.ts";
import { disk } from "../journal/disk.ts";
import { JournalBehind } from "../journal/format.ts";
import { openJournalReader } from "../journal/reader.ts";
import { journalKey } from "../ledger/checkpoints.ts";
import { copyOut, listColumns, TABLES } from "../ledger/copy.ts";
import { CannotProceed, LEDGER_VERSION, type Transaction } from "../ledger/database.ts";
import { listRecountable, type Recountable, withRecountLock } from "../ledger/reconcile.ts";
import { counted } from "../progress.ts";
import type { Reconciliation } from "./recount.ts";

export const MANIFEST = "backup.json";
/** The version of the folder's layout. */
export const FORMAT = 1;
/** Rows of COPY are short: without gathering them, each would be a write. */
const MIN_WRITE_BYTES = 256 * 1024;

export interface BackupRun extends Reconciliation {
  /** DIR */
  folder: string;
  /** The active file of the journal in DATA_DIR. */
  journal: string;
}

export interface File {
  name: string;
  bytes: number;
}
export interface Table extends File {
  columns: string[];
  sha256: string;
}
export interface Manifest {
  format: number;
  daybook: string;
  ledger: number;
  at: string;
  journal: File[];
  tables: Table[];
}

/** Writes a backup into `folder`, which is created. Throws CannotProceed if something is in it. */
export async function backup({ database, folder, journal, print, say }: BackupRun): Promise<void> {
  requireUnused(folder);
  const to = join(folder, "journal");
  for (const path of [to, join(folder, "ledger")]) await disk.makeDirectory(path);
  const tables = await withRecountLock(database, say, async (tx) => {
    await linkSegments(journal, to);
    const tables = await copyTables(tx, join(folder, "ledger"));
    await copyRest(journal, to);
    await requireMatch(await listRecountable(tx), { journal, to, say });
    return tables;
  });
  const files = await listFiles(to);
  const at = new Date().toISOString();
  const manifest = { format: FORMAT, daybook: version, ledger: LEDGER_VERSION, at };
  await writeManifest(folder, { ...manifest, journal: files, tables });
  const bytes = [...files, ...tables].reduce((sum, file) => sum + file.bytes, 0);
  print(
    `backup in ${folder}: ${counted(files.length, "file")} of the journal, ` +
      `${counted(tables.length, "table")} of the ledger, ${counted(bytes, "byte")}`,
  );
}

function requireUnused(folder: string): void {
  const names = existsSync(folder) ? readdirSync(folder) : [];
  if (names.length === 0) return;
  const what = names.includes(MANIFEST)
    ? "holds a backup"
    : `is not empty, and holds no ${MANIFEST}: a backup was interrupted, or something else is in it`;
  throw new CannotProceed(`${folder} ${what}: remove it, or name another folder`);
}

async function copyTables(tx: Transaction, to: string): Promise<Table[]> {
  const tables: Table[] = [];
  for (const name of TABLES) {
    const columns = await listColumns(tx, name);
    tables.push({ name, columns, ...(await writeRows(tx, join(to, name), { name, columns })) });
  }
  await disk.syncDirectory(to);
  return tables;
}

async function writeRows(
  tx: Transaction,
  path: string,
  { name: table, columns }: Pick<Table, "name" | "columns">,
) {
  const hash = new Bun.CryptoHasher("sha256");
  const file = await disk.openForAppend(path);
  let bytes = 0;
  let waiting: Uint8Array[] = [];
  let waitingBytes = 0;
  const write = async () => {
    const chunk = Buffer.concat(waiting);
    hash.update(chunk);
    await file.append(chunk);
    bytes += chunk.length;
    [waiting, waitingBytes] = [[], 0];
  };
  try {
    for await (const rows of copyOut(tx, { table, columns })) {
      waiting.push(rows);
      waitingBytes += rows.length;
      if (waitingBytes >= MIN_WRITE_BYTES) await write();
    }
    await write();
    await file.sync();
  } finally {
    await file.close();
  }
  return { bytes, sha256: hash.digest("hex") };
}

/** Throws where the journal in `to` would not be enough for this ledger. Names sources that are elsewhere. */
async function requireMatch(
  sources: Recountable[],
  { journal, to, say }: { journal: string; to: string; say(line: string): void },
): Promise<void> {
  const copied = await openJournalReader(join(to, basename(journal)));
  for (const { key, position, removedTo } of sources) {
    if (removedTo >= position) continue;
    if (!copied || key !== journalKey(copied.id)) {
      say(`not in this backup: ${key}; back up what it names as well, and name it to --restore`);
      continue;
    }
    const end = await copied.end();
    if (end < position)
      throw new JournalBehind(
        journal,
        `it ends at ${end}, but is posted up to ${position}`,
        copied.remedy(false),
      );
    if (copied.start > removedTo)
      throw new CannotProceed(
        `${journal} begins at position ${copied.start}, but the ledger needs it from ${removedTo}: restore its older segments`,
      );
  }
}

async function listFiles(folder: string): Promise<File[]> {
  const names = readdirSync(folder).toSorted();
  return Promise.all(
    names.map(async (name) => ({ name, bytes: await disk.size(join(folder, name)) })),
  );
}

async function writeManifest(folder: string, manifest: Manifest): Promise<void> {
  const making = join(folder, `${MANIFEST}.making`);
  const file = await disk.openForAppend(making);
  try {
    await file.append(Buffer.from(`${JSON.stringify(manifest, null, 2)}\n`));
    await file.sync();
  } finally {
    await file.close();
  }
  await disk.rename(making, join(folder, MANIFEST));
  await disk.syncDirectory(folder);
}
