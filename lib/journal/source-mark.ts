/**
 * A source in the journal. What the server takes of a source in one request is one run of lines in
 * one frame, and so all of it or nothing is there after a crash: first the mark, which says the bytes
 * of the source that were taken and their SHA-256 up to there as the sender gave it,
 *
 *     {"source":{"name":"events.jsonl","from":0,"to":580,"digest":"…","events":2}}
 *
 * then that many event lines. Bad lines are taken, but not journaled. Where an event's line in the
 * source is longer than in the journal (CRLF, spaces, bad or blank lines before it), `ends` says
 * where each ends in the source, counted from `from`: behind its last byte that counts, not behind
 * its newline, which somebody else may have got in the next piece. An event line is never taken for
 * a mark: it has a `userId` beside its `source`.
 */
export interface SourceMark {
  name: string;
  from: number;
  to: number;
  digest: string;
  events: number;
  ends?: number[];
}

const BEGIN = Buffer.from('{"source":{"name":');

export function encodeSourceMark(mark: SourceMark): Buffer {
  return Buffer.from(`${JSON.stringify({ source: mark })}\n`);
}

/** The mark that `line` is, or `null`. */
export function parseSourceMark(line: Uint8Array): SourceMark | null {
  if (line.length < BEGIN.length || BEGIN.compare(line, 0, BEGIN.length) !== 0) return null;
  try {
    const parsed = JSON.parse(Buffer.from(line).toString()) as Record<string, unknown>;
    return Object.keys(parsed).length === 1 ? (parsed["source"] as SourceMark) : null;
  } catch {
    return null;
  }
}

/** Calls `visit` for each mark in the lines of a frame. */
export function eachSourceMark(payload: Buffer, visit: (mark: SourceMark) => void): void {
  for (let at = payload.indexOf(BEGIN); at >= 0; at = payload.indexOf(BEGIN, at + 1)) {
    if (at > 0 && payload[at - 1] !== 10) continue;
    const mark = parseSourceMark(payload.subarray(at, payload.indexOf(10, at)));
    if (mark) visit(mark);
  }
}
