/**
 * The server as the client sees it: sources that have a state and accept the next chunk. What may be a
 * passing failure is retried; anything else is an error at once.
 *
 * | the server                     | so                                                          |
 * | ------------------------------ | ----------------------------------------------------------- |
 * | does not answer, 425           | retry: the offset tells whether the chunk was stored        |
 * | 408, or takes over a minute    | the same; a chunk becomes smaller                           |
 * | 409                            | it says where the source stands: the caller decides         |
 * | 429, 5xx                       | retry, after `Retry-After` where it is given                |
 * | 401, 403                       | stop: wrong secret or token                                 |
 * | any other                      | stop: our mistake, or not a Daybook server                  |
 */
import { setTimeout as wait } from "node:timers/promises";

import { describeProxy } from "../config.ts";
import { MAX_LISTED_ERRORS } from "../event/lines.ts";
import { type Chunk, digestAt } from "./chunks.ts";

const ANSWER_TIMEOUT_MS = 60_000;
/** An attempt that fails after this long counts as too slow, whatever its error. */
const SLOW_MS = 10_000;
/** At 1 kB/s, below which the server gives up. Smaller chunks than this are not made. */
const MIN_CHUNK_MS = 64_000;
const MIN_PAUSE_MS = 100;
const MAX_PAUSE_MS = 5_000;
/** A pause this long is worth a message. */
const NOTED_PAUSE_MS = 1_000;
/** No answer of a Daybook server is longer. */
const MAX_ANSWER_BYTES = 1024 * 1024;
const MAX_DETAIL_LENGTH = 500;
const DENIED: Record<number, string> = {
  401: "wrong secret, or an invalid or expired token",
  403: "this secret or token does not grant write access",
};
const TRANSIENT = new Set([408, 425, 429, 500, 502, 503, 504, 507]);

/** What the server says about the lines of a chunk. */
export interface LineCounts {
  accepted: number;
  rejected: number;
  errors: { line: number; message: string }[];
}

/** How much of a source is stored. In an answer to a chunk, also which of its lines are valid. */
export interface SourceState {
  offset: number;
  digest: string;
  /** The journal position after everything stored of the source. */
  position: string;
  lines: LineCounts | null;
}

/** The answer to a chunk that is on the server's disk. */
export interface Stored extends LineCounts {
  position: string;
}

/** The upload failed for good; with `isDenied`, because of the credential. */
export class UploadFailed extends Error {
  constructor(
    message: string,
    readonly isDenied = false,
  ) {
    super(message);
  }
}

export type Api = ReturnType<typeof openApi>;

interface ApiOptions {
  serverUrl: string;
  credential: string;
  /** How long to retry after the last success. */
  retryMs: number;
  /** Gets a line when retrying takes longer. */
  say(line: string): void;
  /** Ends retrying. */
  stop: AbortSignal;
  /** Waits before a retry, until `stop` at most. */
  sleep?(ms: number, stop: AbortSignal): Promise<void>;
  timeoutMs?: number;
}

const sleepUntilStopped = (ms: number, signal: AbortSignal) =>
  wait(ms, undefined, { signal }).catch(() => {});

/** An answer that arrived completely. */
interface Answer {
  status: number;
  headers: Headers;
  body: unknown;
}

