/** A load balancer that leads each request to the next server, each with a journal of its own. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { CHUNK_BYTES } from "../../lib/client/chunks.ts";
import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { run, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

/** So long that a chunk is limited by its bytes. */
const USER = "ann".repeat(30);
const LINES = 150_000;
const TEXT = line(USER, 1).repeat(LINES);
const CHUNKS = Math.ceil(TEXT.length / CHUNK_BYTES);

test("a file sent through a round-robin balancer of two servers counts once, with few requests and a true summary", async () => {
  await using ledger = await openLedger();
  await using one = await ledger.start();
  await using two = await ledger.start({ DATA_DIR: ledger.file("other") });
  let requests = 0;
  await using balancer = Bun.serve({
    port: 0,
    async fetch(request) {
      const { url } = requests++ % 2 === 0 ? one : two;
      const { pathname, search } = new URL(request.url);
      const { method, headers } = request;
      const body = method === "PATCH" ? await request.bytes() : null;
      return fetch(url + pathname + search, { method, headers, body });
    },
  });
  const file = ledger.write("a.jsonl", TEXT);
  const env = { SERVER_URL: balancer.url.origin };
  const sent = await run("client.ts", { args: [file], env });
  expect(sent.code).toBe(0);
  // On a slow machine its progress, but no message.
  expect(sent.stderr).toMatch(/^(a\.jsonl: \d+%, .*\n)*$/);
  expect(sent.stdout).toMatch(new RegExp(`sent ${LINES} events .*/s\n$`));
  expect(sent.stdout).toContain(` ${TEXT.length} bytes in `);
  expect(requests).toBeLessThan(2 * CHUNKS + 10);
  await untilBalance(one, USER, `${LINES}`);
  // Whichever server answers first, nothing counts twice.
  for (let i = 0; i < 2; i++) {
    const again = await run("client.ts", { args: [file], env });
    expect(again).toMatchObject({ code: 0, stderr: "" });
    const known = Number(/already there: (\d+) bytes/.exec(again.stdout)?.[1] ?? 0);
    expect(known).toBeLessThanOrEqual(TEXT.length);
  }
  await untilBalance(two, USER, `${LINES}`);
});
