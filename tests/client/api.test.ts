/** How the client retries. The waits are recorded instead of waited for. */
import { expect, test } from "bun:test";
import { gzipSync } from "node:zlib";

import { openApi, UploadFailed } from "../../lib/client/api.ts";
import { startOfSource } from "../../lib/client/chunks.ts";

/** An API whose server gives these answers, one after the other, and the waits between its attempts. */
function openRecorded(answers: Response[], retryMs: number, stop = new AbortController()) {
  const waits: number[] = [];
  const messages: string[] = [];
  const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: () => answers.shift() as Response,
  });
  const api = openApi({
    ...{ serverUrl: `http://127.0.0.1:${server.port}//`, credential: "secret", retryMs },
    ...{ stop: stop.signal, say: (line) => messages.push(line) },
    sleep: async (ms) => void waits.push(ms),
  });
  return { api, waits, messages, [Symbol.asyncDispose]: () => server.stop(true) };
}

const unavailable = (retryAfter?: string) =>
  new Response(null, { status: 503, headers: retryAfter ? { "retry-after": retryAfter } : {} });
const unknown = () => new Response(null, { status: 404 });

test("the client does not retry before the seconds of Retry-After are over", async () => {
  await using recorded = openRecorded([unavailable("7"), unknown()], 60_000);
  expect(await recorded.api.state("a")).toBeNull();
  expect(recorded.waits).toHaveLength(1);
  expect(recorded.waits[0]).toBeWithin(7_000, 8_000);
});

test("pauses double from 50 to 100 ms up to 2.5 to 5 s, and one message says that the client retries", async () => {
  const answers = Array.from({ length: 9 }, () => unavailable());
  await using recorded = openRecorded([...answers, unknown()], 60_000);
  expect(await recorded.api.state("a")).toBeNull();
  const pausesMs = [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000, 5_000];
  expect(recorded.waits).toEqual(pausesMs.map(() => expect.any(Number)));
  for (const [i, pauseMs] of pausesMs.entries())
    expect(recorded.waits[i]).toBeWithin(pauseMs / 2, pauseMs + 1);
  expect(recorded.messages).toEqual([
    expect.stringMatching(/^http:\S+ answered 503: unavailable; retrying for 60 s$/),
  ]);
});

test("the client fails when the next attempt would be later than it may retry", async () => {
  await using recorded = openRecorded([unavailable("60")], 60_000);
  await expect(recorded.api.state("a")).rejects.toThrow(UploadFailed);
  expect(recorded.waits).toEqual([]);
});

test("the last pause is as long as the time that is left", async () => {
  await using recorded = openRecorded([unavailable(), unknown()], 40);
  expect(await recorded.api.state("a")).toBeNull();
  expect(recorded.waits).toHaveLength(1);
  expect(recorded.waits[0]).toBeWithin(0, 40);
});

test("a stopped client makes no further attempt", async () => {
  const stop = new AbortController();
  await using recorded = openRecorded([unavailable(), unknown()], 60_000, stop);
  stop.abort();
  await expect(recorded.api.state("a")).rejects.toThrow(UploadFailed);
  expect(recorded.waits).toEqual([]);
});

/** An endless answer, and how much of it was read. */
function openEndless(headers: Record<string, string>, piece: Uint8Array<ArrayBuffer>) {
  let sentBytes = 0;
  const pull = (controller: ReadableStreamDefaultController) => {
    sentBytes += piece.length;
    controller.enqueue(piece);
  };
  const answer = () => new Response(new ReadableStream({ pull }), { headers });
  return { answer, sentBytes: () => sentBytes };
}

const counts = { accepted: 1, rejected: 0, errors: [], position: "a:1" };
const chunk = {
  bytes: Buffer.from("{}\n"),
  ...{ start: startOfSource(), end: startOfSource(), tooLong: null },
};

test("of an answer that does not end, the client reads a MiB, compressed or not", async () => {
  const bomb = gzipSync(Buffer.alloc(64 * 1024 * 1024));
  for (const [headers, piece] of [
    [{}, new Uint8Array(64 * 1024)],
    [{ "content-encoding": "gzip" }, new Uint8Array(bomb)],
  ] as const) {
    const endless = openEndless(headers, piece);
    await using recorded = openRecorded([endless.answer()], 60_000);
    const sending = recorded.api.send("a", chunk, false);
    await expect(sending).rejects.toThrow("is not a Daybook server");
    expect(endless.sentBytes()).toBeLessThan(32 * 1024 * 1024); // what is on its way is in buffers
  }
});

test("what is not the answer of a Daybook server is not counted", async () => {
  for (const wrong of [
    { ...counts, accepted: "1" },
    { ...counts, rejected: 1e300 },
    { ...counts, errors: [null] },
    { ...counts, errors: [{ line: "1", message: "x" }] },
    { ...counts, errors: [{ line: 1, message: {} }] },
    { ...counts, position: 7 },
  ]) {
    await using recorded = openRecorded([Response.json(wrong)], 60_000);
    const sending = recorded.api.send("a", chunk, false);
    await expect(sending).rejects.toThrow("is not a Daybook server");
  }
  for (const offset of ["-1", "1e3", "NaN", "9".repeat(16)]) {
    const headers = { "upload-offset": offset };
    await using recorded = openRecorded([new Response(null, { headers })], 60_000);
    await expect(recorded.api.state("a")).rejects.toThrow(UploadFailed);
  }
  await using recorded = openRecorded([Response.json(counts)], 60_000);
  expect(await recorded.api.send("a", chunk, false)).toEqual(counts);
});
