/** The lines in quarantine, for readers: the newest first, a page at a time. */
import type { Database } from "../ledger/database.ts";
import { type ListedLine, readNewestQuarantine } from "../ledger/quarantine.ts";
import { parseTime } from "../time.ts";
import { fitting, MAX_ANSWER_BYTES } from "./held-answer.ts";
import { invalidQuery } from "./problem.ts";

export const MAX_LISTED_LINES = 1_000;
const CURSOR = /^(\S{1,40}) (\d{1,15}) (.+)$/s;

/** A page of them. Throws Unavailable, and a Problem for a bad cursor. */
export async function listQuarantined(
  database: Database,
  { limit = 100, cursor }: { limit?: number | undefined; cursor?: string | undefined },
) {
  const after = cursor === undefined ? null : decodeCursor(cursor);
  // One more than asked for says whether there is a next page.
  const rows = await readNewestQuarantine(database, {
    ...{ after, limit: limit + 1 },
    maxBytes: MAX_ANSWER_BYTES,
  });
  const lines = await fitting(rows.slice(0, limit));
  const next = rows.length > lines.length ? encodeCursor(lines.at(-1) as ListedLine) : null;
  return { lines, next };
}

function encodeCursor({ at, position, source }: Pick<ListedLine, "at" | "position" | "source">) {
  return Buffer.from(`${at} ${position} ${source}`).toString("base64url");
}

function decodeCursor(cursor: string) {
  const text = Buffer.from(cursor, "base64url").toString();
  const [, at = "", position, source = ""] = CURSOR.exec(text) ?? [];
  const place = { at, position: Number(position), source };
  if (parseTime(at) === undefined || source.includes("\0") || encodeCursor(place) !== cursor)
    throw invalidQuery("cursor", "must be the `next` of an answer of this route");
  return place;
}
