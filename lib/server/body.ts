/** Request bodies: the right type, within limits before and after decompression, split into good and bad lines. */
import { promisify } from "node:util";
import { gunzip, zstdDecompress } from "node:zlib";

import {
  decodeEvent,
  decodeId,
  type Fault,
  InvalidEvent,
  isEventId,
  MAX_EVENT_BYTES,
  MAX_ID_BYTES,
  openScanner,
} from "../event/event.ts";
import { freeBytes } from "../buffers.ts";
import { eachEventFrom, withoutBom } from "../event/lines.ts";
import { type Arrival, watchArrivals } from "./arrivals.ts";
import type { EventSchema } from "./event-schema.ts";
import { Gather } from "./gather.ts";
import { MAX_ANSWER_BYTES } from "./held-answer.ts";
import { REQUEST_BYTES, type Reservation } from "./memory.ts";
import { Problem } from "./problem.ts";
import { atMost, nextTurn, SLICE_WORK } from "./turns.ts";
import { zstdContentBytes } from "./zstd.ts";

/** The limit of a body of many events, as sent and decompressed. */
export const MAX_EVENTS_BYTES = 16 * 1024 * 1024;
/** A body that announces no more than what each request reserves is read in one go: chunks cost more. */
const MAX_SMALL_BYTES = REQUEST_BYTES;
/** Compression makes incompressible bytes slightly larger. */
const COMPRESSION_OVERHEAD_BYTES = 64 * 1024;
/** A smaller body is read at once; any other takes its turn. */
const MAX_AT_ONCE_BYTES = 1024;
/** Chunks read between two turns of the event loop. */
const MAX_CHUNKS = 4096;
/**
 * Fewer bytes a chunk are rejected, once there are MAX_CHUNKS. A chunk of one byte costs 0.5 µs before anybody
 * sees it, Bun takes up to 87,000 from a socket in one turn, and the socket's buffer grows while it is read.
 */
const MIN_CHUNK_BYTES = 16;

const LF = 10;
const CR = 13;
const SPACE = 32;
const CLOSING_BRACE = 0x7d;

/** A string of RFC 8941, as a whole. */
const QUOTED_KEY = /^"((?:[ !#-[\]-~]|\\["\\])*)"$/;
/** Bun joins the values of repeated headers with `, `. */
const JOINED = /,[ \t]/;

const arrivals = watchArrivals();
const inTurn = atMost(1);

type Decompress = (
  bytes: Uint8Array,
  options: { maxOutputLength: number; info: true },
) => Promise<{ buffer: Buffer; engine: { bytesWritten: number } }>;
const DECOMPRESS = new Map<string, Decompress>([
  ["gzip", promisify(gunzip) as never],
  ["zstd", promisify(zstdDecompress) as never],
]);

/** A request whose body is read. */
export interface Received {
  request: Request;
  reservation: Reservation;
  schema: EventSchema | null;
  /** Called with each line that is not a valid event. */
  onRejected(invalid: InvalidEvent): void;
}

/**
 * The body of `POST /liveEvent` as a line of the journal, with the `Idempotency-Key` as its id. Throws a
 * Problem that says why it is not an event.
 */
export async function readEvent({ request, reservation, schema, onRejected }: Received) {
  requireType(request, "application/json");
  if ((request.headers.get("content-encoding") ?? "identity") !== "identity")
    throw new Problem(415, "a single event must be sent without Content-Encoding");
  const body = withoutBom(await readBytes(request, MAX_EVENT_BYTES, reservation));
  // Hundreds of large events may arrive at once, each worth 5 ms.
  if (body.length > MAX_AT_ONCE_BYTES) await nextTurn();
  const decoded = decodeId(body);
  if (decoded instanceof InvalidEvent && decoded.kind !== "event") throw notAnEvent(decoded);
  const key = parseKey(request.headers.get("idempotency-key"));
  const faults = decoded instanceof InvalidEvent ? [...decoded.faults] : [];
  const id = decoded instanceof InvalidEvent ? undefined : decoded;
  // Not where there is no object to add it to, or its own id is at fault.
  const isNew =
    key !== null && key !== id && faults.every(({ path }) => path !== "" && path !== "/id");
  const keyFault = isNew ? faultOfKey(key, id) : null;
  if (keyFault) faults.push(keyFault);
  const line = isNew && !keyFault ? withId(oneLine(body), key) : oneLine(body);
  if (schema) {
    const { faults: found } = await schema.openBody()(line, Uint32Array.of(0, line.length));
    faults.push(...(found.get(0) ?? []));
  }
  if (faults.length > 0) throw notAnEvent(new InvalidEvent("event", faults));
  return line;

  function notAnEvent(invalid: InvalidEvent): Problem {
    onRejected(invalid);
    const { kind, faults, reason } = invalid;
    if (kind === "json") return new Problem(400, `the body is ${reason}`);
    return new Problem(422, "the body is not a valid event", { errors: faults });
  }
}

