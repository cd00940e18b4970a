/**
 * Posting: batch after batch, from the journal as it grows or from a file to its end. Each attempt
 * begins at the checkpoint, so what was interrupted is continued, and nothing is repeated:
 *
 *     done       everything is posted
 *     stopped    it was asked to, and the batch under way was posted
 *     elsewhere  another processor has moved the checkpoint, or is about to
 *     ahead      sources are further than the journal expects: the next attempt knows where they are
 *     failed     with an error; if it is transient, the next attempt may succeed
 */
import { join } from "node:path";

import type { SettingsOf } from "../config.ts";
import { getEventTypes } from "../event/event.ts";
import { JournalUnavailable } from "../journal/format.ts";
import { type JournalReader, openJournalReader, openNamedJournal } from "../journal/reader.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { openPruning } from "../ledger/boundary.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import {
  type Batch,
  countQuarantined,
  type Counts,
  noteEventTypes,
  type Outcome,
  post,
} from "../ledger/ledger.ts";
import { counted } from "../progress.ts";
import { foldPoints } from "../ledger/points.ts";
import { watchDirectory } from "../watch.ts";
import {
  type BatchReader,
  type BatchSource,
  openFileBatches,
  openJournalBatches,
} from "./batches.ts";
import { openAging } from "./aging.ts";
import { BatchLimit, MIN_USERS } from "./fold.ts";
import { findRefusedOf, requireWritableBalances } from "./refusals.ts";
import { DiskFull, type Room } from "./room.ts";
import { QUARANTINE_REASONS, type Quarantined, type Report } from "./supervisor.ts";

/** A file fails when the database has been unavailable for this long; the journal waits for ever. */
const FILE_PATIENCE_MS = 60_000;
/**
 * Force a collection after this many bytes released: buffers look small to the collector, which then
 * waits too long.
 */
const GARBAGE_BYTES = 16 * 1024 * 1024;
/** What the arrays of the claim before have taken in the driver. */
const CLAIM_GARBAGE_BYTES = 250;
const AGE_EVERY_MS = 60_000;
const NOTICE_EVERY_MS = 60_000;
const QUARANTINED_AS = {
  invalid: "(not an event)",
  refused: "(refused by Postgres)",
  conflict: "(its id belongs to another event)",
};
/** Others may post meanwhile, so that more lines are refused each time. */
const MAX_SEARCHES = 10;
const FIRST_PAUSE_MS = 100;
const MAX_PAUSE_MS = 2_000;
/** A pause before the next attempt at the journal: after a transient error, and after another. */
const RETRY_MS = 200;
const RETRY_ERROR_MS = 2_000;

export interface Context {
  database: Database;
  /** The room on the disk of the embedded Postgres; `null` for a Postgres elsewhere. */
  room: Room | null;
  /** Ends the posting once the batch under way is posted. */
  stop: AbortSignal;
  report(report: Report): void;
}

type Posted = Extract<Report, { type: "posted" }>;
type Attempt =
  | Exclude<Outcome, { state: "posted" }>
  | { state: "done" | "stopped" }
  | { state: "failed"; error: Error; isTransient: boolean };

/** What is posted: the journal, or a file. */
interface Posting extends Context {
  limit: BatchLimit;
  /** Where sources are that are further than the journal expects, by checkpoint key. */
  ahead: ReadonlyMap<string, number>;
  /** Lines that Postgres refuses, by position; they go to quarantine. */
  refused: Map<number, string>;
  /** How often in a row lines were searched, and the batch was refused again. */
  searches: number;
  /** A batch that was refused because Postgres refuses every change of the table. */
  blocked: Batch | null;
  /** A batch that was sent to the ledger, and of which it is not known whether it was posted. */
  sent: Batch | null;
  /** The batch that the attempt before had sent, whose COMMIT may still be in progress. */
  sentBefore: Batch | null;
  /** Opens the batches at the checkpoint; `null` if there is nothing to post yet. */
  open(counted?: BatchSource["counted"]): Promise<BatchReader | null>;
  opened?(batches: BatchReader): void;
  folded?(offset: number): void;
  posted(posted: Posted): void;
  /** Work to do between two batches. */
  between?(): Promise<void>;
  /** Waits at the end until there may be more; without it, the end is the end. */
  more?(): Promise<void>;
}

