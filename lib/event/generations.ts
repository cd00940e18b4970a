/**
 * The generations of a file: its name may have stood for other bytes before. Of each generation it is
 * known how many bytes were stored and what their SHA-256 is; a file that begins with exactly these
 * bytes is that generation, grown or not.
 *
 * It stands here, and not with the checkpoints, because the client asks the same question of the
 * server's sources and imports nothing of the ledger.
 */
import type { Read } from "./lines.ts";

const BLOCK_BYTES = 1024 * 1024;

/** `digest`: SHA-256 (hex) of the first `offset` bytes. */
export interface Generation {
  offset: number;
  digest: string | null;
}

/**
 * Those of `generations` that the file behind `read` begins with, shortest first, each with the hash
 * of its bytes. One pass over the file, however many there are.
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
    for (; hashedTo < offset; hashedTo = Math.min(hashedTo + BLOCK_BYTES, offset))
      hash.update(await read(hashedTo, Math.min(hashedTo + BLOCK_BYTES, offset)));
    if (hash.copy().digest("hex") === digest) matches.push({ generation, hash: hash.copy() });
  }
  return matches;
}
