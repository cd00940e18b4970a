/**
 * Detects truncated zstd bodies. `node:zlib` in Bun 1.4.5 accepts a truncated frame as the end, and
 * silently drops what follows a frame: events would be lost under a 201. `Bun.zstdDecompress` notices,
 * but has no limit for its output. So the frames are walked first, by RFC 8878.
 */

const FRAME = 0xfd2fb528;
/** The magic numbers of skippable frames are these and 15 more. */
const SKIPPABLE = 0x184d2a50;
const DICTIONARY_ID_BYTES = [0, 1, 2, 4];
const CONTENT_SIZE_BYTES = [0, 2, 4, 8];
const RUN_LENGTH_BLOCK = 1;

/**
 * The least number of bytes that `bytes` decompress to, as far as the headers of its frames say;
 * `null` unless it is one or more whole frames and nothing else.
 */
export function zstdContentBytes(bytes: Uint8Array): number | null {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  try {
    let at = 0;
    let content = 0;
    do {
      const frame = readFrame(view, at);
      at = frame.end;
      content += frame.content;
    } while (at < bytes.length);
    return at === bytes.length ? content : null;
  } catch {
    return null; // not a frame, or its header reaches beyond the end
  }
}

/** `content` is 0 where the header does not say it, as in a stream. */
function readFrame(view: DataView, from: number): { end: number; content: number } {
  const magic = view.getUint32(from, true);
  if ((magic & ~15) >>> 0 === SKIPPABLE)
    return { end: from + 8 + view.getUint32(from + 4, true), content: 0 };
  if (magic !== FRAME) throw new RangeError("not a frame");
  const flags = view.getUint8(from + 4);
  const hasWindow = (flags & 32) === 0;
  const contentSizeBytes =
    flags >> 6 === 0 && !hasWindow ? 1 : (CONTENT_SIZE_BYTES[flags >> 6] ?? 0);
  const sizeAt = from + 5 + (hasWindow ? 1 : 0) + (DICTIONARY_ID_BYTES[flags & 3] ?? 0);
  const content = contentSize(view, sizeAt, contentSizeBytes);
  let at = sizeAt + contentSizeBytes;
  for (let last = false; !last;) {
    const header = view.getUint16(at, true) | (view.getUint8(at + 2) << 16);
    const type = (header >> 1) & 3;
    last = (header & 1) === 1;
    at += 3 + (type === RUN_LENGTH_BLOCK ? 1 : header >> 3);
  }
  const checksumBytes = flags & 4;
  return { end: at + checksumBytes, content };
}

function contentSize(view: DataView, at: number, bytes: number): number {
  if (bytes === 1) return view.getUint8(at);
  if (bytes === 2) return view.getUint16(at, true) + 256;
  if (bytes === 4) return view.getUint32(at, true);
  return bytes === 8 ? Number(view.getBigUint64(at, true)) : 0;
}
