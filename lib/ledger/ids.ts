/**
 * Ids as the ledger stores them (table `ids`). An id stays what it is, so that ids which a sender counts up
 * stay neighbours in the index: with 20 million known ids, batches of hashed ones took four times as long.
 * No id begins with the bytes ff or fe, because those are never UTF-8.
 */
import type { Texts } from "../event/texts.ts";

/** Longer ids are hashed. */
const MAX_LITERAL_BYTES = 32;
/** Only what prints back to the same bytes: upper and lower case are two ids. */
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;
const UUID_BYTES = 36;
/** How many bytes of an event's identity are stored: a part of its SHA-256. */
export const HASH_BYTES = 16;

const COMMA = 0x2c;
const DASH = 0x2d;
const UUID_DASHES = [8, 13, 18, 23];
const HEX = Buffer.from("0123456789abcdef");

/** The key of an id, as Postgres writes `bytea`. */
export function keyOf(id: string): string {
  if (id.length === UUID_BYTES && UUID.test(id)) return `\\xff${id.replaceAll("-", "")}`;
  const bytes = Buffer.from(id);
  if (bytes.length <= MAX_LITERAL_BYTES) return `\\x${bytes.toString("hex")}`;
  return `\\xfe${Bun.CryptoHasher.hash("sha256", bytes, "hex").slice(0, 40)}`;
}

/** What is stored of an event's identity, as `daybook_identity` in schema.sql computes it. */
export function hashOfIdentity(identity: string): string {
  return Bun.CryptoHasher.hash("sha256", identity, "hex").slice(0, 2 * HASH_BYTES);
}

/** The keys of ids, as Postgres writes an array of `bytea`. Makes no string of one that is short. */
export function keyArray({ bytes, bounds, size }: Texts): string {
  const array = Buffer.allocUnsafe(2 + size * (2 * MAX_LITERAL_BYTES + 4));
  let at = array.write("{");
  for (let row = 0; row < size; row++) {
    const from = bounds[row] as number;
    const to = bounds[row + 1] as number;
    if (row > 0) array[at++] = COMMA;
    if (isUuid(bytes, from, to))
      at = writeUuid(bytes, from, array, at + array.write("\\\\xff", at));
    else if (to - from > MAX_LITERAL_BYTES)
      at += array.write(`\\${keyOf(bytes.toString("utf8", from, to))}`, at);
    else at = writeHex(bytes, from, to, array, at + array.write("\\\\x", at));
  }
  at += array.write("}", at);
  return array.toString("latin1", 0, at);
}

/** `size` hashes, one after the other, as Postgres reads an array of `uuid`. */
export function hashArray(hashes: Uint8Array, size: number): string {
  const array = Buffer.allocUnsafe(2 + size * (2 * HASH_BYTES + 1));
  let at = array.write("{");
  for (let row = 0; row < size; row++) {
    if (row > 0) array[at++] = COMMA;
    at = writeHex(hashes, HASH_BYTES * row, HASH_BYTES * (row + 1), array, at);
  }
  at += array.write("}", at);
  return array.toString("latin1", 0, at);
}

/** Whether `keyOf` packs the id in `bytes` as a UUID; makes no string of it. */
function isUuid(bytes: Uint8Array, from: number, to: number): boolean {
  if (to - from !== UUID_BYTES) return false;
  for (let i = 0; i < UUID_BYTES; i++) {
    const byte = bytes[from + i] as number;
    const isHex = (byte >= 0x30 && byte <= 0x39) || (byte >= 0x61 && byte <= 0x66);
    if (UUID_DASHES.includes(i) ? byte !== DASH : !isHex) return false;
  }
  return true;
}

/** Writes the UUID that begins at index `from` of `bytes` without its dashes; returns the index after it. */
function writeUuid(bytes: Uint8Array, from: number, array: Buffer, at: number): number {
  for (let i = from; i < from + UUID_BYTES; i++)
    if (bytes[i] !== DASH) array[at++] = bytes[i] as number;
  return at;
}

/** Writes bytes `from` to `to` at index `at` of `array`; returns the index after them. */
function writeHex(bytes: Uint8Array, from: number, to: number, array: Buffer, at: number): number {
  for (let i = from; i < to; i++) {
    const byte = bytes[i] as number;
    array[at++] = HEX[byte >> 4] as number;
    array[at++] = HEX[byte & 15] as number;
  }
  return at;
}
