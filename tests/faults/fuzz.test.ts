/**
 * Invalid input of every kind: requests, journals and files generated from a grammar, then mutated. None of
 * it may end the program, hang it, cause a 500, or damage what was valid.
 *
 * FAULT_CASES=N tries N seeds, beginning with FAULT_SEED_FIRST; FAULT_SEED=N tries only that one.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { connect } from "node:net";
import { gzipSync, zstdCompressSync } from "node:zlib";

import { checkJournal } from "../../lib/journal/check.ts";
import { encodeJournalHeader, JournalDamage } from "../../lib/journal/format.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openJournalReader } from "../../lib/journal/reader.ts";
import { event, line } from "../support/events.ts";
import { frame } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { SECRET, type startApp, untilBalance } from "../support/programs.ts";
import { randomOf } from "../support/random.ts";
import { count } from "./figures.ts";
import { HARMLESS, SimulatedDisk } from "./simulated-disk.ts";

const { FAULT_SEED, FAULT_SEED_FIRST, FAULT_CASES = FAULT_SEED ? "10" : "5000" } = process.env;
const CASES = Number(FAULT_CASES);
const FIRST = Number(FAULT_SEED ?? FAULT_SEED_FIRST ?? Math.floor(Math.random() * 2 ** 30));
setDefaultTimeout(60_000 + CASES * 20);

type Random = () => number;
const one = <T>(random: Random, of: readonly T[]): T => of[Math.floor(random() * of.length)] as T;

const TEXTS = [
  ...["", "user1", "__proto__", "constructor", "\\u0000", "\\ud800", "ü", "😀", "a\\nb", " "],
  ...["%00", "../..", "null", "x".repeat(300), '\\"', "é".repeat(200)],
];
const VALUES = [
  ...["0", "-0", "98", "1.5e3", "1e999", "0.1", "1e-9", "1e-10", "999999999999999", "1e15", "null"],
  ...['"98"', "true", "[]", "{}", "01", "1.", ".5", "NaN", "12345678901234567.89", "-1E+2", ""],
];

/** An event, or almost one. */
function eventOf(random: Random): string {
  const field = () =>
    one(random, [
      () => `"userId":"${one(random, TEXTS)}"`,
      () => `"name":"${one(random, ["add_revenue", "subtract_revenue", "refund", "", "ADD"])}"`,
      () => `"value":${one(random, VALUES)}`,
      () => `"id":${one(random, ['"a"', '""', "7", "null", `"${"i".repeat(140)}"`])}`,
      () => `"${one(random, TEXTS)}":${one(random, VALUES)}`,
    ])();
  const good = [`"userId":"fuzz${Math.floor(random() * 9)}"`, '"name":"add_revenue"', '"value":1'];
  const fields = random() < 0.5 ? good : [];
  while (random() < 0.6) fields.push(field());
  if (random() < 0.02) fields.push(`"deep":${"[".repeat(3_000)}${"]".repeat(3_000)}`);
  return `{${fields.join(one(random, [",", ", ", ",\n", ""]))}}`;
}

/** The same bytes with some of them inserted, removed, repeated or cut off. */
function mutated(bytes: Buffer, random: Random): Buffer {
  let changed = bytes;
  for (let times = Math.floor(random() * 4); times > 0 && changed.length > 0; times--) {
    const at = Math.floor(random() * changed.length);
    const to = Math.min(changed.length, at + Math.floor(random() ** 3 * 40));
    const head = changed.subarray(0, at);
    const middle = changed.subarray(at, to);
    const tail = changed.subarray(to);
    const junk = Buffer.from(Array.from({ length: 1 + random() * 5 }, () => random() * 256));
    changed = Buffer.concat(
      one(random, [
        () => [head, junk, tail],
        () => [head, tail],
        () => [head, middle, middle, tail],
        () => [head],
        () => [tail, head],
        () => [head, Buffer.from(one(random, ["\n", "\r\n", "\0", "\ufeff", "{", "\u2028"])), tail],
      ])(),
    );
  }
  return changed;
}

function bodyOf(random: Random): Buffer {
  const lines = Array.from({ length: 1 + random() ** 3 * 30 }, () => eventOf(random));
  return mutated(Buffer.from(lines.join("\n") + one(random, ["", "\n", "\r\n"])), random);
}

