/** Request bodies: the right type, within bounds before and after decompression, good lines out. */
import { promisify } from "node:util";
import { gunzip, zstdDecompress } from "node:zlib";

import type { TUnsafe } from "@sinclair/typebox";

import {
  decodeEvent,
  getEventTypes,
  isEventId,
  MAX_EVENT_BYTES,
  MAX_ID_BYTES,
  openScanner,
  InvalidEvent,
} from "../event/event.ts";
import type { EventSchema } from "./event-schema.ts";
import { type Event, EventShape } from "./openapi.ts";
import { eachEvent, withoutBom } from "../event/lines.ts";
import { Problem } from "./problem.ts";
import type { Hold } from "./memory.ts";
import { zstdContentBytes } from "./zstd.ts";

/** A body of many events, compressed and decompressed. */
export const MAX_EVENTS_BYTES = 16 * 1024 * 1024;

/**
 * The bodies, for typed clients only: nothing but `decodeEvent` checks them, which sees the digits as
 * written, and a schema here would make the OpenAPI plugin leave out what `detail` says of the body,
 * because Elysia does not parse it.
 */
export const EventBody = undefined as unknown as TUnsafe<Event>;
export const EventsBody = undefined as unknown as TUnsafe<string>;

/** What an event is, in OpenAPI's words: the kinds in force, and the team's own schema. */
export function describeEvent(own: EventSchema | null): object {
  const { properties, ...rest } = EventShape;
  const name = { ...properties.name, enum: [...getEventTypes().keys()] };
  const event = { ...rest, properties: { ...properties, name } };
  return own ? { allOf: [event, own.document] } : event;
}

/** OpenAPI's words for a body that Elysia does not parse. */
export function describeBody(type: string, schema: object) {
  return { required: true, content: { [type]: { schema } } };
}

/** Read in one go: a chunk costs more than such a body. */
const SMALL_BYTES = 64 * 1024;
/** However slowly a sender sends, its body is here by then, or refused. */
const BODY_MS = 30_000;

const LF = 10;
const CR = 13;
const SPACE = 32;

type Decompress = (bytes: Uint8Array, limit: { maxOutputLength: number }) => Promise<Buffer>;
const DECOMPRESS = new Map<string, Decompress>([
  ["gzip", promisify(gunzip) as never],
  ["zstd", promisify(zstdDecompress) as never],
]);

/**
 * The body of `POST /liveEvent` as a line of the journal, with the `Idempotency-Key` as its id; `refused`
 * hears why it is none.
 */
export async function readEvent(
  request: Request,
  hold: Hold,
  own: EventSchema | null,
  refused: (refusal: InvalidEvent) => void,
): Promise<Uint8Array> {
  requireType(request, "application/json");
  const coding = request.headers.get("content-encoding") ?? "identity";
  if (coding !== "identity")
    throw new Problem(415, "Content-Encoding: one event comes uncompressed");
  const body = withoutBom(await readBytes(request, MAX_EVENT_BYTES, hold));
  const decoded = decodeEvent(body);
  if (decoded instanceof InvalidEvent) throw notAnEvent(decoded);
  const line = withKey(oneLine(body), decoded.id, request.headers.get("idempotency-key"));
  const refusal = own?.refuse(line);
  if (refusal) throw notAnEvent(refusal);
  return line;

  function notAnEvent(refusal: InvalidEvent): Problem {
    refused(refusal);
    const { kind, faults, reason } = refusal;
    if (kind === "json") return new Problem(400, `the body is ${reason}`);
    return new Problem(422, "the body is not an event", { errors: faults });
  }
}

/** The line with its `Idempotency-Key` as its id. */
function withKey(line: Uint8Array, id: string | undefined, header: string | null): Uint8Array {
  if (header === null) return line;
  // HTTP hands over bytes as Latin-1; senders mean UTF-8, as in an event's own id.
  const key = Buffer.from(header, "latin1").toString();
  return key === id ? line : withId(line, key, id);
}

/**
 * In JSON a line break can only stand between tokens: a space says the same on one line. The bytes
 * are otherwise kept, for parsing and writing them again would round their numbers.
 */
function oneLine(json: Uint8Array): Uint8Array {
  const line = new Uint8Array(json.length + 1);
  line.set(json);
  for (let at = 0; at < json.length; at++) if (line[at] === LF || line[at] === CR) line[at] = SPACE;
  line[json.length] = LF;
  return line;
}

function withId(line: Uint8Array, id: string, own: string | undefined): Uint8Array {
  const fault = (message: string) =>
    new Problem(422, "the event cannot have this id", { errors: [{ path: "/id", message }] });
  if (own !== undefined) throw fault("differs from the Idempotency-Key");
  if (!isEventId(id) || id.includes("\ufffd"))
    throw fault(`the Idempotency-Key must have 1 to ${MAX_ID_BYTES} bytes`);
  const end = line.lastIndexOf(0x7d);
  const field = Buffer.from(`,"id":${JSON.stringify(id)}`);
  // The processor takes no longer line than a body may be.
  if (line.length - 1 + field.length > MAX_EVENT_BYTES)
    throw tooLarge(MAX_EVENT_BYTES - field.length);
  return Buffer.concat([line.subarray(0, end), field, line.subarray(end)]);
}

