/**
 * A team's own rules for events (EVENT_SCHEMA): a JSON Schema that every event must satisfy besides the
 * rules of all events. Only the server checks it: what it accepted under yesterday's schema is posted.
 *
 * Its events are validated in turns by one process (`validator`), so that none of them holds up the server.
 * An event that takes too long is rejected: that process is killed, and the next one goes on after it.
 */
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { InvalidSetting } from "../config.ts";
import type { Fault } from "../event/event.ts";
import { type Log, watchHealth } from "../log.ts";
import { unavailable } from "./problem.ts";
import { atMost } from "./turns.ts";
import type { Ready, Setup, Turn, Validated } from "./validator.ts";

/** Processor time of one event, where the system reports it: an honest one of 64 KiB takes 5 ms. */
const MAX_EVENT_MS = 100;
/** What such an event costs: the next validator has to start. */
const SLOW_EVENT_MS = 300;
/** Of all events of a body. 300,000 short ones take about 2 s. */
const MAX_BODY_MS = 10_000;
const LOOK_MS = 20;
/**
 * A validator that hangs while its server is killed ends by itself after this much processor time. One that
 * does not hang is replaced then.
 */
const MAX_VALIDATOR_SECONDS = 600;
const SLOW = `takes more than ${MAX_EVENT_MS} ms to validate against EVENT_SCHEMA; make it shorter`;

/** How the one-file program starts a validator: a command that its usage does not list. */
export const VALIDATE_COMMAND = "validate-events";

export type EventSchema = Awaited<ReturnType<typeof openEventSchema>>;

/** Validates the lines of one body, a batch at a time. `faults` are those of invalid lines, by their index. */
export type CheckLines = ReturnType<EventSchema["openBody"]>;

/**
 * Reads the schema at `path`, and warns of what can be slow. Throws InvalidSetting with one line that says
 * what is wrong with it.
 */
export async function openEventSchema(path: string, log: Log) {
  const document = readDocument(path);
  for (const risk of risksIn(document))
    log.warn(
      `EVENT_SCHEMA: ${risk}: an event that takes more than ${MAX_EVENT_MS} ms is rejected, and others wait`,
    );
  const health = watchHealth(log, "warn", "");
  let validator: Validator | null = null;
  const inTurn = atMost(1);
  const { invalid } = await start();
  if (invalid)
    throw new InvalidSetting(
      `EVENT_SCHEMA: ${path} is not a valid JSON Schema (2020-12): ${invalid}`,
    );

  return {
    /** The schema itself, for the API's description. */
    document,
    /** Returns what validates the lines of one body, in batches. */
    openBody() {
      let spentMs = 0;
      /**
       * What is wrong with the lines in `ranges` (from and to of each, in `bytes`), by their index. `next`
       * is behind the last line if all are validated, or else where the time of this body was over. Throws the
       * 503 while nothing can be validated.
       */
      return async (bytes: Uint8Array, ranges: Uint32Array) => {
        const faults = new Map<number, Fault[]>();
        let next = 0;
        while (2 * next < ranges.length && spentMs < MAX_BODY_MS) {
          const turn = await inTurn(() => take({ bytes, ranges, first: next }));
          for (const [line, found] of turn.faults) faults.set(line, found);
          spentMs += turn.ms;
          next = turn.next;
          if (turn.slow === undefined) continue;
          faults.set(turn.slow, [{ path: "", message: SLOW }]);
          ranges[2 * turn.slow + 1] = ranges[2 * turn.slow] as number; // an empty range is left out
        }
        return { faults, next };
      };
    },
    [Symbol.dispose]: () => validator?.kill(),
  };

  async function start(): Promise<Ready> {
    const started = startValidator(() => {
      if (validator === started) validator = null;
    });
    validator = started;
    return (await started.ask({ document, progressPath: started.progressPath })) as Ready;
  }

  async function take(turn: Turn): Promise<Validated & { slow?: number }> {
    // The first one may have reached its time.
    const answer = await ask(turn)
      .catch(() => ask(turn))
      .catch((error: Error) => {
        health.failing(`EVENT_SCHEMA: ${error.message}`);
        throw unavailable("events cannot be validated now; retry shortly");
      });
    if (!("slow" in answer)) return answer;
    health.failing(`EVENT_SCHEMA: an event was rejected because it ${SLOW}`);
    return { ...answer, next: turn.first, faults: [], ms: SLOW_EVENT_MS };
  }

  async function ask(turn: Turn): Promise<Validated | { slow: number }> {
    if (!validator) await start();
    return (await validator?.ask(turn)) as Validated | { slow: number };
  }
}

function readDocument(path: string): object {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new InvalidSetting(
      `EVENT_SCHEMA: cannot read ${path} as JSON: ${(error as Error).message}`,
    );
  }
}

type Validator = ReturnType<typeof startValidator>;

