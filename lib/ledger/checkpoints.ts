/**
 * Checkpoints: how far each journal, file and source has been posted. A row has a key, a position, and a
 * digest that tells whether what is there now is still what was posted:
 *
 *     key                  of                             digest
 *     journal:<id>         a journal                      where its last posted frame begins, and that frame's header
 *     file:<name>#<n>      generation n of a file that    SHA-256 (hex) of the bytes before the position
 *                          `processor.ts FILE` posted
 *     sent:<name>          a source that came over HTTP   the sender's SHA-256 (hex) of the same, or of
 *                                                         the first N of them: SHA-256@N
 *
 * Keys and digests are made and parsed here and nowhere else. In the tables of the ledger the key is the
 * column `source`. Positions are read as float8, which is exact: they are below 2^53.
 */
import { arrayLiteral, type Database, READ_DEADLINE_MS } from "./database.ts";

export interface Checkpoint {
  key: string;
  position: number;
  digest: string | null;
}

export function journalKey(journalId: string): string {
  return `journal:${journalId}`;
}

/** The key of a source that came over HTTP. */
export function sentKey(name: string): string {
  return `sent:${name}`;
}

export function fileKey(name: string, generation: number): string {
  return `file:${name}#${generation}`;
}

/** The id of a journal, or the name of a file with its generation. */
export function parseKey(key: string): { name: string; generation: number | null } {
  const [, name = "", generation] = /^file:(.*)#(\d+)$/s.exec(key) ?? /^\w+:(.*)$/s.exec(key) ?? [];
  return { name, generation: generation === undefined ? null : Number(generation) };
}

/** The digest of a journal's checkpoint: its last posted frame, which begins at `position`. */
export function frameDigest(position: number, header: string): string {
  return `${position} ${header}`;
}

/** The frame that a journal's checkpoint names, or `null` if it names none. */
export function parseFrameDigest(
  digest: string | null,
): { position: number; header: string } | null {
  const [, position, header] = /^(\d+) (.*)$/.exec(digest ?? "") ?? [];
  return header === undefined ? null : { position: Number(position), header };
}

/** A digest for a place in a source whose own digest nobody knows: that of its first `offset` bytes. */
export function earlierDigest(offset: number, digest: string): string {
  return `${digest}@${offset}`;
}

/** How much of a source is posted for certain, from its checkpoint; `null` if nothing is. */
export function parseSent({
  position,
  digest,
}: Checkpoint): { offset: number; digest: string } | null {
  const [, earlier, offset] = /^(.*)@(\d+)$/.exec(digest ?? "") ?? [];
  if (earlier !== undefined) return { offset: Number(offset), digest: earlier };
  return digest ? { offset: position, digest } : null;
}

/** The position up to which the ledger has posted the journal; 0 if it has posted nothing. Throws Unavailable. */
export async function readPosted(database: Database, journalId: string): Promise<number> {
  return (await readCheckpoint(database, journalKey(journalId)))?.position ?? 0;
}

/** The checkpoint of `key`, created at position 0 if there is none. Throws Unavailable. */
export async function openCheckpoint(
  database: Database,
  key: string,
  digest: string | null,
): Promise<Checkpoint> {
  const [checkpoint] = await database.use(
    (sql) => sql<Checkpoint[]>`
      with created as (
        insert into checkpoints (source, position, digest)
        values (${key}, 0, ${digest})
        on conflict do nothing returning source, position, digest
      )
      select source as key, position::float8, digest from created union all
      select source, position, digest from checkpoints where source = ${key}`,
  );
  // No row comes back if another process created it after this statement began: ask again.
  return checkpoint ?? openCheckpoint(database, key, digest);
}

/** The generations of the file `name` that the ledger knows. Throws Unavailable. */
export async function listFileCheckpoints(
  database: Database,
  name: string,
): Promise<(Checkpoint & { generation: number })[]> {
  const rows = await database.use(
    (sql) => sql<Checkpoint[]>`
      select source as key, position::float8, digest from checkpoints
      where starts_with(source, ${`file:${name}#`})`,
  );
  return rows.flatMap((row) => {
    const { name: found, generation } = parseKey(row.key);
    // A file may be named `NAME#2`: its keys begin with the same characters.
    return found === name && generation !== null ? [{ ...row, generation }] : [];
  });
}

/** The checkpoint of `key`, or `null` if there is none. Throws Unavailable. */
export async function readCheckpoint(database: Database, key: string): Promise<Checkpoint | null> {
  const [checkpoint] = await readCheckpoints(database, [key]);
  return checkpoint ?? null;
}

/** Those of the checkpoints with these keys that exist. Throws Unavailable. */
export function readCheckpoints(database: Database, keys: string[]): Promise<Checkpoint[]> {
  return database.use(
    (sql) => sql<Checkpoint[]>`
      select source as key, position::float8, digest from checkpoints
      where source = any(${arrayLiteral(keys)}::text::text[])`,
    READ_DEADLINE_MS,
  );
}

/** Those of the checkpoints with these keys that a transaction has locked, to post from them. Throws Unavailable. */
export async function listLocked(database: Database, keys: string[]): Promise<string[]> {
  const wanted = arrayLiteral(keys);
  const rows = await database.use(
    (sql) => sql<{ key: string }[]>`
      select source as key from checkpoints where source = any(${wanted}::text::text[])
      except
      select source from (
        select source from checkpoints where source = any(${wanted}::text::text[])
        for key share skip locked
      ) as free`,
    READ_DEADLINE_MS,
  );
  return rows.map(({ key }) => key);
}

/** Clears a checkpoint's digest, because the frame that it names no longer exists. Throws Unavailable. */
export async function clearDigest(database: Database, { key, digest }: Checkpoint): Promise<void> {
  await database.use(
    (sql) => sql`
      update checkpoints set digest = null where source = ${key} and digest = ${digest}`,
  );
}
