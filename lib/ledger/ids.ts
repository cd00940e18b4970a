/**
 * Ids as the ledger stores them (table `ids`). An id stays what it is, so that ids which a sender counts up
 * stay neighbours in the index: with 20 million known ids, batches of hashed ones took four times as long.
 * No id begins with the bytes ff or fe, because those are never UTF-8.
 */

/** Longer ids are hashed. */
const MAX_LITERAL_BYTES = 32;
/** Only what prints back to the same bytes: upper and lower case are two ids. */
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/** The key of an id, as Postgres writes `bytea`. */
export function keyOf(id: string): string {
  if (id.length === 36 && UUID.test(id)) return `\\xff${id.replaceAll("-", "")}`;
  const bytes = Buffer.from(id);
  if (bytes.length <= MAX_LITERAL_BYTES) return `\\x${bytes.toString("hex")}`;
  return `\\xfe${Bun.CryptoHasher.hash("sha256", bytes, "hex").slice(0, 40)}`;
}

/** What is stored of an event's identity, as `daybook_identity` in schema.sql computes it. */
export function hashOfIdentity(identity: string): string {
  return Bun.CryptoHasher.hash("sha256", identity, "hex").slice(0, 32);
}
