/**
 * The client: sends the events of a file to the server, so that each is stored once, whatever crashes
 * and however often it is run.
 */
import "./lib/install.ts";

import { accessSync, constants, statSync } from "node:fs";
import { basename } from "node:path";

import { openApi, UploadFailed } from "./lib/client/api.ts";
import type { Rejected } from "./lib/client/rejected.ts";
import { sendFile, type SendOptions, sendStream, Total } from "./lib/client/send.ts";
import { parseDuration, readCommand } from "./lib/config.ts";
import { isText, MAX_SOURCE_BYTES, setEventTypes } from "./lib/event/event.ts";
import { print, say } from "./lib/progress.ts";

async function main(): Promise<number> {
  const { settings, options, files } = readCommand(COMMAND);
  const [path = "events.jsonl"] = files;
  const isStream = path === "-";
  const retryMs = parseDuration(String(options["retry-for"] ?? "5m"));
  if (retryMs === undefined) return reject("--retry-for requires a duration like 90s, 5m or 2h");
  const problem = isStream ? null : whyUnreadable(path);
  if (problem) return reject(`${path}: ${problem}`);
  const defaultName = isStream ? `stdin-${crypto.randomUUID()}` : basename(path);
  const name = String(options["source"] ?? defaultName);
  // A URL drops path segments of one or two dots.
  if (!isText(name, MAX_SOURCE_BYTES) || /^\.\.?$/.test(name))
    return reject(`--source requires a name of 1 to ${MAX_SOURCE_BYTES} bytes, not "." or ".."`);

  setEventTypes(settings.EVENT_TYPES); // decides whether a last line without newline is an event
  const stop = new AbortController();
  const follow = options["follow"] === true && !isStream;
  if (options["follow"])
    for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort());
  const [secret = ""] = settings.AUTH_SECRET;
  const credential = String(options["token"] ?? settings.AUTH_TOKEN ?? secret);
  const { SERVER_URL: serverUrl } = settings;
  const api = openApi({ serverUrl, credential, retryMs, say, stop: stop.signal });
  const again = options["again"] === true;
  const total = new Total();
  const sendOptions = { api, name, again, follow, stop: stop.signal, total };
  return send(path, { ...sendOptions, wait: options["wait"] === true });
}

const COMMAND = {
  program: "client",
  usage: "bun run client.ts [--again] [--follow] [--wait] [FILE]",
  about:
    "Sends the events of FILE (default: events.jsonl; -: standard input), one a line, to the\n" +
    "server. Run again, it resumes where the server has it: every event counts once. Lines that\n" +
    "the server rejects are in FILE.rejected.jsonl, each with its reason.",
  options: {
    again: { type: "boolean", meaning: "send the whole file once more, on purpose" },
    follow: { type: "boolean", meaning: "keep sending as the file grows, until SIGTERM" },
    wait: { type: "boolean", meaning: "return only when everything is posted to the ledger" },
    source: { type: "string", meaning: "NAME of the source, instead of the file's name" },
    token: { type: "string", meaning: "present this instead of AUTH_SECRET; so does AUTH_TOKEN" },
    "retry-for": { type: "string", meaning: "how long to retry while the server is down (5m)" },
  },
  maxFiles: 1,
  exits: {
    0: "every event is on the server's disk",
    1: "the same, but some lines were rejected: see FILE.rejected.jsonl",
    2: "invalid use or setting, no such file, or a wrong secret or token",
    3: "the server is unreachable, or did not store the events",
  },
} as const;

/** Why the file at `path` cannot be read, or `null`. */
function whyUnreadable(path: string): string | null {
  try {
    if (!statSync(path).isFile()) return "not a regular file";
    accessSync(path, constants.R_OK);
    return null;
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    return code === "ENOENT" || code === "ENOTDIR" ? "no such file" : message;
  }
}

/** Sends the file, prints the summary, and returns the exit code. */
async function send(path: string, options: SendOptions & { wait: boolean }): Promise<number> {
  const { api, total, wait } = options;
  const startedMs = performance.now();
  let failure: UploadFailed | null = null;
  let rejected: Rejected | null = null;
  try {
    rejected = await (path === "-" ? sendStream(options) : sendFile(path, options));
    if (wait && total.position) await api.waitUntilPosted(total.position);
  } catch (error) {
    if (!(error instanceof UploadFailed)) throw error;
    failure = error;
    say(failure.message);
    if (path === "-")
      say("stdin cannot be resumed: what the summary counts is stored, the rest is not");
  }
  const rejectedLines = rejected?.count() ?? 0;
  if (rejectedLines > 0) say(`${rejectedLines} lines were rejected: see ${rejected?.path}`);
  const summary = summarize(path, total, performance.now() - startedMs);
  if (failure) print(`stopped: ${summary}`);
  else print(wait ? `${summary}; all of it is in the ledger` : summary);
  if (failure) return failure.isDenied ? 2 : 3;
  return total.rejected > 0 || rejectedLines > 0 ? 1 : 0;
}

function summarize(path: string, total: Total, ms: number): string {
  const { accepted, rejected, bytes, knownBytes, knownLines } = total;
  const known = knownBytes ? `; already there: ${knownBytes} bytes (${knownLines} lines)` : "";
  return (
    `sent ${accepted} events (${rejected} rejected) from ${path === "-" ? "stdin" : path}: ` +
    `${bytes} bytes in ${(ms / 1000).toFixed(1)} s, ` +
    `${Math.round((1000 * accepted) / ms)} events/s${known}`
  );
}

function reject(line: string): number {
  say(line);
  return 2;
}

if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    say((error as Error).message);
    return 3;
  });
  process.exit();
}
