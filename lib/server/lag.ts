/**
 * How far posting is behind the journal. The ledger's checkpoint is asked for while there is something
 * to post, and by whoever looks: so it holds whichever process posts, and grows while the database
 * is away.
 */
import { type Database, Unavailable } from "../ledger/database.ts";
import { frameTime } from "../journal/format.ts";
import { openJournalReader } from "../journal/reader.ts";
import type { Commit, Journal } from "../journal/writer.ts";
import { readPosted } from "../ledger/checkpoints.ts";

const LOOK_EVERY_MS = 1_000;
/** So many frames' times are kept, at least a second apart; past it every second one goes. */
const MAX_MARKS = 4_096;
const MARK_EVERY_MS = 1_000;

export interface Lag {
  /** Bytes of the journal that are not posted. */
  bytes: number;
  /** How long ago the first of them was written, about; 0 when there are none. */
  seconds: number;
}

export interface LagWatch {
  /** What is known now, without asking anybody. */
  now(): Lag;
  /** Whether the database answered when it was asked last. */
  isAnswered(): boolean;
  /** Asks the ledger. Throws Unavailable. */
  look(): Promise<Lag>;
  /** To be told of each commit of the journal. */
  committed(commit: Commit): void;
  close(): void;
}

/** `path` is the journal's file. */
export function watchLag(path: string, journal: Journal, database: Database): LagWatch {
  /** Frames that begin at `from`, written at `atMs`; the first of them is not posted, or the last that is. */
  let marks: { from: number; atMs: number }[] = [];
  // Until the ledger has been asked, what was there before counts as posted.
  let posted = journal.end();
  let answered = true;
  let looking: Promise<Lag> | null = null;
  const timer = setInterval(() => {
    if (posted < journal.end()) lookOnce().catch(() => {});
  }, LOOK_EVERY_MS);
  timer.unref();
  lookOnce().catch(() => {});

  return {
    now,
    isAnswered: () => answered,
    look: lookOnce,
    committed({ from, atMs }) {
      const last = marks.at(-1);
      if (last && atMs - last.atMs < MARK_EVERY_MS) return;
      marks.push({ from, atMs });
      if (marks.length > MAX_MARKS) marks = marks.filter((_, i) => i % 2 === 0);
    },
    close: () => clearInterval(timer),
  };

  function now(): Lag {
    const bytes = Math.max(0, journal.end() - posted);
    dropPosted();
    const sinceMs = marks[0]?.atMs;
    if (bytes === 0 || sinceMs === undefined) return { bytes, seconds: 0 };
    return { bytes, seconds: Math.max(0, Date.now() - sinceMs) / 1000 };
  }

  /** Also of what has come since the ledger was asked: else the age of an event would be that of the one before. */
  function dropPosted() {
    while ((marks[1]?.from ?? Number.POSITIVE_INFINITY) <= posted) marks.shift();
  }

  function lookOnce(): Promise<Lag> {
    looking ??= ask().finally(() => {
      looking = null;
    });
    return looking;
  }

  async function ask(): Promise<Lag> {
    try {
      posted = await readPosted(database, journal.id);
      answered = true;
    } catch (error) {
      answered &&= !(error instanceof Unavailable);
      throw error;
    }
    dropPosted();
    const first = marks[0]?.from ?? Number.POSITIVE_INFINITY;
    // What was there before this process: the journal itself knows when.
    if (posted < journal.end() && posted < first) {
      const atMs = await writtenAt(path, posted).catch(() => null);
      if (atMs !== null) marks.unshift({ from: posted, atMs });
    }
    return now();
  }
}

/** When the frame that begins at `position` was written. */
async function writtenAt(path: string, position: number): Promise<number | null> {
  const [frame] = (await (await openJournalReader(path))?.read(position)) ?? [];
  return frame ? frameTime(frame.header) : null;
}