/** Starts a process that validates. It ends with this one. */
function startValidator(ended: () => void) {
  const progressPath = join(tmpdir(), `daybook-${crypto.randomUUID()}`);
  let answer = Promise.withResolvers<unknown>();
  let slow = -1;
  const limited = [
    "sh",
    "-c",
    `ulimit -t ${MAX_VALIDATOR_SECONDS}; exec "$@"`,
    "daybook-validator",
  ];
  const program = Bun.isStandaloneExecutable
    ? [VALIDATE_COMMAND] // of deploy/daybook.ts: there is no script on the disk
    : ["run", Bun.fileURLToPath(new URL("./validator.ts", import.meta.url))];
  const child = Bun.spawn([...limited, process.execPath, ...program], {
    stdio: ["ignore", "ignore", "inherit"],
    serialization: "advanced",
    ipc: (message) => answer.resolve(message),
    onExit(_, code, signal) {
      process.off("exit", kill);
      rmSync(progressPath, { force: true });
      ended();
      answer.promise.catch(() => {}); // nobody may be waiting
      if (slow >= 0) answer.resolve({ slow });
      else answer.reject(new Error(`the validator ended (${signal ?? code})`));
    },
  });
  process.once("exit", kill);
  child.unref();
  writeFileSync(progressPath, new Uint8Array(4), { flag: "wx", mode: 0o600 });
  const progress = new Int32Array(Bun.mmap(progressPath).buffer);
  return {
    progressPath,
    kill,
    /** Sends a message and returns the answer, or the line at which it was `slow`. Throws if it ends. */
    async ask(message: Setup | Turn): Promise<unknown> {
      if ("document" in message) await answer.promise; // it is ready
      answer = Promise.withResolvers();
      progress[0] = -1;
      child.send(message);
      const timer = "document" in message ? undefined : setInterval(look, LOOK_MS);
      let seen = { line: -1, ms: 0 };
      let looks = 0;
      try {
        return await answer.promise;
      } finally {
        clearInterval(timer);
        rmSync(progressPath, { force: true }); // both processes have it open by now
      }

      function look(): void {
        const line = progress[0] as number;
        const ms = processorMs(child.pid) ?? ++looks * LOOK_MS;
        if (line !== seen.line) seen = { line, ms };
        else if (line >= 0 && ms - seen.ms >= MAX_EVENT_MS) {
          slow = line;
          kill();
        }
      }
    },
  };

  function kill(): void {
    child.kill("SIGKILL");
  }
}

/** The processor time of a process; `null` where the system does not report it. */
function processorMs(pid: number): number | null {
  try {
    return Number(readFileSync(`/proc/${pid}/schedstat`, "utf8").split(" ")[0]) / 1e6;
  } catch {
    return null;
  }
}

/** Items whose pairs can all be compared in time. */
const MAX_UNIQUE_ITEMS = 1_000;
/** A text in which a pattern can try all places in time, if it does so once. */
const MAX_MATCHED_LENGTH = 1_000;
const UNBOUNDED = String.raw`(?:[*+]|\{\d+,\})`;
const NESTED = new RegExp(String.raw`[*+}][^()]*\)+${UNBOUNDED}|\|[^()]*\)+${UNBOUNDED}`);

/** What in a schema can take very long for a short event: not all of it can be known beforehand. */
function risksIn(schema: unknown, path = "#"): string[] {
  if (typeof schema !== "object" || schema === null) return [];
  const { uniqueItems, maxItems, pattern, maxLength, patternProperties } = schema as Record<
    string,
    unknown
  >;
  const risks: string[] = [];
  if (uniqueItems === true && !(Number(maxItems) <= MAX_UNIQUE_ITEMS))
    risks.push(`${path}: uniqueItems without a maxItems of ${MAX_UNIQUE_ITEMS} or less`);
  if (typeof pattern === "string" && isSlow(pattern, Number(maxLength) <= MAX_MATCHED_LENGTH))
    risks.push(`${path}: a pattern that backtracks, ${JSON.stringify(pattern)}`);
  for (const key of Object.keys(patternProperties ?? {}))
    if (isSlow(key, false))
      risks.push(`${path}: a pattern that backtracks, ${JSON.stringify(key)}`);
  for (const [key, value] of Object.entries(schema))
    risks.push(...risksIn(value, `${path}/${key}`));
  return risks;
}

/** Whether a pattern repeats what repeats, or tries all lengths from all places of a text that may be long. */
function isSlow(pattern: string, isShort: boolean): boolean {
  const plain = pattern.replaceAll(/\\.|\[(?:\\.|[^\]])*\]/g, "c"); // classes and escapes stand for a character
  if (NESTED.test(plain)) return true;
  const unbounded = plain.match(new RegExp(UNBOUNDED, "g"))?.length ?? 0;
  return !isShort && unbounded > (plain.startsWith("^") ? 1 : 0);
}
