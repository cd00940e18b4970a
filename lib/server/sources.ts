/**
 * The sources that come over HTTP: how far each is taken, and one taker at a time.
 *
 * What the ledger has posted is in its checkpoints, `sent:NAME`; what this server has taken since is
 * in the journal's marks, and here in memory. After a restart the marks behind the journal's
 * checkpoint are read again, or all of them while the database is away: events are taken without it.
 *
 * Nothing is counted twice for want of knowledge here. Another server may have taken more of a
 * source, memory may have forgotten one: bytes that are taken twice are posted once, by the ledger.
 */
import { type Database, Unavailable } from "../ledger/database.ts";
import { isText, MAX_SOURCE_BYTES } from "../event/event.ts";
import type { Journal } from "../journal/writer.ts";
import { type JournalReader, openJournalReader } from "../journal/reader.ts";
import { journalKey, readCheckpoint, sentKey } from "../ledger/checkpoints.ts";
import { eachSourceMark, encodeSourceMark, type SourceMark } from "../journal/source-mark.ts";

/** Sources kept in memory; the one that was taken from longest ago is forgotten first. */
const KEPT_SOURCES = 10_000;

/** How far a source is taken; `digest` is the sender's SHA-256 of its bytes before `offset`. */
export interface Taken {
  offset: number;
  digest: string;
}

export const NOTHING_TAKEN: Taken = {
  offset: 0,
  digest: new Bun.CryptoHasher("sha256").digest("hex"),
};

export interface Sources {
  /** How far `name` is taken, by what is known here and in the ledger; `null`: never seen. */
  look(name: string): Promise<Taken | null>;
  /**
   * Takes the bytes from `mark.from` to `mark.to`, whose good event lines are `lines`, and returns
   * the position once they are on the disk; or where the source really is, when that is elsewhere.
   */
  take(mark: SourceMark, lines: Uint8Array): Promise<{ position: number } | Taken>;
}

export function isSourceName(name: string): boolean {
  return isText(name, MAX_SOURCE_BYTES);
}

/** `path` is the journal's file. */
export function openSources(path: string, journal: Journal, database: Database): Sources {
  const known = new Map<string, Taken>();
  const takers = new Map<string, Promise<unknown>>();
  /** Whether all of the journal has been read: what was never known was then never taken here. */
  let complete = false;
  /** Whether some source was known, and is not any more. */
  let forgot = false;
  let restored: Promise<void> | null = null;
  let completed: Promise<void> | null = null;

  return {
    async look(name) {
      await restoreOnce();
      const posted = await postedOf(name);
      const here = known.get(name) ?? null;
      return posted && posted.offset > (here?.offset ?? -1) ? posted : here;
    },
    take(mark, lines) {
      const taking = (takers.get(mark.name) ?? Promise.resolve()).then(() => take(mark, lines));
      const settled = taking
        .catch(() => {})
        .then(() => {
          if (takers.get(mark.name) === settled) takers.delete(mark.name);
        });
      takers.set(mark.name, settled);
      return taking;
    },
  };

  async function take(mark: SourceMark, lines: Uint8Array) {
    await restoreOnce();
    const { name, from, to, digest } = mark;
    if (known.get(name)?.offset !== from) {
      const posted = (await postedOf(name)) ?? NOTHING_TAKEN;
      const here = known.get(name);
      const taken = here && here.offset >= posted.offset ? here : posted;
      if (taken.offset !== from) return taken;
    }
    const position = await journal.append(Buffer.concat([encodeSourceMark(mark), lines]));
    learn(name, { offset: to, digest });
    return { position };
  }

  function learn(name: string, taken: Taken): void {
    known.delete(name); // to the end of the Map: the last to be forgotten
    known.set(name, taken);
    const [oldest] = known.keys();
    if (known.size <= KEPT_SOURCES || oldest === undefined) return;
    known.delete(oldest);
    forgot = true;
  }

  /**
   * What the ledger has posted. While it is away the whole journal is read for it, once; unknown
   * (503) is then only a source that may be among those forgotten.
   */
  async function postedOf(name: string): Promise<Taken | null> {
    try {
      const checkpoint = await readCheckpoint(database, sentKey(name));
      return checkpoint?.digest ? { offset: checkpoint.position, digest: checkpoint.digest } : null;
    } catch (error) {
      if (!(error instanceof Unavailable)) throw error;
      if (!known.has(name) && !complete && !forgot) await completeOnce();
      if (known.has(name) || (complete && !forgot)) return null;
      throw error;
    }
  }

  /** Reads the marks that the ledger is not known to have posted. */
  async function restore(): Promise<void> {
    const reader = await openJournalReader(path);
    if (!reader) return;
    const posted = await readCheckpoint(database, journalKey(reader.id)).catch((error) => {
      if (error instanceof Unavailable) return null;
      throw error;
    });
    const from = posted?.position ?? reader.start;
    try {
      await readMarks(reader, from);
    } catch (error) {
      // Posted, and let go of, since the ledger was asked.
      const start = (await openJournalReader(path))?.start ?? 0;
      if (from < start) return restore();
      throw error;
    }
    complete = posted === null && reader.start === 0;
  }

  async function readMarks(reader: JournalReader, from: number) {
    // Not what is on its way to the disk: it may never arrive there.
    const end = journal.end();
    for (let position = from; position < end;) {
      const frames = (await reader.read(position)).filter(({ to }) => to <= end);
      for (const { payload, to } of frames) {
        eachSourceMark(payload, ({ name, to: offset, digest }) => {
          if (offset >= (known.get(name)?.offset ?? 0)) learn(name, { offset, digest });
        });
        position = to;
      }
      if (frames.length === 0) return;
    }
  }

  function completeOnce(): Promise<void> {
    completed ??= openJournalReader(path)
      .then(async (reader) => {
        if (!reader) return;
        await readMarks(reader, reader.start);
        // What removed segments held, only the ledger knows.
        complete = reader.start === 0;
        forgot ||= !complete;
      })
      .finally(() => {
        completed = null;
      });
    return completed;
  }

  function restoreOnce(): Promise<void> {
    restored ??= restore().catch((error) => {
      restored = null;
      throw error;
    });
    return restored;
  }
}
