/**
 * The client: sends the events of a file to the server, so that each is stored once, whatever crashes
 * and however often it is run.
 */
import "./lib/install.ts";

import { openApi, UploadFailed } from "./lib/client/api.ts";
import { type GivenInput, inspect } from "./lib/client/inputs.ts";
import {
  explainRest,
  ForeignInput,
  sendFile,
  type SendOptions,
  sendStream,
  Total,
} from "./lib/client/send.ts";
import { parseDuration, readCommand } from "./lib/config.ts";
import { explain } from "./lib/errors.ts";
import { isText, MAX_SOURCE_BYTES, setEventTypes } from "./lib/event/event.ts";
import { counted, print, say, sayLines, STOPPED, visible } from "./lib/progress.ts";

async function main(): Promise<number> {
  const { settings, options, files } = readCommand(COMMAND);
  const paths = files.length > 0 ? files : ["events.jsonl"];
  const retryMs = parseDuration(String(options["retry-for"] ?? "5m"));
  if (retryMs === undefined) return reject("--retry-for requires a duration like 90s, 5m or 2h");
  for (const option of ["source", "follow"])
    if (options[option] && paths.length > 1) return reject(`--${option} requires a single FILE`);
  const source = options["source"] as string | undefined;
  const inputs = await Promise.all(paths.map((path) => inspect(path, source)));
  const problems = inputs.flatMap(({ path, problem }) =>
    problem ? `${visible(path)}: ${problem}` : [],
  );
  if (problems.length > 0) return reject(problems.join("\n"));
  const follow = options["follow"] === true && inputs.every(({ isStream }) => !isStream);
  const compressed = inputs.find(({ compression }) => compression);
  if (follow && compressed)
    return reject(
      `${compressed.path}: a compressed file cannot be followed: send it without --follow`,
    );
  // A URL drops path segments of one or two dots.
  if (inputs.some(({ name }) => !isText(name, MAX_SOURCE_BYTES) || /^\.\.?$/.test(name)))
    return reject(`--source requires a name of 1 to ${MAX_SOURCE_BYTES} bytes, not "." or ".."`);

  setEventTypes(settings.EVENT_TYPES); // decides whether a last line without newline is an event
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"] as const)
    if (follow) process.on(signal, () => stop.abort(signal));
    else process.once(signal, () => stop.abort(signal)); // a second one ends it at once
  const [secret = ""] = settings.AUTH_SECRET;
  const credential = String(options["token"] ?? settings.AUTH_TOKEN ?? secret);
  const { SERVER_URL: serverUrl } = settings;
  const api = openApi({ serverUrl, credential, retryMs, say, stop: stop.signal });
  const again = options["again"] === true;
  const wait = options["wait"] === true;
  return send(inputs, { api, again, follow, stop: stop.signal, wait });
}

const COMMAND = {
  program: "client",
  usage:
    "bun run client.ts [--again] [--follow] [--wait] [--source NAME] [--token TOKEN] [--retry-for TIME] [FILE…]",
  about:
    "Sends the events of each FILE (default: events.jsonl; -: standard input), one a line, plain or\n" +
    "compressed with gzip or zstd, to the server. Run again, it resumes where the server has it: every\n" +
    "event counts once. Lines that the server rejects are in FILE.rejected.jsonl, with their reasons.",
  options: {
    again: { type: "boolean", meaning: "send the whole file once more, on purpose" },
    follow: { type: "boolean", meaning: "keep sending as the file grows, until SIGTERM" },
    wait: { type: "boolean", meaning: "return only when everything is posted to the ledger" },
    source: { type: "string", meaning: "NAME of the source, instead of the file's name" },
    token: { type: "string", meaning: "present this instead of AUTH_SECRET; so does AUTH_TOKEN" },
    "retry-for": { type: "string", meaning: "how long to retry while the server is down (5m)" },
  },
  maxFiles: Number.POSITIVE_INFINITY,
  exits: {
    0: "every event is on the server's disk",
    1: "the same, but lines were rejected (see FILE.rejected.jsonl), or the end of FILE is not a whole event yet",
    2: "invalid use or setting, no such file, one that is not lines of events, or a wrong secret or token",
    3: "the server is unreachable or did not store the events, or a compressed file is damaged",
    130: "stopped by SIGINT before the end; run again, it continues",
    143: "the same, by SIGTERM",
  },
} as const;

/** After a signal, the chunk under way has this long to be answered. */
const GRACE_MS = 3_000;

/** Sends the inputs one after the other, prints the summary, and returns the exit code. */
async function send(
  inputs: GivenInput[],
  { wait, ...options }: Omit<SendOptions, "name" | "total"> & { wait: boolean },
): Promise<number> {
  const startedMs = performance.now();
  const all = new Total();
  let code = 0;
  let [current] = inputs as [GivenInput];
  let total = new Total();
  const { follow, stop } = options;
  // What the server does not answer in time may be stored or not: the next run finds out.
  if (!follow)
    stop.addEventListener("abort", () => setTimeout(() => process.exit(endStopped()), GRACE_MS));
  for (current of inputs) {
    const { path, name, isStream, canResume } = current;
    total = new Total();
    const sendOptions = { ...options, name, total };
    try {
      const rejected = await (isStream
        ? sendStream(path === "-" ? null : path, { ...sendOptions, canResume })
        : sendFile(path, sendOptions));
      const lines = rejected.count();
      if (lines > 0)
        say(
          `${counted(lines, "line")} ${lines === 1 ? "was" : "were"} rejected` +
            (rejected.isKept() ? `: see ${rejected.path}` : "; this client did not save them"),
        );
      if (lines > 0 || total.rejected > 0 || total.hasLeftOver) code = 1;
      if (total.isStopped && !follow) return endStopped();
      if (wait && total.position) say("waiting until all of it is posted to the ledger");
      if (wait && total.position) await options.api.waitUntilPosted(total.position);
    } catch (error) {
      if (!(error instanceof UploadFailed || error instanceof ForeignInput)) throw error;
      if (stop.aborted && !follow) return endStopped();
      say(error.message);
      if (isStream && error instanceof UploadFailed)
        say(`${path === "-" ? "stdin" : path}: ${explainRest(canResume)}`);
      code = error instanceof ForeignInput || error.isDenied ? 2 : 3;
    }
    all.join(total);
    if (code > 1) break;
  }
  if (code > 1) print(`stopped: ${summary()}`);
  else print(wait ? `${summary()}; all of it is in the ledger` : summary());
  return code;

  function summary(): string {
    const [{ path }] = inputs as [GivenInput];
    const from = inputs.length > 1 ? `${inputs.length} files` : path === "-" ? "stdin" : path;
    return all.summarize(from, performance.now() - startedMs);
  }

  function endStopped(): number {
    const { path, isStream, canResume } = current;
    const shown = path === "-" ? "stdin" : path;
    if (isStream) say(`${shown}: stopped; ${explainRest(canResume)}`);
    else say(`${shown}: stopped at ${total.percent} %; run it again to continue`);
    all.join(total);
    print(`stopped: ${summary()}`);
    return STOPPED[stop.reason as keyof typeof STOPPED];
  }
}

function reject(message: string): number {
  sayLines(message);
  return 2;
}

/** Runs the program, and ends the process with its exit code. */
export async function run(): Promise<never> {
  process.exitCode = await main().catch((error) => {
    sayLines(explain(error));
    return 3;
  });
  process.exit();
}

if (import.meta.main) await run();