/** Every call throws UploadFailed when it fails for good. */
export function openApi(options: ApiOptions) {
  const { serverUrl, credential, retryMs, say, stop, sleep = sleepUntilStopped } = options;
  const { timeoutMs = ANSWER_TIMEOUT_MS } = options;
  const baseUrl = serverUrl.replace(/\/+$/, "");
  // It may hold a password.
  const shownUrl = baseUrl.replace(/\/\/[^/@]*@/, "//") + describeProxy(baseUrl);
  return { state, send, sendEarly, waitUntilPosted };

  /** The state of a source, or `null` when nothing of it is stored. */
  async function state(source: string): Promise<SourceState | null> {
    const answer = await request(`/sources/${encodeURIComponent(source)}`, { method: "HEAD" });
    return answer.status === 404 ? null : stateIn(answer);
  }

  /**
   * Sends a chunk. Returns Stored once it is on the server's disk, or the state of a source that is
   * elsewhere, or how many of its bytes the server takes. If it `canShrink`, returns "slow" when it failed by time: it may be stored or not.
   */
  async function send(
    source: string,
    chunk: Chunk,
    canShrink: boolean,
  ): Promise<Stored | SourceState | { fits: number } | "slow"> {
    const { path, init } = patchOf(source, chunk);
    const answer = await request(path, init, canShrink);
    if (answer === "slow") return answer;
    if (answer.status === 409) return stateIn(answer);
    // The answer could not list all rejected lines; it can for the first of them.
    const { bytes: fits } = (answer.body ?? {}) as { bytes?: unknown };
    const isSmaller = typeof fits === "number" && fits > 0 && fits < chunk.bytes.length;
    if (answer.status === 413 && isSmaller) return { fits };
    if (answer.status !== 200) throw failure(answer);
    if (!isStored(answer.body)) throw new UploadFailed(`${shownUrl} is not a Daybook server`);
    return answer.body;
  }

  /**
   * Sends a chunk while the one before it is under way, once and without a word. Returns `null` unless it is on
   * the server's disk for certain: it may be stored or not.
   */
  async function sendEarly(source: string, chunk: Chunk): Promise<Stored | null> {
    const { path, init } = patchOf(source, chunk);
    const { answer } = await attempt(path, init, timeoutMs);
    return answer?.status === 200 && isStored(answer.body) ? answer.body : null;
  }

  function patchOf(source: string, chunk: Chunk): { path: string; init: RequestInit } {
    const path = `/sources/${encodeURIComponent(source)}?errors=${MAX_LISTED_ERRORS}`;
    const headers = {
      "content-type": "application/x-ndjson",
      "upload-offset": `${chunk.start.offset}`,
      "source-digest": digestAt(chunk.end),
    };
    const body = chunk.bytes as Uint8Array<ArrayBuffer>;
    return { path, init: { method: "PATCH", headers, body } };
  }

  /** Returns once the ledger has posted `position`. */
  async function waitUntilPosted(position: string): Promise<void> {
    // Any user will do, even an unknown one: the server answers only after the position is posted.
    const path = `/userEvents/-?after=${encodeURIComponent(position)}`;
    const answer = await request(path, {}).catch(({ message }: Error) => {
      const what = "all events are on the server's disk, but they were not confirmed as posted";
      throw new UploadFailed(`${what}: ${message}; check that a processor is running`);
    });
    if (answer.status !== 200 && answer.status !== 404) throw failure(answer);
  }

  function request(path: string, init: RequestInit): Promise<Answer>;
  function request(path: string, init: RequestInit, canShrink: boolean): Promise<Answer | "slow">;
  async function request(path: string, init: RequestInit, canShrink = false) {
    const deadlineMs = performance.now() + retryMs;
    // A small chunk has as much time as the server gives it.
    const limitMs = init.body && !canShrink ? timeoutMs + MIN_CHUNK_MS : timeoutMs;
    for (let pauseMs = MIN_PAUSE_MS, isNoted = false; ; pauseMs *= 2) {
      const startedMs = performance.now();
      const { answer, reason, retryAfterMs, isLate } = await attempt(path, init, limitMs);
      if (answer) return answer;
      if (canShrink && (isLate || performance.now() - startedMs > SLOW_MS)) return "slow";
      // Half of the pause is random, so that many clients do not return at the same moment.
      const waitMs = retryAfterMs + Math.min(pauseMs, MAX_PAUSE_MS) * (0.5 + Math.random() / 2);
      const leftMs = deadlineMs - performance.now();
      if (stop.aborted || leftMs <= retryAfterMs) throw new UploadFailed(reason);
      if (!isNoted && pauseMs > NOTED_PAUSE_MS && waitMs < leftMs) {
        say(`${reason}; retrying for ${Math.round(retryMs / 1000)} s`);
        isNoted = true;
      }
      // When stopped, one last attempt.
      await sleep(Math.min(waitMs, leftMs), stop);
    }
  }

  /** An answer, or why there is none that counts and how long the server asks to wait. */
  async function attempt(path: string, init: RequestInit, limitMs: number) {
    try {
      const response = await fetch(baseUrl + path, {
        ...init,
        headers: {
          ...init.headers,
          authorization: `Bearer ${credential}`,
          "accept-encoding": "identity",
        },
        signal: AbortSignal.timeout(limitMs),
        redirect: "manual",
        decompress: false, // a few bytes could become many
      });
      const { status, headers } = response;
      // An answer that is cut off does not count, whatever it begins with.
      const answer: Answer = { status, headers, body: parse(await readText(response)) };
      if (!TRANSIENT.has(status)) return { answer, reason: "", retryAfterMs: 0, isLate: false };
      const retryAfterMs = Number(headers.get("retry-after")) * 1000 || 0;
      return { answer: null, reason: describe(answer), retryAfterMs, isLate: status === 408 };
    } catch (error) {
      const { name, message } = error as Error;
      const reason = `${shownUrl} does not answer: ${message}`;
      return { answer: null, reason, retryAfterMs: 0, isLate: name === "TimeoutError" };
    }
  }

  /** The state of a source in an answer. */
  function stateIn(answer: Answer): SourceState {
    const { headers, body } = answer;
    const offset = headers.get("upload-offset") ?? "";
    if (!/^\d{1,15}$/.test(offset)) throw failure(answer);
    const digest = headers.get("source-digest") ?? "";
    const position = headers.get("journal-position") ?? "";
    const { lines } = (body ?? {}) as { lines?: unknown };
    return { offset: Number(offset), digest, position, lines: areCounts(lines) ? lines : null };
  }

  function failure(answer: Answer): UploadFailed {
    return new UploadFailed(describe(answer), answer.status in DENIED);
  }

  function describe({ status, body }: Answer): string {
    const problem = body as { detail?: unknown } | null;
    const { detail } = problem ?? {};
    const shown = typeof detail === "string" ? detail.slice(0, MAX_DETAIL_LENGTH) : undefined;
    // The answer to HEAD has no body that could say more.
    const fallback = status >= 500 ? "unavailable" : "unexpected from a Daybook server";
    return `${shownUrl} answered ${status}: ${shown ?? DENIED[status] ?? fallback}`;
  }
}

/** The text of an answer; empty if it is longer than any of a Daybook server. */
async function readText(response: Response): Promise<string> {
  let text = Buffer.alloc(0);
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    if (bytes + chunk.length > MAX_ANSWER_BYTES) return "";
    // Doubled, because single bytes would cost far more than their length.
    if (bytes + chunk.length > text.length)
      text = Buffer.concat([text], 2 * (bytes + chunk.length));
    text.set(chunk, bytes);
    bytes += chunk.length;
  }
  return text.toString("utf8", 0, bytes);
}

function isStored(body: unknown): body is Stored {
  return areCounts(body) && "position" in body && typeof body.position === "string";
}

function areCounts(found: unknown): found is LineCounts {
  const { accepted, rejected, errors } = (found ?? {}) as Record<string, unknown>;
  const isCounted = Number.isSafeInteger(accepted) && Number.isSafeInteger(rejected);
  return isCounted && Array.isArray(errors) && errors.every(isListed);
}

function isListed(error: unknown): boolean {
  const { line, message } = (error ?? {}) as Record<string, unknown>;
  return Number.isSafeInteger(line) && typeof message === "string";
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
