/**
 * What becomes of a body that was refused before it was read. Bun reads it to its end: 10 GB after a 401.
 * To close at once would lose the answer, because the system drops it when bytes arrive that nobody
 * reads. So a little more is read, as much as an honest sender has on its way, and then it is closed.
 */
const MAX_BYTES = 2 * 1024 * 1024;
const MAX_MS = 1_000;
/** After these a body that was begun may be unfinished, and cannot be read any more. */
const UNFINISHED = new Set([408, 413, 503]);

/** Whether the connection of a request with this answer must be closed after it. */
export async function mustClose(request: Request, { status }: Response): Promise<boolean> {
  if (status < 400 || !request.body) return false;
  if (request.bodyUsed) return UNFINISHED.has(status);
  if (Number(request.headers.get("content-length")) > MAX_BYTES) return true;
  const isLate = Promise.withResolvers<boolean>();
  const timer = setTimeout(isLate.resolve, MAX_MS, false);
  const isRead = await Promise.race([discard(request.body), isLate.promise]);
  clearTimeout(timer);
  return !isRead;
}

/** Reads a body to its end. Returns whether it got there. */
async function discard(body: ReadableStream<Uint8Array>): Promise<boolean> {
  let bytes = 0;
  try {
    for await (const chunk of body) if ((bytes += chunk.length) > MAX_BYTES) return false;
    return true;
  } catch {
    return false; // the sender is gone
  }
}
