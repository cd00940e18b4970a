/**
 * Puts the chunks of a body together. Each has its own cost, whatever its size: 16 MB in chunks of one
 * byte took 1.8 GB. So small ones are copied into blocks, which grow with what has arrived.
 */
import { freeBytes } from "../buffers.ts";

const MIN_BLOCK_BYTES = 4 * 1024;
const MAX_BLOCK_BYTES = 64 * 1024;
/** Chunks from this size on are kept as they are. */
const LARGE_CHUNK_BYTES = 16 * 1024;

export class Gather {
  bytes = 0;
  readonly parts: Uint8Array[] = [];
  private block = new Uint8Array();
  private blockBytes = 0;

  /** `reserve` is called before memory is used. */
  constructor(private readonly reserve: (bytes: number) => void) {}

  add(chunk: Uint8Array): void {
    const isLarge = chunk.length >= LARGE_CHUNK_BYTES;
    if (isLarge || this.blockBytes + chunk.length > this.block.length) this.endBlock();
    if (isLarge) {
      this.reserve(chunk.length);
      this.parts.push(chunk);
    } else {
      if (this.block.length === 0) this.startBlock(chunk.length);
      this.block.set(chunk, this.blockBytes);
      this.blockBytes += chunk.length;
    }
    this.bytes += chunk.length;
  }

  /** All chunks, which are gone then. */
  whole(): Uint8Array {
    this.endBlock();
    const [first] = this.parts;
    if (first && this.parts.length === 1) return first;
    const whole = Buffer.concat(this.parts, this.bytes);
    for (const part of this.parts.splice(0)) freeBytes(part);
    return whole;
  }

  private startBlock(leastBytes: number): void {
    const bytes = Math.max(leastBytes, Math.min(MAX_BLOCK_BYTES, this.bytes), MIN_BLOCK_BYTES);
    this.reserve(bytes);
    this.block = new Uint8Array(bytes);
  }

  private endBlock(): void {
    if (this.blockBytes > 0) this.parts.push(this.block.subarray(0, this.blockBytes));
    this.block = new Uint8Array();
    this.blockBytes = 0;
  }
}
