/**
 * Keys of hash tables for what senders choose. The hash of a JavaScript Map has no key, so anybody can
 * compute texts that share a bucket, and each one is then compared with all others. Nobody outside of
 * this process can compute texts whose digests do.
 */
import { randomBytes } from "node:crypto";

const SECRET = randomBytes(32).toString("hex");

export function keyedDigest(text: string): string {
  return Bun.CryptoHasher.hash("sha256", SECRET + text, "base64");
}
