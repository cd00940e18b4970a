/**
 * A team's own rules for events (EVENT_SCHEMA): a JSON Schema, besides what every event must be. They
 * hold at the door and only there: what was taken under yesterday's rules is posted all the same.
 */
import { InvalidSetting } from "../config.ts";
import { readFileSync } from "node:fs";

import { Ajv2020, type ErrorObject, type ValidateFunction } from "ajv/dist/2020.js";

import { type Fault, InvalidEvent } from "../event/event.ts";

/**
 * Of a long event only the first fault is told, and never more than some: each element of an array can
 * be one. All of them, of a body of 12 MB, were an answer of 80 MB, after 3.5 s in which nothing else was served.
 */
const MAX_ALL_FAULTS_BYTES = 4096;
const MAX_FAULTS = 10;
/** A path may be made of the sender's own words. */
const MAX_PATH = 256;

export interface EventSchema {
  /** The schema itself, for the API's description of itself. */
  readonly document: object;
  /** What is wrong with the event line, or `null`. */
  refuse(line: Uint8Array): InvalidEvent | null;
}

/** Reads the schema at `path`. Throws one line that says what is wrong with it. */
export function openEventSchema(path: string): EventSchema {
  let document: object;
  try {
    document = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new InvalidSetting(
      `EVENT_SCHEMA: cannot read ${path} as JSON: ${(error as Error).message}`,
    );
  }
  let first: ValidateFunction;
  let all: ValidateFunction;
  try {
    // 19.99 is a multiple of 0.01, though as a double it is not.
    const options = { strict: false, logger: false, multipleOfPrecision: 9 } as const;
    first = new Ajv2020(options).compile(document);
    all = new Ajv2020({ ...options, allErrors: true }).compile(document);
    if ("$async" in first) throw new Error("found $async, wanted a schema that answers at once");
  } catch (error) {
    throw new InvalidSetting(
      `EVENT_SCHEMA: ${path} is no JSON Schema (2020-12): ${(error as Error).message}`,
    );
  }
  return {
    document,
    refuse(line) {
      const event = JSON.parse(Buffer.from(line).toString());
      if (first(event)) return null;
      const validate = line.length > MAX_ALL_FAULTS_BYTES ? first : all;
      validate(event);
      return new InvalidEvent("event", (validate.errors ?? []).slice(0, MAX_FAULTS).map(faultOf));
    },
  };
}

/** Ajv's own words name what the schema wants, never what was found. */
function faultOf({
  instancePath,
  message = "is not as EVENT_SCHEMA wants it",
}: ErrorObject): Fault {
  return { path: instancePath.slice(0, MAX_PATH), message };
}