/**
 * The body on one line. In JSON a line break can only stand between tokens, where a space means the
 * same. Otherwise the bytes are kept: parsing and writing them again would round their numbers.
 */
function oneLine(json: Uint8Array): Uint8Array {
  const line = new Uint8Array(json.length + 1);
  line.set(json);
  for (let i = 0; i < json.length; i++) if (line[i] === LF || line[i] === CR) line[i] = SPACE;
  line[json.length] = LF;
  return line;
}

/** Why an event with this `id` cannot have this `Idempotency-Key`, or `null`. */
function faultOfKey(key: string, id: string | undefined): Fault | null {
  if (id !== undefined) return { path: "/id", message: "differs from the Idempotency-Key" };
  if (isEventId(key) && !key.includes("\ufffd")) return null;
  return { path: "/id", message: `the Idempotency-Key must have 1 to ${MAX_ID_BYTES} bytes` };
}

/** The line of an event, with an id added to it. */
function withId(line: Uint8Array, id: string): Uint8Array {
  const end = line.lastIndexOf(CLOSING_BRACE);
  const field = Buffer.from(`,"id":${JSON.stringify(id)}`);
  return Buffer.concat([line.subarray(0, end), field, line.subarray(end)]);
}

/** The id in an `Idempotency-Key`: a quoted string of RFC 8941, or the value as it is. Throws the 400. */
function parseKey(header: string | null): string | null {
  if (header === null) return null;
  if (header.startsWith('"')) {
    const [, quoted] = QUOTED_KEY.exec(header) ?? [];
    if (quoted !== undefined) return quoted.replace(/\\(.)/g, "$1");
    throw new Problem(
      400,
      'a quoted Idempotency-Key must be one string of RFC 8941: printable ASCII, \\" and \\\\ escaped, ' +
        "nothing after the closing quote",
    );
  }
  if (JOINED.test(header))
    throw new Problem(
      400,
      'an unquoted Idempotency-Key must not hold ", ", which stands between the values of repeated headers; ' +
        "send one header, or quote the key",
    );
  // HTTP delivers bytes as Latin-1; senders mean UTF-8, as in an event's own id.
  return Buffer.from(header, "latin1").toString();
}

/** A body of many events, its good lines separated from the bad ones. */
export type Lines = Awaited<ReturnType<typeof sortLines>>;

/** Reads a body of many events, decompressed. Throws a Problem when it cannot be read. */
export async function readLines({ request, reservation }: Received): Promise<Uint8Array> {
  requireType(request, "application/x-ndjson");
  const whole = await decompressed(request, reservation);
  reservation.reserveFrame(whole.length);
  return whole;
}

/** Frees a body that is stored, and its good lines. */
export function freeLines(reservation: Reservation, body: Uint8Array, { good }: Lines): void {
  if (good.buffer !== body.buffer) freeBytes(new Uint8Array(good.buffer));
  reservation.free(body);
}

/**
 * Separates the lines of a body, whose bytes are moved in place, and lists up to `maxErrors` bad ones.
 * `offset` is where the body begins in its source. Works in slices.
 */
