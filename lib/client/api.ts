/**
 * The server as the client sees it: sources that stand somewhere and take the next chunk. Whatever
 * may pass is tried again; what cannot is an error at once.
 *
 * | the server                     | so                                                          |
 * | ------------------------------ | ----------------------------------------------------------- |
 * | gives no answer, 408, 425      | try again: the offset tells whether the chunk was taken     |
 * | 409                            | it says where the source stands: the caller decides         |
 * | 429, 5xx                       | try again, after `Retry-After` where it is given            |
 * | 401, 403                       | stop: wrong secret or token                                 |
 * | any other                      | stop: we are wrong, or it is no Daybook server              |
 */
import { setTimeout as sleep } from "node:timers/promises";

import { MAX_LISTED_ERRORS } from "../event/lines.ts";
import type { Chunk } from "./chunks.ts";

const ANSWER_MS = 60_000;
const FIRST_PAUSE_MS = 100;
const MAX_PAUSE_MS = 5_000;
const DENIED: Record<number, string> = {
  401: "wrong secret, or a token that is not good (any more)",
  403: "this secret or token does not let write",
};
const PASSING = new Set([408, 425, 429, 500, 502, 503, 504, 507]);

/** What the server says of the lines of a chunk. */
export interface Lines {
  accepted: number;
  rejected: number;
  errors: { line: number; message: string }[];
}

/** How far a source is taken; where it answers a chunk, with what its lines are. */
export interface SourceState {
  offset: number;
  digest: string;
  /** The position in the journal before which all of that is. */
  position: string;
  lines: Lines | null;
}

/** What the server says of a chunk that is on its disk. */
export interface Answer extends Lines {
  position: string;
}

/** The server did not do it, for good. `wrongSecret`: not with what we present. */
export class UploadFailed extends Error {
  constructor(
    message: string,
    readonly wrongSecret = false,
  ) {
    super(message);
  }
}

export interface Remote {
  /** Where the source stands, or `null` when nothing of it is taken. */
  look(source: string): Promise<SourceState | null>;
  /** Sends a chunk; an Answer once it is on the server's disk, or where the source stands. */
  take(source: string, chunk: Chunk): Promise<Answer | SourceState>;
  /** Returns once the ledger has posted `position`. */
  posted(position: string): Promise<void>;
}

/** An answer that has come to its end. */
interface Heard {
  status: number;
  headers: Headers;
  body: unknown;
}

/**
 * Tries for `retryMs` after the last thing that worked, and not any more once `stop` says so; `say`
 * is told when it begins to.
 */
export function openRemote(
  server: string,
  secret: string,
  retryMs: number,
  say: (line: string) => void,
  signal: AbortSignal,
): Remote {
  const authorization = `Bearer ${secret}`;
  const shown = server.replace(/\/\/[^/@]*@/, "//"); // a password, perhaps

  return {
    async look(source) {
      const response = await request(`/sources/${encodeURIComponent(source)}`, { method: "HEAD" });
      if (response.status === 404) return null;
      return standOf(response) ?? stop(response);
    },
    async take(source, chunk) {
      const path = `/sources/${encodeURIComponent(source)}?errors=${MAX_LISTED_ERRORS}`;
      const response = await request(path, {
        method: "PATCH",
        headers: {
          "content-type": "application/x-ndjson",
          "upload-offset": `${chunk.from}`,
          "source-digest": chunk.digest,
        },
        body: chunk.bytes as Uint8Array<ArrayBuffer>,
      });
      if (response.status === 409) return standOf(response) ?? stop(response);
      if (response.status !== 200) return stop(response);
      const answer = response.body as Partial<Answer> | null;
      if (!Array.isArray(answer?.errors)) throw new UploadFailed(`${shown} is no Daybook server`);
      return answer as Answer;
    },
    async posted(position) {
      // Whose balance it is does not matter, nor that there is none: both answers come afterwards.
      const response = await request(`/userEvents/-?after=${encodeURIComponent(position)}`, {});
      if (response.status !== 200 && response.status !== 404) stop(response);
    },
  };

  async function request(path: string, init: RequestInit): Promise<Heard> {
    const giveUpMs = performance.now() + retryMs;
    for (let pauseMs = FIRST_PAUSE_MS, said = false; ; pauseMs *= 2) {
      let why: string;
      let afterMs = 0;
      try {
        const headers = { authorization, ...(init.headers as Record<string, string>) };
        const response = await fetch(server + path, {
          ...init,
          headers,
          signal: AbortSignal.timeout(ANSWER_MS),
          redirect: "manual",
        });
        // An answer that is cut is none, whatever it begins with.
        const heard = {
          status: response.status,
          headers: response.headers,
          body: parse(await response.text()),
        };
        if (!PASSING.has(response.status)) return heard;
        why = reason(heard);
        afterMs = Number(response.headers.get("retry-after")) * 1000 || 0;
      } catch (error) {
        why = `${shown} gives no answer: ${(error as Error).message}`;
      }
      // Half of the pause is chance, so that many clients do not come back at the same moment.
      const waitMs = afterMs + Math.min(pauseMs, MAX_PAUSE_MS) * (0.5 + Math.random() / 2);
      if (signal.aborted || performance.now() + waitMs > giveUpMs) throw new UploadFailed(why);
      if (!said && pauseMs > 1_000) {
        say(`${why}; trying again for ${Math.round(retryMs / 1000)} s`);
        said = true;
      }
      await sleep(waitMs, undefined, { signal }).catch(() => {}); // told to stop: one last try
    }
  }

  function stop(heard: Heard): never {
    throw new UploadFailed(reason(heard), heard.status === 401 || heard.status === 403);
  }

  function reason({ status, body }: Heard): string {
    const problem = body as { detail?: unknown } | null;
    const detail = typeof problem?.detail === "string" ? problem.detail : undefined;
    // The answer to HEAD has no body to say more.
    const unsaid = status >= 500 ? "not available now" : "not as a Daybook server does";
    const said = detail ?? DENIED[status] ?? unsaid;
    return `${shown} answered ${status}: ${said}`;
  }
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function standOf({ headers, body }: Heard): SourceState | null {
  const offset = headers.get("upload-offset");
  if (offset === null) return null;
  const digest = headers.get("source-digest") ?? "";
  const position = headers.get("journal-position") ?? "";
  const { lines = null } = (body ?? {}) as Partial<Pick<SourceState, "lines">>;
  return { offset: Number(offset), digest, position, lines };
}
