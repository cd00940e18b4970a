/**
 * A team's own rules for events (EVENT_SCHEMA): a JSON Schema that every event must satisfy besides the
 * rules of all events. Only the server checks it: what it accepted under yesterday's schema is posted.
 */
import { readFileSync } from "node:fs";

import { Ajv2020, type ErrorObject, type ValidateFunction } from "ajv/dist/2020.js";

import { InvalidSetting } from "../config.ts";
import { type Fault, InvalidEvent } from "../event/event.ts";

/**
 * Of a longer event only the first fault is listed, and of no event more than some: each element of
 * an array can be one. Listing all faults of a body of 12 MB gave an answer of 80 MB, and blocked the
 * server for 3.5 s.
 */
const MAX_ALL_FAULTS_BYTES = 4096;
const MAX_FAULTS = 10;
/** A path may hold the sender's own words. */
const MAX_PATH_LENGTH = 256;

export type EventSchema = ReturnType<typeof openEventSchema>;

/** Reads the schema at `path`. Throws InvalidSetting with one line that says what is wrong with it. */
export function openEventSchema(path: string) {
  let document: object;
  try {
    document = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new InvalidSetting(
      `EVENT_SCHEMA: cannot read ${path} as JSON: ${(error as Error).message}`,
    );
  }
  let validateFirst: ValidateFunction;
  let validateAll: ValidateFunction;
  try {
    // 19.99 is a multiple of 0.01, although as a double it is not.
    const options = { strict: false, logger: false, multipleOfPrecision: 9 } as const;
    validateFirst = new Ajv2020(options).compile(document);
    validateAll = new Ajv2020({ ...options, allErrors: true }).compile(document);
    if ("$async" in validateFirst) throw new Error("$async is not supported");
  } catch (error) {
    throw new InvalidSetting(
      `EVENT_SCHEMA: ${path} is not a valid JSON Schema (2020-12): ${(error as Error).message}`,
    );
  }
  return {
    /** The schema itself, for the API's description. */
    document,
    /** What is wrong with the event line, or `null`. */
    check(line: Uint8Array): InvalidEvent | null {
      const event = JSON.parse(Buffer.from(line).toString());
      if (validateFirst(event)) return null;
      const validate = line.length > MAX_ALL_FAULTS_BYTES ? validateFirst : validateAll;
      validate(event);
      return new InvalidEvent("event", (validate.errors ?? []).slice(0, MAX_FAULTS).map(faultOf));
    },
  };
}

/** Ajv's own words say what the schema requires, never what was found. */
function faultOf({ instancePath, message = "violates EVENT_SCHEMA" }: ErrorObject): Fault {
  return { path: instancePath.slice(0, MAX_PATH_LENGTH), message };
}