/** Posts the journal in DATA_DIR as it grows, until it is stopped. */
export async function follow(
  { DATA_DIR, ID_DAYS }: Pick<SettingsOf<"processor">, "DATA_DIR" | "ID_DAYS">,
  context: Context,
): Promise<void> {
  const path = join(DATA_DIR, JOURNAL_FILE);
  const directory = watchDirectory(DATA_DIR);
  context.stop.addEventListener("abort", directory.close);
  const open = () => openJournalReader(path);
  const upkeep = openUpkeep(context, ID_DAYS);
  await followJournal({ path, open, next: directory.next, upkeep }, context);
}

/** A journal that is followed. */
export interface Followed {
  /** For messages. */
  path: string;
  /** `null` if it is not there yet. */
  open(): Promise<JournalReader | null>;
  /** Waits until there may be more. */
  next(): Promise<void>;
  upkeep: Upkeep;
  /** Whether it is left to another processor that posts it. */
  isShared?: boolean;
}

/** Posts a journal as it grows, until it is stopped, or left to another processor. Waits while something is wrong. */
export async function followJournal(
  { path, open, next, upkeep, isShared = false }: Followed,
  context: Context,
): Promise<void> {
  const { stop, report } = context;
  let waiting: string | null | undefined;
  const posting: Posting = {
    ...context,
    ...startOfPosting(),
    async open(counted) {
      const journal = await open();
      if (!journal) await next();
      return journal && openJournalBatches({ path, ...posting, counted, reopen: open }, journal);
    },
    posted(posted) {
      upkeep.noteQuarantined(posted.quarantined);
      wait(null);
      report(posted);
    },
    between: () => upkeep.between(posting.limit),
    more() {
      wait(null); // nothing is left to post
      return next();
    },
  };
  while (!stop.aborted) {
    const attempted = await attempt(posting);
    if (attempted.state === "elsewhere" && isShared) return;
    // What holds the checkpoint may be an earlier posting of this processor, whose connection was lost.
    if (attempted.state === "elsewhere") await Bun.sleep(RETRY_MS);
    if (attempted.state !== "failed") continue;
    const { isTransient, error } = attempted;
    wait(error.message, !isTransient || error instanceof DiskFull);
    await Bun.sleep(isTransient ? RETRY_MS : RETRY_ERROR_MS);
  }

  /** Reports why posting waits, or with `null` that it does not. */
  function wait(why: string | null, isPaused = false) {
    if (why === waiting) return;
    if (why !== null) report({ type: "say", level: "warn", line: `processor: waiting; ${why}` });
    else if (waiting) report({ type: "say", line: "processor: posting again" });
    waiting = why;
    report({ type: "waiting", why, isPaused });
  }
}

/** What a processor does beside posting, between two batches. */
export type Upkeep = ReturnType<typeof openUpkeep>;

export function openUpkeep({ database, report }: Context, idDays: number) {
  const age = openAging(database);
  const prune = openPruning(database, idDays);
  const noteQuarantined = openQuarantineNotice((line) =>
    report({ type: "say", level: "warn", line }),
  );
  let agingDueMs = 0;
  return {
    noteQuarantined,
    /** Deletes old ids, some at a time, so that no posting waits for long. */
    async between({ roomForUsers }: BatchLimit): Promise<void> {
      noteQuarantined();
      const isTight = roomForUsers < MIN_USERS; // what deletes rows is logged, too
      if (isTight || performance.now() < agingDueMs) return;
      agingDueMs = Number.POSITIVE_INFINITY; // nobody else begins meanwhile
      try {
        await age();
        while (await foldPoints(database));
        agingDueMs = performance.now() + ((await prune()) ? 0 : AGE_EVERY_MS);
      } catch (error) {
        agingDueMs = 0;
        throw error;
      }
    },
  };
}

/**
 * Posts what is in a file or journal and not posted yet. Returns false if it was stopped before. Throws
 * what keeps it from being posted.
 */
