/**
 * An answer that holds its memory until it is sent. Senders that do not read would fill the memory
 * otherwise: 300 of them took 827 MB. A sender that reads nothing is disconnected after the idle limit.
 */
import type { openMemoryBudget } from "./memory.ts";

const PIECE_BYTES = 64 * 1024;
/** Smaller answers are left to the buffers of the connection. */
const MAX_UNHELD_BYTES = 64 * 1024;

/** Holds the memory of one answer; `using` releases what no answer has taken over. */
export function holdAnswer(budget: ReturnType<typeof openMemoryBudget>) {
  let reservation: Disposable | null = null;
  return {
    /** Call it before anything is stored. Throws the 503 when the budget is used up. */
    reserve(bytes: number): void {
      if (bytes <= MAX_UNHELD_BYTES) return;
      const admitted = budget.admit();
      reservation = admitted;
      admitted.reserve(bytes);
    },
    /** What a handler returns. As `T`, it does not change what typed clients expect. */
    answer<T extends object>(document: T, status: number): T {
      const held = reservation;
      reservation = null;
      if (!held) return document;
      return heldAnswer(document, status, () => held[Symbol.dispose]()) as never;
    },
    [Symbol.dispose]: () => reservation?.[Symbol.dispose](),
  };
}

/** `document` as a JSON response. Calls `sent` once, when it has been handed over, or nobody will read it. */
function heldAnswer(document: object, status: number, sent: () => void): Response {
  const bytes = Buffer.from(JSON.stringify(document));
  let at = 0;
  const body = new ReadableStream<Uint8Array>(
    {
      pull(controller) {
        if (at < bytes.length) return controller.enqueue(bytes.subarray(at, (at += PIECE_BYTES)));
        controller.close();
        sent();
      },
      cancel: sent,
    },
    { highWaterMark: 0 },
  );
  return new Response(body, { status, headers: { "content-type": "application/json" } });
}
