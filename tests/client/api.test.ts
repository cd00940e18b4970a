/** How the client retries. The waits are recorded instead of waited for. */
import { expect, test } from "bun:test";

import { openApi, UploadFailed } from "../../lib/client/api.ts";

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

test("a stopped client makes no further attempt", async () => {
  const stop = new AbortController();
  await using recorded = openRecorded([unavailable(), unknown()], 60_000, stop);
  stop.abort();
  await expect(recorded.api.state("a")).rejects.toThrow(UploadFailed);
  expect(recorded.waits).toEqual([]);
});
