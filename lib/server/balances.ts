/**
 * Balances for many readers: pages by cursor, the largest from one scan that all callers share, and all of
 * them as a stream of CSV or NDJSON.
 */
import { readBalances, readLargestBalances, type UserBalance } from "../ledger/balances.ts";
import type { Database } from "../ledger/database.ts";
import { fitting } from "./held-answer.ts";
import { invalidQuery, unavailable } from "./problem.ts";

export const MAX_LISTED_USERS = 1_000;
/** Users in each statement of a stream: at most 600 kB as text, of which a slow reader holds two. */
const STREAM_PAGE = 2_000;
const MAX_STREAMS = 50;
const STALLED_MS = 30_000;
/** The scan for the largest balances runs at most a tenth of the time. */
const SCAN_SHARE = 0.1;

/** What can be streamed, by media type. */
const FORMATS = {
  "text/csv": { head: "user_id,revenue\r\n", line: csvLine },
  "application/x-ndjson": { head: "", line: (row: UserBalance) => `${JSON.stringify(row)}\n` },
};
type Format = keyof typeof FORMATS;

/** The format to stream that an `Accept` header asks for; `null` where JSON is as good. */
export function streamedFormat(accept: string | null): Format | null {
  let best: { type: string; quality: number } | null = null;
  for (const part of (accept ?? "").split(",")) {
    const [name = "", ...parameters] = part.split(";");
    const type = name.trim().toLowerCase();
    const quality = Number(/^\s*q=([\d.]+)\s*$/i.exec(parameters.at(-1) ?? "")?.[1] ?? 1);
    const isKnown = type in FORMATS || /^(application\/json|\*\/\*|application\/\*)$/.test(type);
    if (isKnown && quality > (best?.quality ?? 0)) best = { type, quality };
  }
  return best && best.type in FORMATS ? (best.type as Format) : null;
}

/** The largest balances, when they were read, and when they may be read again. */
interface Largest {
  users: UserBalance[];
  at: string;
  dueMs: number;
}

export function openBalances(database: Database, { stalledMs = STALLED_MS } = {}) {
  let largest: Largest | null = null;
  let scan: Promise<Largest> | null = null;
  let streams = 0;
  let reading: Promise<unknown> = Promise.resolve();
  /** A page of a stream. One at a time, so that streams leave the other connections to everybody else. */
  const readPage = (after: string): Promise<UserBalance[]> => {
    const page = reading.then(() => readBalances(database, { after, limit: STREAM_PAGE }));
    reading = page.catch(() => {});
    return page;
  };

  return {
    /** A page of balances in the order of users. Throws Unavailable, and a Problem for a bad cursor. */
    async list(limit: number, cursor: string | undefined) {
      const after = cursor === undefined ? "" : decodeCursor(cursor);
      // One more than asked for says whether there is a next page.
      const rows = await readBalances(database, { after, limit: limit + 1 });
      const users = await fitting(rows.slice(0, limit));
      const next = rows.length > users.length ? encodeCursor(users.at(-1) as UserBalance) : null;
      return { users, next };
    },

    /**
     * The largest balances, and when they were read: for all callers at once, and again only after nine
     * times as long as that took. Throws Unavailable.
     */
    async largest(limit: number) {
      if (!largest || performance.now() >= largest.dueMs)
        largest = await (scan ??= findLargest().finally(() => (scan = null)));
      return { users: largest.users.slice(0, limit), next: null, at: largest.at };
    },

    /**
     * All balances in the order of users, each page by a statement of its own: a slow reader holds no
     * transaction and no connection, and what it gets is not the picture of one moment. Breaks off, so
     * that nobody takes a part for the whole, when the database fails or the reader takes nothing for 30 s.
     * Throws Unavailable before that, and a Problem while too many read.
     */
    async stream(format: Format, isHead: boolean): Promise<Response> {
      const headers = {
        "content-type": format === "text/csv" ? "text/csv; charset=utf-8" : format,
      };
      if (isHead) return new Response(null, { headers }); // nobody would read or end its stream
      if (streams >= MAX_STREAMS) throw unavailable("too many streams of balances; retry later");
      const ended = () => void streams--;
      streams++;
      try {
        const first = await readPage("");
        const body = streamOf(readPage, { first, format, ended, stalledMs });
        return new Response(body, { headers });
      } catch (error) {
        ended();
        throw error;
      }
    },
  };

  async function findLargest(): Promise<Largest> {
    const at = new Date().toISOString();
    const fromMs = performance.now();
    const users = await readLargestBalances(database, MAX_LISTED_USERS);
    const toMs = performance.now();
    return { at, users, dueMs: toMs + (toMs - fromMs) * (1 / SCAN_SHARE - 1) };
  }
}

function streamOf(
  readPage: (after: string) => Promise<UserBalance[]>,
  options: { first: UserBalance[]; format: Format; ended(): void; stalledMs: number },
): ReadableStream<Uint8Array> {
  const { first, format, ended, stalledMs } = options;
  const { head, line } = FORMATS[format];
  let page: Promise<UserBalance[]> = Promise.resolve(first);
  let text = head;
  let stalled: Timer | undefined;
  let hasEnded = false;
  const end = () => {
    clearTimeout(stalled);
    if (!hasEnded) ended(); // a reader may hang up while a page is read
    hasEnded = true;
  };
  return new ReadableStream({
    async pull(controller) {
      clearTimeout(stalled);
      try {
        const rows = await page;
        controller.enqueue(Buffer.from(text + rows.map(line).join("")));
        text = "";
        const last = rows.at(-1);
        if (!last || rows.length < STREAM_PAGE) {
          controller.close();
          return end();
        }
        const fail = () => {
          controller.error(new Error("the reader takes nothing"));
          end();
        };
        stalled = setTimeout(fail, stalledMs);
        page = readPage(last.user_id);
        page.catch(() => {}); // awaited by the next pull
      } catch (error) {
        end();
        throw error;
      }
    },
    cancel: end,
  });
}

/**
 * A line as in RFC 4180. A spreadsheet runs a field that begins like a formula: such a user id is prefixed
 * with an apostrophe, and so is one that begins with an apostrophe, so that a reader can tell the prefix from the ID.
 */
function csvLine({ user_id, revenue }: UserBalance): string {
  const shown = /^[=+\-@\t\r']/.test(user_id) ? `'${user_id}` : user_id;
  const field = /[",\r\n]/.test(shown) ? `"${shown.replaceAll('"', '""')}"` : shown;
  return `${field},${revenue}\r\n`;
}

function encodeCursor({ user_id }: UserBalance): string {
  return Buffer.from(user_id).toString("base64url");
}

function decodeCursor(cursor: string): string {
  const user_id = Buffer.from(cursor, "base64url").toString();
  if (cursor === "" || user_id.includes("\0") || encodeCursor({ user_id, revenue: "" }) !== cursor)
    throw invalidQuery("cursor", "must be the `next` of an answer of this route");
  return user_id;
}