export async function sortLines(
  whole: Uint8Array,
  { schema, onRejected }: Pick<Received, "schema" | "onRejected">,
  maxErrors: number,
  offset = 0,
) {
  const body = offset === 0 ? withoutBom(whole) : whole;
  const bomBytes = whole.length - body.length;
  // A good line moves towards the front of the body, if at all, so no second buffer is needed. Only a
  // last line without newline needs one more byte.
  const good = body.at(-1) === LF ? body : new Uint8Array(body.length + 1);
  const ends: number[] = [];
  const errors: { line: number; message: string }[] = [];
  let errorBytes = 0;
  /** How many bytes of the body hold no more errors than fit; absent while all of them do. */
  let fits: number | undefined;
  let goodBytes = 0;
  let rejected = 0;
  let isPlain = true;
  const sort: Sort = (line, at, end, invalid) => {
    if (invalid) {
      onRejected(invalid);
      if (rejected++ >= maxErrors || fits !== undefined) return;
      const error = { line, message: invalid.reason };
      errorBytes += Buffer.byteLength(JSON.stringify(error)) + 1;
      if (errorBytes < MAX_ANSWER_BYTES) errors.push(error);
      else fits = bomBytes + body.lastIndexOf(LF, at) + 1;
      return;
    }
    if (goodBytes !== at || good !== body) good.set(body.subarray(at, end), goodBytes);
    goodBytes += end - at + 1;
    good[goodBytes - 1] = LF;
    ends.push(bomBytes + end);
    isPlain &&= bomBytes + end === goodBytes - 1;
  };
  const validator = schema && openValidation(schema, body, sort);
  const found = validator?.add ?? sort;
  const scanner = openScanner();
  const options = {
    bytes: body,
    scanner,
    scanned: (at: number, number: number) => found(number, at, scanner.end),
    visit(line: Uint8Array, at: number, number: number) {
      const decoded = decodeEvent(line);
      found(number, at, at + line.length, decoded instanceof InvalidEvent ? decoded : null);
    },
    maxBytes: MAX_EVENT_BYTES,
    maxWork: SLICE_WORK,
  };
  for (let place = { index: 0, number: 1 }; place.index < body.length;) {
    // The first slices of many bodies may be ready at once: 4 kB of bad lines are a whole one.
    if (place.index > 0 || body.length > MAX_AT_ONCE_BYTES) await nextTurn();
    place = eachEventFrom(place, options);
    await validator?.validate();
  }
  return {
    /** The good lines, each with its newline. */
    good: good.subarray(0, goodBytes),
    /** How many lines are good and bad, with the first bad ones by their number in the body. */
    counts: { accepted: ends.length, rejected, errors },
    /** What the list of errors holds in memory until it is sent. */
    errorBytes: Math.min(errorBytes, MAX_ANSWER_BYTES),
    /** If fewer errors are listed than were asked for: how many bytes have no more than these. */
    ...(fits === undefined || rejected > maxErrors ? {} : { fits }),
    /** Where each good line ends in the body, before its newline; absent if their lengths say it. */
    ...(isPlain ? {} : { ends }),
  };
}

/** Receives a line of a body: its number, where it begins and ends, and why it is not a valid event, if so. */
type Sort = (number: number, at: number, end: number, invalid?: InvalidEvent | null) => void;

/** Validates lines against EVENT_SCHEMA: those of a slice together, and then sorts them. */
function openValidation(schema: EventSchema, body: Uint8Array, sort: Sort) {
  const check = schema.openBody();
  let lines: { number: number; at: number; end: number; invalid: InvalidEvent | null }[] = [];
  return {
    add(number: number, at: number, end: number, invalid: InvalidEvent | null = null): void {
      lines.push({ number, at, end, invalid });
    },
    /** Throws the 413 that says how many bytes of the body can be validated. */
    async validate(): Promise<void> {
      const [{ at: from } = { at: 0 }] = lines;
      const to = lines.at(-1)?.end ?? 0;
      const ranges = new Uint32Array(2 * lines.length);
      // The scanner and `decodeEvent` name their faults; what is no JSON has no others.
      for (const [i, { at, end, invalid }] of lines.entries())
        if (!invalid || invalid.kind === "event") ranges.set([at - from, end - from], 2 * i);
      const { faults, next } = await check(new Uint8Array(body.subarray(from, to)), ranges);
      if (next < lines.length) throw tooComplex((lines[next] as { at: number }).at);
      for (const [i, { number, at, end, invalid }] of lines.entries()) {
        const found = faults.get(i);
        const all = found && new InvalidEvent("event", [...(invalid?.faults ?? []), ...found]);
        sort(number, at, end, all ?? invalid);
      }
      lines = [];
    },
  };
}

function tooComplex(at: number): Problem {
  const detail = `EVENT_SCHEMA takes too long for this body; send the first ${at} bytes first`;
  return new Problem(413, detail, { bytes: at });
}