function requestOf(url: string, random: Random): Request {
  let body = bodyOf(random);
  const headers = new Headers();
  const put = (odds: number, name: string, values: readonly string[]) => {
    if (random() < odds) headers.set(name, one(random, values));
  };
  headers.set("authorization", random() < 0.9 ? SECRET : one(random, ["", "Bearer", "Bearer x"]));
  put(0.9, "content-type", [
    "application/json",
    "application/x-ndjson",
    "text/plain",
    "a/b; c",
    "",
  ]);
  const coding = one(random, ["", "", "", "gzip", "zstd", "br", "gzip, zstd"]);
  if (coding) headers.set("content-encoding", coding);
  if (coding === "gzip") body = mutated(gzipSync(body), () => random() ** 4);
  if (coding === "zstd") body = mutated(zstdCompressSync(body), () => random() ** 4);
  put(0.4, "idempotency-key", ["a", "", "x".repeat(200), "é", "a,b"]);
  put(0.4, "upload-offset", ["0", "0", "-1", "1e3", "", "99999999999999999999", "7"]);
  put(0.4, "source-digest", ["0".repeat(64), "", "sha-256=:abc=:", "F".repeat(64), "0".repeat(63)]);
  put(0.1, "accept", ["*/*", "text/html", ""]);
  const name = encodeURIComponent(one(random, ["a.jsonl", "ü", "x".repeat(400), "%", "a/b"]));
  const path = one(random, [
    ...["/liveEvent", "/liveEvents", "/liveEvents?errors=3", "/liveEvents?errors=-1", "/", "//"],
    ...["/liveEvents?errors=x", `/sources/${name}`, `/sources/${name}?errors=1e9`, "/sources/%ff"],
    ...[`/userEvents/${name}`, "/userEvents/%00", "/userEvents/", "/userEvents/a?after=x:1"],
    ...[`/userEvents/a?after=${crypto.randomUUID()}:-1`, "/healthz", "/readyz", "/openapi/json"],
    ...["/metrics", "/openapi", "/nothing", "/liveEvent/", "/LiveEvent", "/__proto__"],
  ]);
  const method = one(random, [
    "POST",
    "POST",
    "POST",
    "PATCH",
    "PATCH",
    "GET",
    "HEAD",
    "DELETE",
    "PUT",
  ]);
  const hasBody = method !== "GET" && method !== "HEAD";
  return new Request(url + path, {
    method,
    headers,
    body: hasBody ? new Uint8Array(body) : null,
    signal: AbortSignal.timeout(30_000),
  });
}

/** The server's resident memory, in MB. */
async function memoryMb(pid: number): Promise<number> {
  const status = await Bun.file(`/proc/${pid}/status`)
    .text()
    .catch(() => "");
  return Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1024;
}

test(
  "no request ends the server, hangs it, or is answered with 500",
  async () => {
    await using ledger = await openLedger();
    await using server = await ledger.start();
    const cases = Math.floor(CASES * 0.6);
    let next = FIRST;
    let earlyMb = 0;
    const lane = async () => {
      while (next < FIRST + cases) {
        const seed = next++;
        const response = await fetch(requestOf(server.url, randomOf(seed))).catch((error) => {
          throw new Error(`FAULT_SEED=${seed}: ${error}`);
        });
        const text = await response.text();
        const answer = `FAULT_SEED=${seed}: ${response.status} ${text.slice(0, 300)}`;
        if (response.status >= 500 && response.status !== 503) throw new Error(answer);
        if (response.status >= 400 && text !== "") {
          expect(response.headers.get("content-type"), answer).toBe("application/problem+json");
          expect(JSON.parse(text).status, answer).toBe(response.status);
        }
        if (seed === FIRST + Math.floor(cases / 10)) earlyMb = await memoryMb(server.pid);
      }
    };
    await Promise.all(Array.from({ length: 16 }, lane));
    count("fuzz cases", cases);
    if (CASES >= 50_000) expect(await memoryMb(server.pid)).toBeLessThan(earlyMb + 150);
    await expectAlive(server);
  },
  60_000 + CASES * 20,
);

