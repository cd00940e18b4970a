/**
 * Follows the frames of a zstd stream (RFC 8878), because `node:zlib` in Bun 1.4.5 takes a truncated frame
 * for the end, and silently drops what follows a frame and is none.
 */

const FRAME = 0xfd2fb528;
/** The magic numbers of skippable frames are these and 15 more. */
const SKIPPABLE = 0x184d2a50;
const DICTIONARY_ID_BYTES = [0, 1, 2, 4];
const CONTENT_SIZE_BYTES = [0, 2, 4, 8];
const RUN_LENGTH_BLOCK = 1;

/** Receives the bytes of a stream. `push` throws if they are not a zstd frame. */
export function openFrameWalk() {
  let header: number[] = [];
  let skipBytes = 0;
  let inFrame = false;
  let checksumBytes = 0;

  return {
    push(bytes: Uint8Array): void {
      for (let index = 0; index < bytes.length;) {
        const skipped = Math.min(skipBytes, bytes.length - index);
        skipBytes -= skipped;
        index += skipped;
        if (index === bytes.length) return;
        header.push(bytes[index++] as number);
        if (inFrame) readBlockHeader();
        else readFrameHeader();
      }
    },
    /** Whether the last frame is whole. */
    isWhole: () => !inFrame && skipBytes === 0 && header.length === 0,
  };

  function readFrameHeader(): void {
    const isFrame = begins(FRAME, 0);
    // Each byte, because the decompressor may end before the fifth.
    if (!isFrame && !begins(SKIPPABLE, 15)) throw new Error("part of it is not a zstd frame");
    if (header.length < 5) return;
    if (!isFrame) {
      if (header.length === 8) next(number(4, 4), false);
      return;
    }
    const flags = header[4] as number;
    const isSingleSegment = (flags >> 5) & 1;
    checksumBytes = flags & 4;
    const contentBytes = CONTENT_SIZE_BYTES[flags >> 6] || isSingleSegment;
    const dictionaryBytes = DICTIONARY_ID_BYTES[flags & 3] as number;
    if (header.length === 6 - isSingleSegment + dictionaryBytes + contentBytes) next(0, true);
  }

  /** Whether the bytes that are there are those of `magic`, but for the bits of `free` in the first. */
  function begins(magic: number, free: number): boolean {
    return header
      .slice(0, 4)
      .every(
        (byte, index) => (((magic >>> (8 * index)) ^ byte) & 255 & (index ? 255 : ~free)) === 0,
      );
  }

  function readBlockHeader(): void {
    if (header.length < 3) return;
    const [isLast, type, size] = [number(0, 1) & 1, (number(0, 1) >> 1) & 3, number(0, 3) >> 3];
    next((type === RUN_LENGTH_BLOCK ? 1 : size) + (isLast ? checksumBytes : 0), !isLast);
  }

  function next(skip: number, isInFrame: boolean): void {
    header = [];
    skipBytes = skip;
    inFrame = isInFrame;
  }

  function number(index: number, length: number): number {
    return header.slice(index, index + length).reduceRight((sum, byte) => sum * 256 + byte, 0);
  }
}