export async function postFile(path: string, context: Context): Promise<boolean> {
  const { stop, report } = context;
  let deadlineMs = performance.now() + FILE_PATIENCE_MS;
  let pauseMs = FIRST_PAUSE_MS;
  let offset = 0;
  let fileOffset = (offset: number) => offset;
  let hasLeftOver = false;
  let saidWhy = "";
  const posting: Posting = {
    ...context,
    ...startOfPosting(),
    async open(counted) {
      const openedMs = performance.now();
      const journal = await openNamedJournal(path);
      const batches = journal
        ? await openJournalBatches({ path, ...posting, counted }, journal, leftOver)
        : await openFileBatches({ path, ...posting, counted }, { leftOver, note });
      // A large file that is posted in part is hashed up to there: that uses up no patience.
      deadlineMs += performance.now() - openedMs;
      return batches;
    },
    opened(batches) {
      const { from, bytes } = batches;
      fileOffset = batches.fileOffset ?? ((offset) => offset);
      offset = from;
      report({ type: "opened", file: path, bytes, from: fileOffset(from) });
    },
    folded(offset) {
      report({ type: "folded", fileOffset: fileOffset(offset) });
    },
    posted(posted) {
      offset += posted.bytes;
      deadlineMs = performance.now() + FILE_PATIENCE_MS;
      pauseMs = FIRST_PAUSE_MS;
      report({ ...posted, fileOffset: fileOffset(offset) });
    },
  };
  while (!stop.aborted) {
    const attempted = await attempt(posting);
    if (attempted.state === "done") return true;
    // Another processor posts the same file: look again, in case it dies.
    if (attempted.state === "elsewhere") deadlineMs = performance.now() + FILE_PATIENCE_MS;
    if (attempted.state === "failed") {
      const { error, isTransient } = attempted;
      if (!isTransient || performance.now() > deadlineMs) throw error;
      if (pauseMs > 1_000 && error.message !== saidWhy) {
        saidWhy = error.message;
        report({ type: "say", line: `${path}: waiting; ${saidWhy}` });
      }
    }
    if (attempted.state === "ahead" || attempted.state === "refused") continue;
    await Bun.sleep(pauseMs);
    pauseMs = Math.min(pauseMs * 2, MAX_PAUSE_MS);
  }
  return false;

  function note(line: string) {
    report({ type: "say", line });
  }

  function leftOver(what: string) {
    if (hasLeftOver) return; // another attempt finds it again
    hasLeftOver = true;
    report({ type: "leftOver", line: `${path}${what}` });
  }
}

/**
 * Returns a function that says what was quarantined: at once, then at most once a minute, however many
 * lines a sender causes to be quarantined.
 */
function openQuarantineNotice(say: (line: string) => void) {
  const unsaid: Quarantined = { invalid: 0, refused: 0, conflict: 0 };
  let dueMs = 0;
  return (quarantined?: Quarantined): void => {
    for (const reason of QUARANTINE_REASONS) unsaid[reason] += quarantined?.[reason] ?? 0;
    const parts = QUARANTINE_REASONS.filter((reason) => unsaid[reason] > 0);
    if (parts.length === 0 || performance.now() < dueMs) return;
    dueMs = performance.now() + NOTICE_EVERY_MS;
    const counts = parts.map(
      (reason) => `${counted(unsaid[reason], "line")} ${QUARANTINED_AS[reason]}`,
    );
    say(`processor: quarantined ${counts.join(", ")}; see bun run processor.ts --quarantine`);
    for (const reason of parts) unsaid[reason] = 0;
  };
}

function startOfPosting() {
  return {
    limit: new BatchLimit(),
    ahead: new Map<string, number>(),
    refused: new Map<number, string>(),
    searches: 0,
    blocked: null,
    sent: null,
    sentBefore: null,
  };
}