test("no bytes on the socket end the server", async () => {
  await using ledger = await openLedger();
  await using server = await ledger.start();
  const { port } = new URL(server.url);
  const cases = Math.floor(CASES * 0.1);
  let next = FIRST;
  const lane = async () => {
    while (next < FIRST + cases) {
      const random = randomOf(next++);
      const body = bodyOf(random);
      const length = one(random, [`${body.length}`, "0", "-1", "x", `${body.length + 5}`, "1e9"]);
      const framing = one(random, [
        `Content-Length: ${length}`,
        "Transfer-Encoding: chunked",
        "X: y",
      ]);
      const head = `POST /liveEvents HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: ${SECRET}\r\nContent-Type: application/x-ndjson\r\n${framing}\r\n\r\n`;
      await sendBytes(Number(port), mutated(Buffer.concat([Buffer.from(head), body]), random));
    }
  };
  await Promise.all(Array.from({ length: 16 }, lane));
  count("fuzz cases", cases);
  await expectAlive(server);
});

/** Sends bytes, waits up to 30 ms for an answer, and closes the connection. */
function sendBytes(port: number, bytes: Buffer): Promise<void> {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1", () => socket.write(bytes));
    const done = () => {
      clearTimeout(timer);
      socket.destroy();
      resolve();
    };
    const timer = setTimeout(done, 30);
    socket.on("error", done).on("close", done).on("data", done);
  });
}

async function expectAlive(server: Awaited<ReturnType<typeof startApp>>) {
  expect(server.child.exitCode).toBeNull();
  expect(server.stderr.text()).not.toContain("fault:");
  expect((await server.post(event("alive"))).status).toBe(201);
  await untilBalance(server, "alive", "1", 30_000);
}

test("a mutated journal yields its own frames or is reported as damaged", async () => {
  const cases = Math.floor(CASES * 0.3);
  for (let seed = FIRST; seed < FIRST + cases; seed++) {
    await mutateJournal(seed).catch((error) => {
      throw new Error(`FAULT_SEED=${seed}: ${error}`, { cause: error });
    });
  }
  count("fuzz cases", cases);
});

async function mutateJournal(seed: number) {
  const random = randomOf(seed);
  const payloads = Array.from({ length: 1 + random() * 6 }, (_, i) => `line ${seed} ${i}\n`);
  const parts = [encodeJournalHeader("3f5bd0c6-5cf3-4f0e-9a0c-0a6d7f6a2b11", 0)];
  for (const [i, text] of payloads.entries()) parts.push(frame(text, 1_700_000_000_000 + i));
  const disk = new SimulatedDisk(random, HARMLESS);
  const mounted = disk.mount();
  await mounted.openForAppend("data/eventsPost.jsonl");
  disk.change("data/eventsPost.jsonl", () => mutated(Buffer.concat(parts), random));
  const good = new Set(payloads);
  const reading = async () => {
    const reader = await openJournalReader("data/eventsPost.jsonl", mounted);
    for (let position = reader?.start ?? 0; reader;) {
      const frames = await reader.read(position);
      if (frames.length === 0) break;
      for (const { payload, to } of frames) {
        if (!good.has(payload.toString())) throw new Error(`never written: ${payload}`);
        position = to;
      }
    }
  };
  const orDamage = (error: unknown) => {
    if (!(error instanceof JournalDamage)) throw error;
    return null;
  };
  await reading().catch(orDamage);
  await checkJournal("data/eventsPost.jsonl", mounted);
  const journal = await openJournal({ directory: "data", disk: mounted }).catch(orDamage);
  if (!journal) return;
  good.add("new\n");
  await journal.append(Buffer.from("new\n"));
  await journal.close();
  await reading();
}

test("the valid lines of a mutated file are posted, and the others are quarantined", async () => {
  await using ledger = await openLedger();
  const random = randomOf(FIRST);
  const parts: Buffer[] = [];
  for (let i = 0; i < CASES / 5; i++) {
    parts.push(mutated(Buffer.from(eventOf(random)), random), Buffer.from("\n"));
    parts.push(Buffer.from(line("good")));
  }
  const { code, stderr } = await ledger.tool([ledger.write("a.jsonl", Buffer.concat(parts))]);
  expect(code, `FAULT_SEED=${FIRST}: ${stderr}`).toBe(1);
  expect(await ledger.balances()).toMatchObject({ good: `${Math.ceil(CASES / 5)}` });
  count("fuzz cases", Math.ceil(CASES / 5));
});
