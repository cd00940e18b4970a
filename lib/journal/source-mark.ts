/**
 * A source in the journal. What the server accepts of a source in one request is one run of lines in
 * one frame, so a crash leaves all of it or nothing. The run begins with a mark, which states the range
 * of the source's bytes and the SHA-256 of the source up to their end, as the sender gave it:
 *
 *     {"source":{"name":"events.jsonl","from":0,"to":580,"digest":"…","events":2}}
 *
 * `events` event lines follow. Bad lines count as stored, but are not journaled. Where an event's line
 * is longer in the source than in the journal (CRLF, spaces, bad or blank lines before it), `ends`
 * states where each event ends in the source, relative to `from`: after its last significant byte, not
 * after its newline, which may arrive with the next piece. An event line cannot be mistaken for a mark:
 * it has a `userId` beside its `source`.
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

/** The mark in `line`, or `null` when it is not a mark. */
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
