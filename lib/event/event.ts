/**
 * What an event is. The server and the processor decide it with the same function, so every line that
 * the server accepts can be posted.
 */
import { isUtf8 } from "node:buffer";

import { parseAmount, UNITS } from "./amount.ts";
import { Scanner, type Sign } from "./scanner.ts";

/** The limit of a line without its LF or CRLF, and of the body of `POST /liveEvent`. Blanks count. */
export const MAX_EVENT_BYTES = 64 * 1024;
/** The limit of a line of the journal: there, an `Idempotency-Key` of the request is a part of the event. */
export const MAX_JOURNALED_BYTES = MAX_EVENT_BYTES + 512;
/** How deep a value may be nested. Bun's JSON.parse with a reviver accepts no more. */
export const MAX_NESTING = 4_499;
export const MAX_USER_ID_BYTES = 256;
export const MAX_ID_BYTES = 128;
/** The limit of a source's name. */
export const MAX_SOURCE_BYTES = 256;

/** The event types: for each name, whether such an event adds, subtracts or does not count. */
type EventTypes = ReadonlyMap<string, Sign>;
const SIGNS: Record<string, Sign> = { "+": 1, "-": -1, "0": 0 };

/** What posting needs from an event: whose balance changes, and by how much. */
export interface Change {
  userId: string;
  name: string;
  /** 0: the event is kept in the journal, but does not count. */
  sign: Sign;
  /** In units of 10^-9; already negated for an event that subtracts. */
  amount: bigint;
  /** Events with the same id count once. */
  id: string | undefined;
}

/** One reason why a line is not an event. `path` is a JSON pointer, empty for the line as a whole. */
export interface Fault {
  path: string;
  message: string;
}

/** A line that is not an event: too long (`size`), not JSON, or JSON that breaks the rules (`event`). */
export class InvalidEvent {
  constructor(
    readonly kind: "size" | "json" | "event",
    readonly faults: Fault[],
  ) {}
  /** All faults on one line, for people. */
  get reason(): string {
    return this.faults
      .map(({ path, message }) => (path ? `${path.slice(1)} ${message}` : message))
      .join("; ");
  }
}

const NESTED = `nested too deeply: a value may have ${MAX_NESTING} levels`;
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

let eventTypes: EventTypes;
let scanner: Scanner;
setEventTypes("add_revenue:+,subtract_revenue:-");

/**
 * Sets the event types from `NAME:+,NAME:-,NAME:0`, once, when a process or one of its Workers starts,
 * before any event is decoded. They are global rather than an argument of every function that handles a
 * line, because two sets of types in one process would be a mistake.
 */
export function setEventTypes(types: string): void {
  const entries = types.split(",").map((part) => part.trim().split(":"));
  eventTypes = new Map(entries.map(([name = "", sign = ""]) => [name, SIGNS[sign] as Sign]));
  scanner = openScanner();
}

export function getEventTypes(): EventTypes {
  return eventTypes;
}

/** Decodes one line, without its newline: the change it stands for, or why it is not an event. */
export function decodeEvent(
  line: Uint8Array,
  maxBytes: number = MAX_EVENT_BYTES,
): Change | InvalidEvent {
  if (line.length > maxBytes)
    return invalid("size", `longer than ${MAX_EVENT_BYTES} bytes, the limit of an event`);
  if (scanner.scan(line, 0) === line.length) return scannedChange(scanner, line);

  // Asked beforehand: an error costs as much as a good line ten times as long.
  if (!isUtf8(line)) return invalid("json", "not UTF-8 text");
  const text = utf8.decode(line);
  let parsed: unknown;
  const values: { holder: unknown; written: string | undefined }[] = [];
  try {
    // Only the reviver sees the digits as written. It is also called for a nested "value", hence the
    // holder. For a repeated key it sees only the last one, which is the one that JSON.parse returns.
    parsed = (JSON.parse as ParseWithSource)(text, function (key, value, context) {
      if (key === "value") values.push({ holder: this, written: context.source });
      return value;
    });
  } catch (error) {
    return invalid("json", error instanceof RangeError ? NESTED : "not JSON");
  }
  if (typeof parsed !== "object" || parsed === null || Array.isArray(parsed))
    return invalid("event", "an event is a JSON object with userId, name and value");
  const event = parsed as Record<string, unknown>;
  return toChange(event, values.find(({ holder }) => holder === event)?.written ?? "");
}

