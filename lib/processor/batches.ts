/**
 * Batches: what a journal or a file holds from its checkpoint on, folded.
 *
 * A file is known by its name, without the folder, and by its bytes. The checkpoint of each generation
 * says how many bytes are posted and what their SHA-256 is. A file that begins with exactly those bytes
 * resumes after them; a file of the same name that begins otherwise is the next generation, and is
 * posted whole.
 */
import { open } from "node:fs/promises";

import type { Change } from "../event/event.ts";
import { explainOther, matchGenerations, REWRITTEN } from "../event/generations.ts";
import { DamagedInput, explainNuls, type Input, openInput, sourceName } from "../event/input.ts";
import {
  type Block,
  isComplete,
  readAhead,
  readBlocks,
  readHandle,
  withoutBom,
} from "../event/lines.ts";
import { encodeJournalHeader, JournalBehind, JournalUnavailable } from "../journal/format.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import {
  type Checkpoint,
  fileKey,
  frameDigest,
  journalKey,
  listFileCheckpoints,
  openCheckpoint,
  parseFrameDigest,
  readPosted,
} from "../ledger/checkpoints.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import type { Batch } from "../ledger/ledger.ts";
import { readSnapshotEnd } from "../ledger/reconcile.ts";
import { type BatchLimit, Fold, MAX_BATCH_BYTES } from "./fold.ts";
import type { Report } from "./supervisor.ts";

/** While a posting is in progress, the journal is polled this often for more. */
const POLL_MS = 10;
/**
 * Where events arrived while a posting was in progress, the next one waits for this many polls more. Each posting
 * syncs the journal and is a transaction: 300 a second took almost half of the speed of `POST /liveEvent`.
 */
const GATHERING_POLLS = 2;
/** After a read that found less, the next one waits: a server may commit 1,000 small frames a second. */
const BACKLOG_BYTES = 256 * 1024;
const BLOCK_BYTES = 1024 * 1024;

export interface BatchReader extends AsyncDisposable {
  /** Where it began: at the checkpoint. */
  readonly from: number;
  /** How many bytes there are, when it was opened. */
  readonly bytes: number;
  /** For a compressed file: about where in the file an offset is. */
  fileOffset?(offset: number): number;
  /**
   * The next batch, or `null` when everything complete has been given. It cannot be posted before
   * `posting` settles: what arrives until then can be part of it.
   */
  next(posting: Promise<unknown>): Promise<Batch | null>;
}

/** What batches are made of. */
export interface BatchSource {
  database: Database;
  path: string;
  limit: BatchLimit;
  /** How far sources are posted, where that is further than the journal expects (see Fold). */
  ahead: ReadonlyMap<string, number>;
  /** The lines that Postgres refuses, by position, with its reasons. */
  refused?: ReadonlyMap<number, string>;
  /** Called with each event that counts (see Fold). */
  counted?: ((position: number, change: Change) => void) | undefined;
  /** Opens the journal again: what it holds may have been deleted. */
  reopen?: () => Promise<JournalReader | null>;
  /** Called with the offset up to which lines are folded, block after block. */
  folded?(offset: number): void;
  /** Gets the end of a file once it is seen. */
  report?(report: Report): void;
}

/**
 * Batches of `journal` from its checkpoint on. Calls `leftOver` with the bytes at its end that are not a whole
 * frame. Throws JournalBehind, JournalDamage or Unavailable.
 */
