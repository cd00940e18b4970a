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

/** That a file is another one than those its name has stood for, the last of them as `stored`. */
export function explainOther(bytes: number, stored: string, source: string): string {
  return (
    `does not begin with the ${bytes} bytes that count as ${stored}: it counts whole, as another file, ` +
    source
  );
}

/** Follows the path of a file in which something changed that had been read already. */
export const REWRITTEN =
  "was rewritten while it was read: it no longer holds what counted; run it again to count it as it is now, " +
  "and have its writer write a new file and rename it";

/**
 * Returns those of `generations` that the file begins with, shortest first, each with the hash of its bytes.
 * Reads the file once, however many generations there are. It may have grown since it was opened, and others
 * may have sent or posted what it has grown by: so it ends where a read returns nothing.
 */
export async function matchGenerations<G extends Generation>(
  read: Read,
  generations: readonly G[],
): Promise<{ generation: G; hash: Bun.CryptoHasher }[]> {
  const hash = new Bun.CryptoHasher("sha256");
  const matches = [];
  let hashedTo = 0;
  for (const generation of generations.toSorted((a, b) => a.offset - b.offset)) {
    const { offset, digest } = generation;
    while (hashedTo < offset) {
      const bytes = await read(hashedTo, Math.min(hashedTo + BLOCK_BYTES, offset));
      if (bytes.length === 0) return matches;
      hash.update(bytes);
      hashedTo += bytes.length;
    }
    if (hash.copy().digest("hex") === digest) matches.push({ generation, hash: hash.copy() });
  }
  return matches;
}
