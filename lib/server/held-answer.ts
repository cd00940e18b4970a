/**
 * Answers that hold their memory until they are sent, in a budget of their own. Readers that do not read
 * would fill the memory otherwise: 300 of them took 827 MB. One that reads nothing for half a minute is
 * disconnected.
 */
import { openMemoryBudget } from "./memory.ts";
import { unavailable } from "./problem.ts";
import { atMost, nextTurn } from "./turns.ts";

/** No answer but a stream is larger. */
export const MAX_ANSWER_BYTES = 1024 * 1024 - 4096;
/** Of all answers that are being sent. */
const MAX_ANSWERS_BYTES = 32 * 1024 * 1024;
const PIECE_BYTES = 64 * 1024;
/** Smaller answers are left to the buffers of the connection. */
const MAX_UNHELD_BYTES = 64 * 1024;
const STALLED_MS = 30_000;
const MAX_AT_ONCE_ROWS = 100;
/** Answers read from the database at a time: rows that wait are in no budget. 1,500 of them took 631 MB. */
const MAX_READS = 4;
const MAX_WAIT_MS = 10_000;

export type Answers = ReturnType<typeof openAnswers>;

export function openAnswers({
  budget = openMemoryBudget(MAX_ANSWERS_BYTES),
  maxWaitMs = MAX_WAIT_MS,
} = {}) {
  const reading = atMost(MAX_READS);
  return {
    /** Holds the memory of one answer; `using` releases what no answer has taken over. */
    hold() {
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
          const bytes = Buffer.from(JSON.stringify(document));
          return heldAnswer(bytes, status, () => held[Symbol.dispose]()) as never;
        },
        [Symbol.dispose]: () => reservation?.[Symbol.dispose](),
      };
    },
    /**
     * What a handler of GET returns for the document that `read` reads, also for HEAD, in a turn of its own.
     * Few are read at a time. Throws the 503.
     */
    read<T extends object>({ method }: Request, read: () => Promise<T>): Promise<T> {
      const askedMs = performance.now();
      return reading(async () => {
        if (performance.now() - askedMs > maxWaitMs)
          throw unavailable("too many large answers are being read; retry shortly");
        const document = await read();
        if (method === "HEAD") return document; // nobody would read or end its stream
        await nextTurn();
        const bytes = Buffer.from(JSON.stringify(document));
        if (bytes.length <= MAX_UNHELD_BYTES) return document;
        const reservation = budget.admit();
        try {
          reservation.reserve(bytes.length);
        } catch (error) {
          reservation[Symbol.dispose]();
          throw error;
        }
        return heldAnswer(bytes, 200, () => reservation[Symbol.dispose]()) as never;
      });
    },
  };
}

/** As many of the first `rows` as an answer holds, in a turn of its own. */
export async function fitting<T>(rows: T[]): Promise<T[]> {
  if (rows.length > MAX_AT_ONCE_ROWS) await nextTurn();
  let bytes = 0;
  const beyond = rows.findIndex((row) => {
    bytes += Buffer.byteLength(JSON.stringify(row)) + 1;
    return bytes > MAX_ANSWER_BYTES;
  });
  return beyond < 0 ? rows : rows.slice(0, beyond);
}

/** A JSON response. Calls `sent` once, when it has been handed over, or nobody will read it. */
function heldAnswer(bytes: Uint8Array, status: number, sent: () => void): Response {
  let at = 0;
  let stalled: Timer | undefined;
  const end = () => {
    clearTimeout(stalled);
    sent();
  };
  const body = new ReadableStream<Uint8Array>(
    {
      start(controller) {
        const fail = () => {
          controller.error(new Error("the reader takes nothing"));
          sent();
        };
        stalled = setTimeout(fail, STALLED_MS);
      },
      pull(controller) {
        stalled?.refresh();
        if (at < bytes.length) return controller.enqueue(bytes.subarray(at, (at += PIECE_BYTES)));
        controller.close();
        end();
      },
      cancel: end,
    },
    { highWaterMark: 0 },
  );
  return new Response(body, { status, headers: { "content-type": "application/json" } });
}