export async function openJournalBatches(
  {
    database,
    path,
    limit,
    ahead,
    refused,
    counted,
    folded,
    report,
    reopen = () => openJournalReader(path),
  }: BatchSource,
  journal: JournalReader,
  leftOver?: (what: string) => void,
): Promise<BatchReader> {
  const key = journalKey(journal.id);
  const checkpoint = await openCheckpoint(database, key, null);
  await checkCheckpoint(checkpoint, path, { journal, reopen, database });
  const posted = new Map(ahead);
  const { position: from } = checkpoint;
  let position = from;

  return {
    from,
    bytes: await journal.end(),
    async next(posting) {
      let isPosting = true;
      const settled = () => (isPosting = false);
      const ready = posting.then(settled, settled);
      const fold = new Fold(limit.maxUsers, posted, refused, counted);
      const start = position;
      let digest = "";
      let isBusy = false;
      let polls = 0;
      while (!fold.isFull && position - start < MAX_BATCH_BYTES) {
        const before = position;
        const frames = await journal.read(position).catch((error) => unlessPosted(error, start));
        for (const { from, to, header, payload, atMs } of frames) {
          fold.addFrame(payload, to - payload.length, atMs);
          digest = frameDigest(from, header);
          position = to;
          if (fold.isFull) break;
        }
        if (frames.length > 0) folded?.(position);
        const isBacklog = position - before >= BACKLOG_BYTES;
        if (isBacklog || (frames.length > 0 && !isPosting && !isBusy)) continue;
        if (position === start) break;
        // When idle, an event is posted at once: it arrived while nothing was being posted.
        if (!isPosting && (!isBusy || ++polls > GATHERING_POLLS)) break;
        isBusy ||= isPosting;
        await (isPosting ? Promise.race([ready, Bun.sleep(POLL_MS)]) : Bun.sleep(POLL_MS));
      }
      if (position === start) {
        if (leftOver) await checkEnd(leftOver);
        return null;
      }
      if (leftOver && (await journal.end()) === position)
        report?.({ type: "end", bytes: position - from });
      for (const [source, { to }] of fold.sources) if (posted.has(source)) posted.set(source, to);
      await syncUpTo(position);
      return fold.batch({ key, from: start, to: position, digest });
    },
    async [Symbol.asyncDispose]() {},
  };

  async function checkEnd(leftOver: (what: string) => void): Promise<void> {
    const end = await journal.end();
    const headerBytes = encodeJournalHeader(journal.id, position).length;
    // A file of the journal may have nothing but its header yet, and a server may be writing to it.
    if (end - position === headerBytes || (await journal.read(position)).length > 0) return;
    const bytes = end - position - (position === journal.start ? headerBytes : 0);
    if (bytes > 0)
      leftOver(
        `: the last ${bytes} bytes are not a whole frame of the journal: left for the next run`,
      );
  }

  /** What cannot be read may have been posted by another processor, and deleted. */
  async function unlessPosted(error: unknown, start: number): Promise<never> {
    if (error instanceof JournalUnavailable) throw error;
    if ((await readPosted(database, journal.id)) <= start) throw error;
    throw new Unavailable("another processor has posted and deleted this segment", true);
  }

  /** What the writer has not synced yet could still be lost: the ledger must not be ahead of the disk. */
  async function syncUpTo(position: number): Promise<void> {
    await journal.sync();
    // A frame whose sync failed is truncated by the writer, although ours may have succeeded.
    if ((await journal.end(position)) < position)
      throw new Error(`${path}: its writer has truncated a frame that it could not sync`);
  }
}

/** The ledger is older than the segments that were removed: an older dump of it was restored. */
class JournalIncomplete extends Error {
  constructor(
    path: string,
    at: { key: string; position: number; start: number; snapshotTo: number },
  ) {
    const { key, position, start, snapshotTo } = at;
    const way =
      snapshotTo >= start
        ? "The snapshot in the ledger holds what they added: run bun run processor.ts --rebuild"
        : "Put them back from a backup of DATA_DIR. If there is none, bun run processor.ts --retire " +
          `${key} --yes continues after them, without their events`;
    super(
      `the ledger has posted ${path} up to position ${position}, but its oldest segment begins at ${start}: the ` +
        `segments in between were removed. ${way}`,
    );
  }
}

/** Throws where the journal does not hold what the ledger has posted of it. */
async function checkCheckpoint(
  { position, digest }: Checkpoint,
  path: string,
  {
    journal,
    reopen,
    database,
  }: Required<Pick<BatchSource, "database" | "reopen">> & { journal: JournalReader },
): Promise<void> {
  const end = await journal.end(position);
  const posted = `the ledger has posted it up to position ${position}`;
  if (position > end)
    throw new JournalBehind(path, `${posted}, but it ends at ${end}`, journal.remedy(false));
  if (position < journal.start) {
    const key = journalKey(journal.id);
    const snapshotTo = await database.use((sql) => readSnapshotEnd(sql, key));
    throw new JournalIncomplete(path, { key, position, start: journal.start, snapshotTo });
  }
  const last = parseFrameDigest(digest);
  if (!last) return;
  // An older copy that was restored and has grown since holds other events at these positions.
  const found = await journal.read(last.position).catch((error: Error) => error);
  const frame = found instanceof Error ? null : found[0];
  if (frame?.header === last.header && frame.to === position) return;
  // Asked only now: what is posted may be deleted at any moment.
  if (last.position < ((await reopen())?.start ?? 0)) return;
  if (found instanceof JournalUnavailable) throw found;
  if (found instanceof Error)
    throw new Error(
      `${found.message}. If --check finds no damage, an older copy was restored and has grown since: ${journal.remedy(true)}`,
    );
  const what = `the ledger has posted another frame at position ${last.position}: ${last.header}`;
  throw new JournalBehind(path, what, journal.remedy(true));
}

