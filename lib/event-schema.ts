/**
 * A team's own rules for events (EVENT_SCHEMA): a JSON Schema, besides what every event must be. They
 * hold at the door and only there: what was taken under yesterday's rules is posted all the same.
 */
import { readFileSync } from "node:fs";

import { Ajv2020, type ErrorObject } from "ajv/dist/2020.js";

import { type Fault, Refusal } from "./event.ts";

export interface EventSchema {
  /** The schema itself, for the API's description of itself. */
  readonly document: object;
  /** What is wrong with the event line, or `null`. */
  refuse(line: Uint8Array): Refusal | null;
}

/** Reads the schema at `path`. Throws one line that says what is wrong with it. */
export function openEventSchema(path: string): EventSchema {
  let document: object;
  try {
    document = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new Error(`EVENT_SCHEMA: cannot read ${path} as JSON: ${(error as Error).message}`);
  }
  const ajv = new Ajv2020({ allErrors: true, strict: false, logger: false });
  let validate: ReturnType<typeof ajv.compile>;
  try {
    validate = ajv.compile(document);
  } catch (error) {
    throw new Error(
      `EVENT_SCHEMA: ${path} is no JSON Schema (2020-12): ${(error as Error).message}`,
    );
  }
  return {
    document,
    refuse(line) {
      if (validate(JSON.parse(Buffer.from(line).toString()))) return null;
      return new Refusal("event", (validate.errors ?? []).map(faultOf));
    },
  };
}

/** Ajv's own words name what the schema wants, never what was found. */
function faultOf({
  instancePath,
  message = "is not as EVENT_SCHEMA wants it",
}: ErrorObject): Fault {
  return { path: instancePath, message };
}
