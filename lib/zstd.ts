/**
 * zstd bodies that are cut. `node:zlib` in Bun 1.4.5 takes a cut frame for the end and drops what
 * follows a frame without a word: events would be lost under a 201. `Bun.zstdDecompress` notices,
 * but knows no limit for what comes out. So the frames are walked first, by RFC 8878.
 */

const FRAME = 0xfd2fb528;
/** The magic numbers of skippable frames are these and 15 more. */
const SKIPPABLE = 0x184d2a50;
const DICTIONARY_ID_BYTES = [0, 1, 2, 4];
const CONTENT_SIZE_BYTES = [0, 2, 4, 8];
const RUN_LENGTH_BLOCK = 1;

/** Whether `bytes` are one or more whole frames, and nothing else. */
export function isWholeZstd(bytes: Uint8Array): boolean {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    let at = 0;
    do at = frameEnd(view, at);
    while (at < bytes.length);
    return at === bytes.length;
  } catch {
    return false; // not a frame, or a header that goes beyond the end
  }
}

function frameEnd(view: DataView, from: number): number {
  const magic = view.getUint32(from, true);
  if ((magic & ~15) >>> 0 === SKIPPABLE) return from + 8 + view.getUint32(from + 4, true);
  if (magic !== FRAME) throw new RangeError("not a frame");
  const flags = view.getUint8(from + 4);
  const hasWindow = (flags & 32) === 0;
  const contentSizeBytes =
    flags >> 6 === 0 && !hasWindow ? 1 : (CONTENT_SIZE_BYTES[flags >> 6] ?? 0);
  let at =
    from + 5 + (hasWindow ? 1 : 0) + (DICTIONARY_ID_BYTES[flags & 3] ?? 0) + contentSizeBytes;
  for (let last = false; !last;) {
    const header = view.getUint16(at, true) | (view.getUint8(at + 2) << 16);
    const type = (header >> 1) & 3;
    last = (header & 1) === 1;
    at += 3 + (type === RUN_LENGTH_BLOCK ? 1 : header >> 3);
  }
  const checksumBytes = flags & 4;
  return at + checksumBytes;
}
