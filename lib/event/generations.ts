/**
 * The generations of a file: the same name may have been used for other content before. For each
 * generation, the number of stored bytes and their SHA-256 are known. A file that begins with exactly
 * these bytes is that generation, whether it has grown or not.
 *
 * This module is not part of ledger/, because the client also matches the sources of the server, and
 * must not import the ledger.
 */
import type { Read } from "./lines.ts";

const BLOCK_BYTES = 1024 * 1024;

/** `digest`: SHA-256 (hex) of the first `offset` bytes. */
export interface Generation {
  offset: number;
  digest: string | null;
}

/**
 * Returns those of `generations` that the file of `size` bytes begins with, shortest first, each with
 * the hash of its bytes. Reads the file once, however many generations there are.
 */
export async function matchGenerations<G extends Generation>(
  read: Read,
  size: number,
  generations: readonly G[],
): Promise<{ generation: G; hash: Bun.CryptoHasher }[]> {
  const hash = new Bun.CryptoHasher("sha256");
  const matches = [];
  let hashedTo = 0;
  for (const generation of generations.toSorted((a, b) => a.offset - b.offset)) {
    const { offset, digest } = generation;
    if (offset > size) break;
    while (hashedTo < offset) {
      const bytes = await read(hashedTo, Math.min(hashedTo + BLOCK_BYTES, offset));
      if (bytes.length === 0) return matches; // the size of a compressed file is not known before
      hash.update(bytes);
      hashedTo += bytes.length;
    }
    if (hash.copy().digest("hex") === digest) matches.push({ generation, hash: hash.copy() });
  }
  return matches;
}