function requireType(request: Request, required: string): void {
  const given = request.headers.get("content-type") ?? "";
  if (given === required) return;
  const [type = ""] = given.split(";");
  if (type.trim().toLowerCase() !== required)
    throw new Problem(415, `Content-Type must be ${required}`);
}

async function decompressed(request: Request, reservation: Reservation): Promise<Uint8Array> {
  const coding = (request.headers.get("content-encoding") ?? "identity").trim().toLowerCase();
  const decompress = DECOMPRESS.get(coding);
  if (!decompress && coding !== "identity")
    throw new Problem(415, "Content-Encoding must be gzip, zstd or absent");
  const limit = MAX_EVENTS_BYTES + (decompress ? COMPRESSION_OVERHEAD_BYTES : 0);
  const bytes = await readBytes(request, limit, reservation);
  if (!decompress) return bytes;
  const minBytes = coding === "zstd" ? await zstdContentBytes(bytes) : 0;
  if (minBytes === null) throw new Problem(400, "the body is not complete zstd");
  // Nobody knows how large it will be: four small bodies at once would need the memory of the largest.
  return inTurn(async () => {
    reservation.reserveLarge(MAX_EVENTS_BYTES);
    try {
      const options = { maxOutputLength: MAX_EVENTS_BYTES, info: true } as const;
      const { buffer: content, engine } = await decompress(bytes, options);
      // The first, seen once in 70,000: all but the first frame was missing. The second: Bun 1.4.5 drops,
      // without an error, a gzip member that follows NULs.
      const read = bytes.subarray(engine.bytesWritten);
      if (content.length < minBytes || read.some((byte) => byte !== 0))
        throw new Error("some of it is missing");
      reservation.release(MAX_EVENTS_BYTES - content.length);
      reservation.free(bytes);
      return content;
    } catch (error) {
      if ((error as { code?: string }).code === "ERR_BUFFER_TOO_LARGE")
        throw tooLarge(MAX_EVENTS_BYTES);
      throw new Problem(400, `the body is not valid ${coding}`);
    }
  });
}

/** How long the body of a request is, as it announces; NaN where that does not say it. */
export function announcedBytes({ headers }: Request): number {
  if ((headers.get("content-encoding") ?? "identity") !== "identity") return Number.NaN;
  return Number(headers.get("content-length") ?? Number.NaN);
}

/** The bytes of the body, read only as far as `limit` and the memory budget allow, and not for ever. */
async function readBytes(
  request: Request,
  limit: number,
  reservation: Reservation,
): Promise<Uint8Array> {
  const announced = Number(request.headers.get("content-length") ?? Number.NaN);
  if (announced > limit) throw tooLarge(limit);
  try {
    if (announced <= MAX_SMALL_BYTES) return await arrivals.small(request.bytes());
    using arrival = arrivals.expect();
    return await Promise.race([readChunks(arrival), arrival.tooSlow]);
  } catch (error) {
    // The sender is gone, so nobody reads this; but it is not our fault either.
    throw error instanceof Problem ? error : new Problem(400, "the body ended too early");
  }

  /** Reserves what has arrived, not what is announced: slow senders hold little. */
  async function readChunks(arrival: Arrival): Promise<Uint8Array> {
    const gather = new Gather((bytes) =>
      announced <= MAX_EVENT_BYTES ? reservation.reserve(bytes) : reservation.reserveLarge(bytes),
    );
    let chunks = 0;
    for await (const chunk of request.body ?? []) {
      arrival.arrived(chunk.length);
      if (gather.bytes + chunk.length > limit) throw tooLarge(limit);
      gather.add(chunk);
      if (++chunks % MAX_CHUNKS > 0) continue;
      if (gather.bytes < chunks * MIN_CHUNK_BYTES) throw tooSmallChunks(gather.bytes / chunks);
      await nextTurn();
    }
    return gather.whole();
  }
}

function tooSmallChunks(bytes: number): Problem {
  const detail = `the body comes in chunks of ${bytes.toFixed(1)} bytes; send chunks of at least ${MIN_CHUNK_BYTES} bytes`;
  return new Problem(413, detail);
}

function tooLarge(limit: number): Problem {
  return new Problem(413, `the body is larger than ${limit} bytes; send smaller ones`);
}