/** The id of the event on a line, if it has one, or why it is not an event: `decodeEvent` for a caller that posts nothing. */
export function decodeId(line: Uint8Array): string | undefined | InvalidEvent {
  if (line.length <= MAX_EVENT_BYTES && scanner.scan(line, 0) === line.length)
    return scannedId(scanner, line);
  const decoded = decodeEvent(line);
  return decoded instanceof InvalidEvent ? decoded : decoded.id;
}

/**
 * Checks the fields of an event whose value was written as `written`. By hand, although
 * lib/server/openapi.ts has a schema: loading a schema compiler took a quarter of a client's start.
 */
function toChange(event: Record<string, unknown>, written: string): Change | InvalidEvent {
  const { userId, name, id } = event;
  const faults: Fault[] = [];
  const reject = (path: string, rule: string) => {
    const isMissing = !Object.hasOwn(event, path.slice(1));
    faults.push({ path, message: isMissing ? `is missing; it ${rule}` : rule });
  };
  if (typeof userId !== "string" || !isUserId(userId))
    reject("/userId", textRule(MAX_USER_ID_BYTES));
  const sign = eventTypes.get(name as string);
  if (sign === undefined) reject("/name", nameRule());
  const amount = parseAmount(written);
  if (typeof amount === "string") reject("/value", amount);
  if (id !== undefined && (typeof id !== "string" || !isEventId(id)))
    reject("/id", textRule(MAX_ID_BYTES));
  if (faults.length > 0) return new InvalidEvent("event", faults);
  return { userId, name, sign, amount: BigInt(sign as Sign) * (amount as bigint), id } as Change;
}

function textRule(maxBytes: number): string {
  return `must be a string of 1 to ${maxBytes} UTF-8 bytes, without NUL or lone surrogates`;
}

function nameRule(): string {
  const names = [...eventTypes.keys()].map((name) => `"${name}"`);
  return `must be ${names.join(", ").replace(/, (?!.*, )/, " or ")}`;
}

/** A scanner for events of the current types. */
export function openScanner(): Scanner {
  return new Scanner(MAX_USER_ID_BYTES, MAX_ID_BYTES, eventTypes);
}

/** The event that `scanned` found last, in `bytes`, as `decodeEvent` would return it. */
export function scannedChange(scanned: Scanner, bytes: Uint8Array): Change {
  const { userFrom, userTo, name, sign, whole, billionths } = scanned;
  const userId = utf8.decode(bytes.subarray(userFrom, userTo));
  const amount = BigInt(sign) * (BigInt(whole) * UNITS + BigInt(billionths));
  return { userId, name, sign, amount, id: scannedId(scanned, bytes) };
}

function scannedId({ idFrom, idTo }: Scanner, bytes: Uint8Array): string | undefined {
  return idTo > 0 ? utf8.decode(bytes.subarray(idFrom, idTo)) : undefined;
}

/** Whether an event can have this `userId`. */
export function isUserId(text: string): boolean {
  return isText(text, MAX_USER_ID_BYTES);
}

/** Whether an event can have this `id`. */
export function isEventId(text: string): boolean {
  return isText(text, MAX_ID_BYTES);
}

/** Whether `text` has 1 to `maxBytes` UTF-8 bytes and can be stored in Postgres. */
export function isText(text: string, maxBytes: number): boolean {
  // A UTF-16 unit needs at most three UTF-8 bytes.
  const fits = text.length * 3 <= maxBytes || Buffer.byteLength(text) <= maxBytes;
  return text !== "" && fits && !text.includes("\0") && text.isWellFormed();
}

function invalid(kind: InvalidEvent["kind"], message: string): InvalidEvent {
  return new InvalidEvent(kind, [{ path: "", message }]);
}

/** `JSON.parse` with the reviver's third argument, which TypeScript does not know yet. */
type ParseWithSource = (
  text: string,
  reviver: (this: unknown, key: string, value: unknown, context: { source?: string }) => unknown,
) => unknown;
