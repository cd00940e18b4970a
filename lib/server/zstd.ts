/**
 * Detects truncated zstd bodies. `node:zlib` in Bun 1.4.5 accepts a truncated frame as the end, and
 * silently drops what follows a frame: events would be lost under a 201. `Bun.zstdDecompress` notices,
 * but has no limit for its output. So the frames are walked first, by RFC 8878.
 */
import { nextTurn } from "./turns.ts";

const FRAME = 0xfd2fb528;
/** The magic numbers of skippable frames are these and 15 more. */
const SKIPPABLE = 0x184d2a50;
const DICTIONARY_ID_BYTES = [0, 1, 2, 4];
const CONTENT_SIZE_BYTES = [0, 2, 4, 8];
const RUN_LENGTH_BLOCK = 1;
/** Headers read between two turns of the event loop: about a millisecond. */
const SLICE_STEPS = 20_000;

/**
 * The least number of bytes that `bytes` decompress to, as far as the headers of its frames say;
 * `null` unless it is one or more whole frames and nothing else.
 */
export async function zstdContentBytes(bytes: Uint8Array): Promise<number | null> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const frames: Frames = { view, at: 0, content: 0, frame: null };
  try {
    // 16 MiB may be 5 million blocks.
    while (!step(frames, SLICE_STEPS)) await nextTurn();
    return frames.at === bytes.length ? frames.content : null;
  } catch {
    return null; // not a frame, or its header reaches beyond the end
  }
}

interface Frames {
  view: DataView;
  at: number;
  content: number;
  /** The frame whose blocks are read. */
  frame: { checksumBytes: number } | null;
}

/** Reads up to `steps` headers of frames and blocks. Returns whether it has reached the end. */
function step(frames: Frames, steps: number): boolean {
  const { view } = frames;
  for (let left = steps; left > 0; left--) {
    if (!frames.frame) readFrame(frames);
    else {
      const header = view.getUint16(frames.at, true) | (view.getUint8(frames.at + 2) << 16);
      const type = (header >> 1) & 3;
      frames.at += 3 + (type === RUN_LENGTH_BLOCK ? 1 : header >> 3);
      if ((header & 1) === 0) continue;
      frames.at += frames.frame.checksumBytes;
      frames.frame = null;
    }
    if (!frames.frame && frames.at >= view.byteLength) return true;
  }
  return false;
}

/** Reads the header of a frame, or a skippable frame. The content is 0 where it is not stated, as in a stream. */
function readFrame(frames: Frames): void {
  const { view, at: from } = frames;
  const magic = view.getUint32(from, true);
  if ((magic & ~15) >>> 0 === SKIPPABLE) {
    frames.at = from + 8 + view.getUint32(from + 4, true);
    return;
  }
  if (magic !== FRAME) throw new RangeError("not a frame");
  const flags = view.getUint8(from + 4);
  const hasWindow = (flags & 32) === 0;
  const contentSizeBytes =
    flags >> 6 === 0 && !hasWindow ? 1 : (CONTENT_SIZE_BYTES[flags >> 6] ?? 0);
  const sizeAt = from + 5 + (hasWindow ? 1 : 0) + (DICTIONARY_ID_BYTES[flags & 3] ?? 0);
  frames.content += contentSize(view, sizeAt, contentSizeBytes);
  frames.at = sizeAt + contentSizeBytes;
  frames.frame = { checksumBytes: flags & 4 };
}

function contentSize(view: DataView, at: number, bytes: number): number {
  if (bytes === 1) return view.getUint8(at);
  if (bytes === 2) return view.getUint16(at, true) + 256;
  if (bytes === 4) return view.getUint32(at, true);
  return bytes === 8 ? Number(view.getBigUint64(at, true)) : 0;
}