/** Opens the batches and posts them to the end. */
async function attempt(posting: Posting): Promise<Attempt> {
  try {
    if (posting.blocked) await requireWritableBalances(posting.database, posting.blocked);
    posting.blocked = null;
    await noteEventTypes(posting.database, getEventTypes());
    await using batches = await posting.open();
    if (!batches) return { state: "done" };
    const { sent } = posting;
    // The answer to its COMMIT was lost, but not the COMMIT.
    if (sent && batches.from === sent.to) {
      const conflicts = (await countQuarantined(posting.database, sent)) - sent.quarantined.length;
      posting.posted(reportOf(sent, { ...sent, conflicts }, 0));
    }
    posting.sent = null;
    posting.sentBefore = sent?.from === batches.from ? sent : null;
    posting.opened?.(batches);
    const ended = await postBatches(batches, posting);
    // Another processor has posted it, or the attempt before is still committing it.
    posting.sent = ended.state === "elsewhere" ? posting.sentBefore : null;
    posting.ahead = ended.state === "ahead" ? ended.posted : new Map();
    if (ended.state === "refused") await searchRefused(ended, posting);
    return ended;
  } catch (error) {
    const isTransient =
      error instanceof DiskFull ||
      error instanceof JournalUnavailable ||
      (error instanceof Unavailable && error.isTransient);
    return { state: "failed", error: error as Error, isTransient };
  }
}

/** Adds the lines that Postgres refuses of a batch to those that go to quarantine. */
async function searchRefused(
  { batch, reason }: { batch: Batch; reason: string },
  posting: Posting,
): Promise<void> {
  posting.blocked = batch;
  const found = await findRefusedOf(batch, reason, posting);
  posting.blocked = null;
  const isNew = [...found.keys()].some((position) => !posting.refused.has(position));
  for (const [position, why] of found) posting.refused.set(position, why);
  if (isNew && ++posting.searches <= MAX_SEARCHES) return;
  posting.searches = 0;
  const what = `it refuses a batch, and its lines cannot be found (${reason}); posting pauses`;
  throw new Unavailable(what, false);
}

/** Posts batch after batch, folding one while the one before is under way. */
async function postBatches(batches: BatchReader, posting: Posting): Promise<Attempt> {
  let underWay: Promise<Outcome | null> = Promise.resolve(null);
  let garbageBytes = 0;
  for (;;) {
    posting.limit.roomForUsers = (await posting.room?.maxUsers()) ?? Infinity;
    const batch = posting.stop.aborted ? null : await batches.next(underWay);
    const outcome = await underWay;
    if (outcome && outcome.state !== "posted") return outcome;
    await posting.between?.();
    if (batch) {
      garbageBytes += batch.to - batch.from + CLAIM_GARBAGE_BYTES * batch.claims.size;
      if (garbageBytes > GARBAGE_BYTES) {
        Bun.gc(true);
        garbageBytes = 0;
      }
      posting.sent = batch;
      underWay = postBatch(batch, posting);
      underWay.catch(() => {}); // awaited in the next round
    } else if (posting.stop.aborted) return { state: "stopped" };
    else if (!posting.more) return { state: "done" };
    else {
      underWay = Promise.resolve(null);
      await posting.more();
    }
  }
}

async function postBatch(batch: Batch, posting: Posting): Promise<Outcome> {
  const { database, limit, room } = posting;
  const { totals, claims, from, to } = batch;
  await room?.require(totals.size + 2 * claims.size, to - from);
  const fromMs = performance.now();
  try {
    const outcome = await post(database, batch, limit.timeoutMs);
    if (outcome.state === "posted") {
      limit.succeeded();
      posting.sent = posting.sentBefore = null;
      posting.searches = 0;
      for (const position of posting.refused.keys())
        if (position < batch.to) posting.refused.delete(position);
      posting.posted(reportOf(batch, outcome, performance.now() - fromMs));
    }
    return outcome;
  } catch (error) {
    limit.failed(performance.now() - fromMs);
    throw error;
  }
}

function reportOf(
  { from, to, totals, quarantined, refusals }: Batch,
  { events, conflicts, duplicates }: Counts,
  ms: number,
): Posted {
  const invalid = quarantined.length - refusals;
  const byReason = { invalid, refused: refusals, conflict: conflicts };
  return {
    type: "posted",
    events,
    quarantined: byReason,
    duplicates,
    bytes: to - from,
    users: totals.size,
    ms,
  };
}
