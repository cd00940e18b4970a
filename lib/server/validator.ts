/**
 * Validates events against EVENT_SCHEMA, in a process of its own, which `event-schema` starts and watches. A
 * pattern or `uniqueItems` can take hours for one event, and only the end of a process ends that: a
 * terminated Worker goes on matching `(.*)(.*)x$`, and takes a core with it.
 */
import { Ajv2020, type ErrorObject } from "ajv/dist/2020.js";

import type { Fault } from "../event/event.ts";

/**
 * Of a longer event only the first fault is listed, and of no event more than some: each element of
 * an array can be one. Listing all faults of a body of 12 MB gave an answer of 80 MB, and blocked the
 * server for 3.5 s.
 */
const MAX_ALL_FAULTS_BYTES = 4096;
const MAX_FAULTS = 10;
/** A path may hold the sender's own words. */
const MAX_PATH_LENGTH = 256;
/** After this long, others have their turn. */
const TURN_MS = 50;

/** The first message: the schema, and a file of four bytes that shows the line under way, also when it hangs. */
export interface Setup {
  document: object;
  progressPath: string;
}

/** `invalid`: why the schema cannot be used. */
export interface Ready {
  invalid: string | null;
}

/** Lines to validate from `first` on. The two elements of `ranges` for a line say where it begins and ends. */
export interface Turn {
  bytes: Uint8Array;
  ranges: Uint32Array;
  first: number;
}

/** The lines before `next` are validated; `faults` has those that are invalid. */
export interface Validated {
  next: number;
  faults: [line: number, faults: Fault[]][];
  /** Processor time. */
  ms: number;
}

let validate: (turn: Turn) => Validated;

/** Validates what the server sends, until the server ends. */
export function run(): void {
  process.on("disconnect", () => process.exit(0));
  process.on("message", (message: Setup | Turn) => {
    process.send?.("document" in message ? setUp(message) : validate(message));
  });
  process.send?.("ready"); // in the one-file program, what is sent before is lost
}

if (import.meta.main) run();

function setUp({ document, progressPath }: Setup): Ready {
  try {
    const check = compile(document);
    const progress = new Int32Array(Bun.mmap(progressPath).buffer);
    validate = (turn) => takeTurn(turn, check, progress);
    return { invalid: null };
  } catch (error) {
    return { invalid: (error as Error).message };
  }
}

/** Returns what is wrong with an event; nothing if it is valid. */
function compile(document: object): (event: unknown, bytes: number) => Fault[] {
  // 19.99 is a multiple of 0.01, although as a double it is not.
  const options = { strict: false, logger: false, multipleOfPrecision: 9 } as const;
  const validateFirst = new Ajv2020(options).compile(document);
  const validateAll = new Ajv2020({ ...options, allErrors: true }).compile(document);
  if ("$async" in validateFirst) throw new Error("$async is not supported");
  return (event, bytes) => {
    if (validateFirst(event)) return [];
    const validateMore = bytes > MAX_ALL_FAULTS_BYTES ? validateFirst : validateAll;
    validateMore(event);
    return (validateMore.errors ?? []).slice(0, MAX_FAULTS).map(faultOf);
  };
}

/** Ajv's own words say what the schema requires, never what was found. */
function faultOf({ instancePath, message = "violates EVENT_SCHEMA" }: ErrorObject): Fault {
  return { path: instancePath.slice(0, MAX_PATH_LENGTH), message };
}

function takeTurn(
  { bytes, ranges, first }: Turn,
  check: ReturnType<typeof compile>,
  progress: Int32Array,
): Validated {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
  const startedMs = performance.now();
  const started = process.cpuUsage();
  const faults: Validated["faults"] = [];
  let line = first;
  for (; 2 * line < ranges.length && performance.now() - startedMs < TURN_MS; line++) {
    const [from = 0, to = 0] = ranges.subarray(2 * line, 2 * line + 2);
    if (from === to) continue;
    progress[0] = line;
    const found = faultsOf(text.toString("utf8", from, to), to - from, check);
    if (found.length > 0) faults.push([line, found]);
  }
  const { user, system } = process.cpuUsage(started);
  return { next: line, faults, ms: (user + system) / 1000 };
}

function faultsOf(line: string, bytes: number, check: ReturnType<typeof compile>): Fault[] {
  const event: unknown = JSON.parse(line);
  try {
    return check(event, bytes);
  } catch {
    // A schema that refers to itself follows an event as deep as it is nested.
    return [{ path: "", message: "is nested too deeply for EVENT_SCHEMA" }];
  }
}