/** A body of many events, its good lines apart from the bad ones. */
export interface Lines {
  /** The length of the body as it was before compression. */
  bytes: number;
  /** The good lines, each with its newline. */
  good: Uint8Array;
  accepted: number;
  rejected: number;
  /** The first bad lines, by their number in the body. */
  errors: { line: number; message: string }[];
  /** Where each good line ends in the body, before its newline, if not plain from their lengths. */
  ends: number[] | undefined;
}

export async function readEvents(
  request: Request,
  hold: Hold,
  listed: number,
  own: EventSchema | null,
  refused: (refusal: InvalidEvent) => void,
  from = 0,
): Promise<Lines> {
  requireType(request, "application/x-ndjson");
  const whole = await decompressed(request, hold);
  hold.takeLarge(whole.length);
  const body = from === 0 ? withoutBom(whole) : whole;
  const bom = whole.length - body.length;
  // A good line moves towards the front, if at all, so its place is free: no second buffer. Only a
  // last line without newline needs a byte more.
  const good = body.at(-1) === LF ? body : new Uint8Array(body.length + 1);
  const errors: Lines["errors"] = [];
  const ends: number[] = [];
  let rejected = 0;
  let plain = true;
  let end = 0;
  const scanner = openScanner();
  const take = (at: number, length: number) => {
    if (end !== at || good !== body) good.set(body.subarray(at, at + length), end);
    end += length + 1;
    good[end - 1] = LF;
    const lineEnd = bom + at + length;
    ends.push(lineEnd);
    plain &&= lineEnd === end - 1;
  };
  const refuse = (number: number, refusal: InvalidEvent) => {
    refused(refusal);
    if (rejected++ < listed) errors.push({ line: number, message: refusal.reason });
  };
  eachEvent(
    body,
    scanner,
    (at, number) => {
      const refusal = own?.refuse(body.subarray(at, scanner.end));
      if (refusal) refuse(number, refusal);
      else take(at, scanner.end - at);
    },
    (line, at, number) => {
      let decoded = decodeEvent(line);
      if (!(decoded instanceof InvalidEvent)) decoded = own?.refuse(line) ?? decoded;
      if (decoded instanceof InvalidEvent) refuse(number, decoded);
      else take(at, line.length);
    },
  );
  return {
    bytes: whole.length,
    good: good.subarray(0, end),
    accepted: ends.length,
    rejected,
    errors,
    ends: plain ? undefined : ends,
  };
}

function requireType(request: Request, wanted: string): void {
  const [type = ""] = (request.headers.get("content-type") ?? "").split(";");
  if (type.trim().toLowerCase() !== wanted)
    throw new Problem(415, `Content-Type must be ${wanted}`);
}

async function decompressed(request: Request, hold: Hold): Promise<Uint8Array> {
  const coding = (request.headers.get("content-encoding") ?? "identity").trim().toLowerCase();
  const decompress = DECOMPRESS.get(coding);
  if (!decompress && coding !== "identity")
    throw new Problem(415, "Content-Encoding must be gzip, zstd or none");
  // What cannot be compressed becomes a little more.
  const limit = MAX_EVENTS_BYTES + (decompress ? 64 * 1024 : 0);
  const bytes = await readBytes(request, limit, hold);
  if (!decompress) return bytes;
  const least = coding === "zstd" ? zstdContentBytes(bytes) : 0;
  if (least === null) throw new Problem(400, "the body is not whole zstd");
  hold.takeLarge(MAX_EVENTS_BYTES);
  try {
    const content = await decompress(bytes, { maxOutputLength: MAX_EVENTS_BYTES });
    // Seen once in 70,000: all but the first frame was missing.
    if (content.length < least) throw new Error("some of it is missing");
    return content;
  } catch (error) {
    if ((error as { code?: string }).code === "ERR_BUFFER_TOO_LARGE")
      throw tooLarge(MAX_EVENTS_BYTES);
    throw new Problem(400, `the body is not ${coding}`);
  }
}

/** The bytes of the body, read only as far as `limit` and the room allow, and not for ever. */
async function readBytes(request: Request, limit: number, hold: Hold): Promise<Uint8Array> {
  const announced = Number(request.headers.get("content-length") ?? Number.NaN);
  if (announced > limit) throw tooLarge(limit);
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    const slow = () => reject(new Problem(408, `the body took longer than ${BODY_MS / 1000} s`));
    timer = setTimeout(slow, BODY_MS);
  });
  try {
    return await Promise.race([announced <= SMALL_BYTES ? readSmall() : readChunks(), late]);
  } catch (error) {
    // The sender has gone: nobody reads this, but it is no fault of ours either.
    throw error instanceof Problem ? error : new Problem(400, "the body did not come to its end");
  } finally {
    clearTimeout(timer);
  }

  function readSmall(): Promise<Uint8Array> {
    hold.take(announced);
    return request.bytes();
  }

  /** Room is taken for what has come, not for what is announced: slow senders hold little. */
  async function readChunks(): Promise<Uint8Array> {
    const chunks: Uint8Array[] = [];
    let bytes = 0;
    for await (const chunk of request.body ?? []) {
      bytes += chunk.length;
      if (bytes > limit) throw tooLarge(limit);
      hold.takeLarge(chunk.length);
      chunks.push(chunk);
    }
    return chunks.length === 1 ? (chunks[0] as Uint8Array) : Buffer.concat(chunks, bytes);
  }
}

function tooLarge(limit: number): Problem {
  return new Problem(413, `the body is larger than ${limit} bytes; send it in smaller pieces`);
}
