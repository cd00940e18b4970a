/**
 * What an event is. The door of the server and the processor ask the same function, so a line that
 * was accepted is a line that will be posted.
 */
import { parseAmount, UNITS } from "./amount.ts";
import { Scanner, type Sign } from "./scanner.ts";

/** A line, or the body of `POST /liveEvent`, may have this many bytes. */
export const MAX_EVENT_BYTES = 64 * 1024;
export const MAX_USER_ID_BYTES = 256;
export const MAX_ID_BYTES = 128;
/** The name of a source. */
export const MAX_SOURCE_BYTES = 256;

/** The kinds of events by their names. */
export type EventTypes = ReadonlyMap<string, Sign>;
const SIGNS: Record<string, Sign> = { "+": 1, "-": -1, "0": 0 };

/** Reads `NAME:+,NAME:-,NAME:0`. */
function parseEventTypes(text: string): EventTypes {
  const types = text.split(",").map((part) => part.trim().split(":"));
  return new Map(types.map(([name = "", sign = ""]) => [name, SIGNS[sign] as Sign]));
}

/** What posting needs of an event: whose balance changes, and by how much (10^-9, signed). */
export interface Change {
  userId: string;
  name: string;
  /** 0: it is kept, and does not count. */
  sign: Sign;
  amount: bigint;
  /** Where the event has one: with it, it counts once however often it comes. */
  id: string | undefined;
}

/** Why a line is not an event. `path` is a JSON pointer, empty for the line as a whole. */
export interface Fault {
  path: string;
  message: string;
}

/** A line that is not an event: too long, not JSON at all, or JSON that breaks the rules. */
export class InvalidEvent {
  constructor(
    readonly kind: "size" | "json" | "event",
    readonly faults: Fault[],
  ) {}
  /** The faults in one line, for people. */
  get reason(): string {
    return this.faults
      .map(({ path, message }) => (path ? `${path.slice(1)} ${message}` : message))
      .join("; ");
  }
}

const WANTED = {
  "": "an event is a JSON object with userId, name and value",
  "/userId": `must be a string of 1 to ${MAX_USER_ID_BYTES} UTF-8 bytes, without NUL or lone surrogates`,
  "/name": "", // depends on the kinds of events that there are
  "/value": "must be a JSON number smaller than 10^15",
  "/id": `must be a string of 1 to ${MAX_ID_BYTES} UTF-8 bytes, without NUL or lone surrogates`,
};
type Path = keyof typeof WANTED;

const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

let eventTypes: EventTypes;
let scanner: Scanner;
setEventTypes("add_revenue:+,subtract_revenue:-");

/**
 * Says which kinds of events there are, as `NAME:+,NAME:-,NAME:0`: once, at the start of a process and of each of its Workers,
 * before any event is read. A setting of the whole program, and not an argument of all that ever looks
 * at a line: two tables in one process would be a mistake.
 */
export function setEventTypes(types: string): void {
  eventTypes = parseEventTypes(types);
  scanner = openScanner();
  const names = [...eventTypes.keys()].map((name) => `"${name}"`);
  WANTED["/name"] = `must be ${names.join(", ").replace(/, (?!.*, )/, " or ")}`;
}

export function getEventTypes(): EventTypes {
  return eventTypes;
}

/** Reads one line (without its newline): the change it stands for, or why it is not an event. */
export function decodeEvent(line: Uint8Array): Change | InvalidEvent {
  if (line.length > MAX_EVENT_BYTES)
    return refuse("size", `longer than ${MAX_EVENT_BYTES} bytes, which an event may have`);

  if (scanner.scan(line, 0) === line.length) return scannedChange(scanner, line);
  let text: string;
  try {
    text = utf8.decode(line);
  } catch {
    return refuse("json", "not UTF-8 text");
  }

  let parsed: unknown;
  const values: { holder: unknown; written: string | undefined }[] = [];
  try {
    // The reviver is the only way to the digits as written. A nested "value" calls it too, hence
    // the holder; of a repeated key it sees the last, as JSON.parse does.
    parsed = (JSON.parse as ParseWithSource)(text, function (key, value, context) {
      if (key === "value") values.push({ holder: this, written: context.source });
      return value;
    });
  } catch (error) {
    return refuse("json", error instanceof RangeError ? "nested too deeply" : "not JSON");
  }

  if (typeof parsed !== "object" || parsed === null || Array.isArray(parsed))
    return refuse("event", WANTED[""]);
  // By hand what lib/server/openapi.ts says: to load a compiler of schemas took a fourth of a client's start.
  const event = parsed as Record<string, unknown>;
  const { userId, name, value, id } = event;
  const wrong: Path[] = [];
  if (typeof userId !== "string" || !isUserId(userId)) wrong.push("/userId");
  if (typeof name !== "string" || !eventTypes.has(name)) wrong.push("/name");
  if (!Number.isFinite(value)) wrong.push("/value");
  if (id !== undefined && (typeof id !== "string" || !isEventId(id))) wrong.push("/id");
  if (wrong.length > 0)
    return new InvalidEvent(
      "event",
      wrong.map((path) => ({ path, message: WANTED[path] })),
    );
  const written = values.find(({ holder }) => holder === event)?.written ?? "";
  const amount = parseAmount(written);
  if (typeof amount === "string") return refuse("event", amount, "/value");
  const sign = eventTypes.get(name as string) as Sign;
  return { userId, name, sign, amount: BigInt(sign) * amount, id } as Change;
}

/** A scanner of events, which takes some of them and refuses none. */
export function openScanner(): Scanner {
  return new Scanner(MAX_USER_ID_BYTES, MAX_ID_BYTES, eventTypes);
}

/** What was scanned last, in `bytes`, as the full decoder gives it. */
export function scannedChange(scanned: Scanner, bytes: Uint8Array): Change {
  const { userFrom, userTo, idFrom, idTo, name, sign, whole, billionths } = scanned;
  const value = BigInt(whole) * UNITS + BigInt(billionths);
  return {
    userId: utf8.decode(bytes.subarray(userFrom, userTo)),
    name,
    sign,
    amount: BigInt(sign) * value,
    id: idTo > 0 ? utf8.decode(bytes.subarray(idFrom, idTo)) : undefined,
  };
}

/** Whether there can be a user of this name. */
export function isUserId(text: string): boolean {
  return isText(text, MAX_USER_ID_BYTES);
}

/** Whether an event can have this id. */
export function isEventId(text: string): boolean {
  return isText(text, MAX_ID_BYTES);
}

/** Whether `text` is not empty, fits, and is something that Postgres can keep. */
export function isText(text: string, maxBytes: number): boolean {
  // No character takes more than three bytes for each of its UTF-16 units.
  const fits = text.length * 3 <= maxBytes || Buffer.byteLength(text) <= maxBytes;
  return text !== "" && fits && !text.includes("\0") && text.isWellFormed();
}

function refuse(
  kind: InvalidEvent["kind"],
  message: string,
  path: Fault["path"] = "",
): InvalidEvent {
  return new InvalidEvent(kind, [{ path, message }]);
}

/** `JSON.parse` with the third argument of the reviver, which TypeScript does not know yet. */
type ParseWithSource = (
  text: string,
  reviver: (this: unknown, key: string, value: unknown, context: { source?: string }) => unknown,
) => unknown;