/**
 * Batches of the file at `path` from its checkpoint on. The file stays the one that was opened, even if
 * another one takes its name. Calls `leftOver` with the bytes at its end that are not a whole event yet, and
 * when it was rewritten meanwhile; `note` when it is another file than before. Throws Unavailable.
 */
export async function openFileBatches(
  { database, path, limit, refused, counted, folded, report }: BatchSource,
  { leftOver, note }: { leftOver(what: string): void; note(line: string): void },
): Promise<BatchReader> {
  await using opening = new AsyncDisposableStack();
  const handle = opening.use(await open(path));
  const { size, mtimeMs } = await handle.stat();
  const input = await openInput(readHandle(handle));
  const name = sourceName(path, input.compression);
  const { key, from, hash, other } = await findGeneration(database, input, name).catch(named);
  if (other) note(`${path} ${other}`);
  // One is read while the one before is folded.
  const blocks = readAhead(readBlocks(input.read, from, BLOCK_BYTES));
  opening.defer(async () => void (await blocks.return(null)));
  const opened = opening.move();
  let offset = from;
  let hasCheckedEnd = false;

  return {
    from,
    bytes: size,
    fileOffset: input.fileOffset,
    async next() {
      const fold = new Fold(limit.maxUsers, new Map(), refused, counted);
      const start = offset;
      while (!fold.isFull && offset - start < MAX_BATCH_BYTES) {
        const { value: block } = await blocks.next().catch(named);
        const isCut = block && !block.whole && !isComplete(block.bytes);
        if (!block) await checkEnd();
        if (isCut) {
          const what = `the last line (${block.to - block.from} bytes) has no newline and is not a whole event`;
          leftOver(`: ${what}: left for the next run`);
        }
        if (!block || isCut) {
          report?.({ type: "end", bytes: offset - from });
          break;
        }
        addBlock(fold, block);
        hash.update(block.bytes);
        offset = block.to;
        folded?.(offset);
      }
      if (offset === start) return null;
      const digest = hash.copy().digest("hex");
      return fold.batch({ key, from: start, to: offset, digest });
    },
    [Symbol.asyncDispose]: () => opened.disposeAsync(),
  };

  async function checkEnd(): Promise<void> {
    if (hasCheckedEnd) return;
    hasCheckedEnd = true;
    const now = await handle.stat();
    const count = await input.countNuls(offset, now.size);
    if (count > 0) leftOver(` ${explainNuls(path, count)}`);
    if (input.compression || now.mtimeMs === mtimeMs) return;
    const posted = { offset, digest: hash.copy().digest("hex") };
    if ((await matchGenerations(input.readAll, [posted])).length === 0) leftOver(` ${REWRITTEN}`);
  }

  function named(error: unknown): never {
    if (!(error instanceof DamagedInput)) throw error;
    throw new DamagedInput(`${path}: ${error.message}`);
  }
}

function addBlock(fold: Fold, block: Block): void {
  if (block.tooLong === "first part")
    fold.quarantine(block.bytes, block.from, "too long to be an event");
  const lines = linesOf(block);
  fold.addLines(lines.bytes, lines.from);
  // If the file grows, a line ends here all the same.
  if (!block.whole) fold.leaveOut(block.to, block.to, "end of a line without newline");
}

/** The lines of a block of a file, and the offset of their first byte. */
export function linesOf(block: Block): { bytes: Uint8Array; from: number } {
  if (block.tooLong) return { bytes: new Uint8Array(), from: block.from };
  const bytes = block.from === 0 ? withoutBom(block.bytes) : block.bytes;
  return { bytes, from: block.from + block.bytes.length - bytes.length };
}

/** The generation of a file whose posted bytes it begins with, or a new one. `hash` is of those bytes. */
async function findGeneration(
  database: Database,
  input: Input,
  name: string,
): Promise<{ key: string; from: number; hash: Bun.CryptoHasher; other?: string | undefined }> {
  const known = await listFileCheckpoints(database, name);
  const generations = known.map((each) => ({ ...each, offset: each.position }));
  const match = (await matchGenerations(input.readAll, generations)).at(-1);
  if (match) return { key: match.generation.key, from: match.generation.offset, hash: match.hash };

  const key = fileKey(name, Math.max(0, ...known.map(({ generation }) => generation)) + 1);
  const hash = new Bun.CryptoHasher("sha256");
  const { position } = await openCheckpoint(database, key, hash.copy().digest("hex"));
  // If another process has opened this generation and posted some of it, its bytes are compared.
  if (position > 0) return findGeneration(database, input, name);
  const stored = known.findLast((each) => each.position > 0);
  return { key, from: 0, hash, other: stored && explainOther(stored.position, stored.key, key) };
}
