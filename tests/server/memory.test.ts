/**
 * Overload: slow senders, large bodies, many at once. The server rejects what it has no room for, keeps
 * what it has acknowledged, keeps answering other requests, and its memory stays flat.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { connect, type Socket } from "node:net";

import { SECRET, startApp, tempDir, until } from "../support/programs.ts";
import { IS_LONG } from "../support/random.ts";

const KIB = 1024;
const MIB = 1024 * KIB;
/** The limit of the peak memory. Linux only. */
const MAX_BYTES = 300 * MIB;
const SLOW_SENDERS = 200;
/** A quarter more than that limit. */
const BODIES = 24;
const NOWHERE = "postgres://nobody@127.0.0.1:1/nothing";

type App = Awaited<ReturnType<typeof startApp>>;

setDefaultTimeout(90_000);

/** All tests share one server: its memory must stay flat across them. */
const dir = tempDir();
let app: App;

beforeAll(async () => {
  const args = ["--no-processor"];
  app = await startApp({ dataDir: dir.path, databaseUrl: NOWHERE, args });
});

afterAll(async () => {
  await app?.[Symbol.asyncDispose]();
  dir[Symbol.dispose]();
});

test(`while ${SLOW_SENDERS} senders are slow, other requests are answered, and in the end the slow ones too`, async () => {
  const event = line("slow", 100);
  const slow = await Promise.all(
    Array.from({ length: SLOW_SENDERS }, (_, i) => openSender(app, event.length, i % 2 === 0)),
  );
  let at = 0;
  for (; at < event.length - 1; at++) {
    for (const sender of slow) sender.send(event.slice(at, at + 1));
    const answers = await Promise.all([
      app.post(line("fast", 1)),
      app.postLines(line("fast", 1).repeat(100)),
      fetch(`${app.url}/healthz`),
    ]);
    expect(answers.map(({ status }) => status)).toEqual([201, 201, 200]);
  }
  expect(slow.map(({ text }) => text())).toEqual(slow.map(() => ""));
  for (const sender of slow) sender.send(event.slice(at));
  await until(() => slow.every(({ text }) => text().startsWith("HTTP/1.1 201 ")));
  expect(users("slow", "fast")).toEqual({ slow: SLOW_SENDERS, fast: 101 * at });
  expect(peakBytes(app)).toBeLessThan(MAX_BYTES);
  for (const sender of slow) sender[Symbol.dispose]();
});

test(`${BODIES} bodies of 16 MiB at once are each stored whole or answered 503, in bounded memory`, async () => {
  // Long lines mean many bytes, short lines much work.
  const fillers = [900, 0].map((noteBytes) =>
    Buffer.from(line("filler", noteBytes).repeat((16 * MIB) / (100 + noteBytes))),
  );
  const fillerOf = (i: number) => fillers[i % 2] as Buffer;
  const answers = await Promise.all(
    Array.from({ length: BODIES }, (_, i) => {
      const parts = [Buffer.from(line(`first${i}`)), fillerOf(i), Buffer.from(line(`last${i}`))];
      // Every third is sent without a Content-Length.
      return app.postLines(i % 3 === 0 ? (streamed(parts) as never) : joined(parts));
    }),
  );
  const taken = await sort(answers);
  expect(taken.length).toBeGreaterThan(0);
  const ends = taken.flatMap((i) => [`first${i}`, `last${i}`]);
  const { filler: found, ...others } = users("first", "filler", "last");
  expect(others).toEqual(Object.fromEntries(ends.map((user) => [user, 1])));
  const counts = fillers.map((filler) => countUsers(filler, "filler")["filler"] as number);
  expect(found).toBe(taken.reduce((sum, i) => sum + (counts[i % 2] as number), 0));
  // Afterwards there is room again.
  await until(async () => (await app.postLines(joined([fillerOf(0)]))).status === 201);
  expect(peakBytes(app)).toBeLessThan(MAX_BYTES);
});

test("2,000 bodies of 60 KiB as fast as possible are each stored or answered 503, in bounded memory", async () => {
  const answers: Response[] = [];
  let next = 0;
  const sender = async () => {
    while (next < 2_000) {
      const i = next++;
      answers[i] = await app.post(line(`user${i}`, 60 * KIB));
    }
  };
  await Promise.all(Array.from({ length: 250 }, sender));
  const taken = await sort(answers);
  expect(taken.length).toBeGreaterThan(0);
  expect(users("user")).toEqual(Object.fromEntries(taken.map((i) => [`user${i}`, 1])));
  expect(peakBytes(app)).toBeLessThan(MAX_BYTES);
});

test("senders that announce bodies and send nothing hold no room for them", async () => {
  const senders = await Promise.all(
    Array.from({ length: 900 }, () => openSender(app, 65_000, false)),
  );
  expect((await app.post(line("announced", 60 * KIB))).status).toBe(201);
  for (const sender of senders) sender[Symbol.dispose]();
});

test("a body of 16 MB in chunks of one byte is rejected in bounded memory, one in chunks of 32 is stored", async () => {
  // A server of its own: the peak of the other one is that of all tests.
  using folder = tempDir();
  await using app = await startApp({
    ...{ dataDir: folder.path, databaseUrl: NOWHERE },
    args: ["--no-processor"],
  });
  /** Empty where the connection was closed while the sender still wrote, so that the answer is lost. */
  const statusOf = async (chunk: string, repeats: number) => {
    using sender = await openSender(app, 16_000_000, true);
    const isAnswered = () => sender.text() !== "" || sender.isClosed();
    for (let i = 0; i < 320 && !isAnswered(); i++) await sender.write(chunk.repeat(repeats));
    if (!isAnswered()) await sender.write("0\r\n\r\n");
    await until(isAnswered);
    return sender.text().slice(9, 12);
  };
  expect(["", "413"]).toContain(await statusOf("1\r\n\n\r\n", 50_000));
  expect(await statusOf(`20\r\n${"\n".repeat(32)}\r\n`, 1_562)).toBe("201");
  expect(peakBytes(app)).toBeLessThan(200 * MIB);
});

test("the memory budget of senders that disconnect is released", async () => {
  const piece = "\n".repeat(2 * MIB);
  for (let round = 0; round < (IS_LONG ? 3 : 2); round++) {
    const senders = await Promise.all(
      Array.from({ length: 40 }, (_, i) => openSender(app, 15 * MIB, i % 2 === 0)),
    );
    for (const sender of senders) sender.send(piece);
    const refused = await until(async () => {
      const response = await app.postLines(joined([Buffer.from(piece)]));
      if (response.status !== 201) return response;
      // Of senders that hit the limit together, more may have been refused than had to be.
      const another = await openSender(app, 15 * MIB, false);
      another.send(piece);
      senders.push(another);
      return null;
    });
    expect(refused.status).toBe(503);
    expect(Number(refused.headers.get("retry-after"))).toBeGreaterThan(0);
    expect((await fetch(`${app.url}/healthz`)).status).toBe(200);
    for (const sender of senders) sender[Symbol.dispose]();
    const whole = Buffer.from(line("whole", 900).repeat((16 * MIB) / 1_000));
    await until(async () => (await app.postLines(joined([whole]))).status === 201);
  }
  expect(peakBytes(app)).toBeLessThan(MAX_BYTES);
});

// Helpers

/** The users in the journal whose names have this prefix, and how many events each has. */
function users(...beginnings: string[]): Record<string, number> {
  // If more large bodies are accepted than one file holds, there are two.
  const files = readdirSync(dir.path).filter((name) => /^eventsPost.*\.jsonl$/.test(name));
  const lines = Buffer.concat(files.map((name) => readFileSync(dir.file(name))));
  return Object.assign({}, ...beginnings.map((beginning) => countUsers(lines, beginning)));
}

function line(user: string, noteBytes = 0): string {
  const note = noteBytes > 0 ? `,"note":"${"n".repeat(noteBytes)}"` : "";
  return `{"userId":"${user}","name":"add_revenue","value":1${note}}\n`;
}

function joined(parts: Buffer[]): Uint8Array<ArrayBuffer> {
  return new Uint8Array(Buffer.concat(parts));
}

/** The body in pieces, without a Content-Length. */
function streamed(parts: Buffer[]): ReadableStream {
  const pieces = parts.flatMap((part) =>
    Array.from({ length: Math.ceil(part.length / (256 * KIB)) }, (_, i) =>
      part.subarray(i * 256 * KIB, (i + 1) * 256 * KIB),
    ),
  );
  return new ReadableStream({
    pull(controller) {
      const piece = pieces.shift();
      if (piece) controller.enqueue(piece);
      else controller.close();
    },
  });
}

/** A separate connection that has sent the head of a request, and sends its body on demand. */
async function openSender(app: App, bodyBytes: number, chunked: boolean) {
  const { hostname, port } = new URL(app.url);
  const socket = await new Promise<Socket>((resolve, reject) => {
    const opened = connect(Number(port), hostname, () => resolve(opened));
    opened.on("error", reject);
  });
  let text = "";
  socket.on("data", (bytes) => (text += bytes));
  socket.write(
    `POST /liveEvents HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: ${SECRET}\r\n` +
      "content-type: application/x-ndjson\r\n" +
      (chunked ? "transfer-encoding: chunked\r\n\r\n" : `content-length: ${bodyBytes}\r\n\r\n`),
  );
  let left = bodyBytes;
  return {
    text: () => text,
    isClosed: () => socket.destroyed,
    /** Sends bytes as they are, and returns once they are on their way. */
    write: (bytes: string) => new Promise<void>((resolve) => socket.write(bytes, () => resolve())),
    send(piece: string) {
      left -= piece.length;
      if (!chunked) return socket.write(piece);
      const end = left === 0 ? "0\r\n\r\n" : "";
      return socket.write(`${piece.length.toString(16)}\r\n${piece}\r\n${end}`);
    },
    [Symbol.dispose]: () => void socket.destroy(),
  };
}

/** The indexes of the answers 201; every other one must be a 429 or 503 with Retry-After. */
async function sort(answers: Response[]): Promise<number[]> {
  const accepted: number[] = [];
  for (const [i, response] of answers.entries()) {
    await response.bytes();
    expect([201, 429, 503]).toContain(response.status);
    if (response.status === 201) accepted.push(i);
    else expect(Number(response.headers.get("retry-after"))).toBeGreaterThan(0);
  }
  return accepted;
}

function countUsers(lines: Buffer, beginning: string): Record<string, number> {
  const counts: Record<string, number> = {};
  const field = '{"userId":"';
  // Skips what other tests have sent without parsing each line.
  const begin = Buffer.from(field + beginning);
  for (let at = lines.indexOf(begin); at >= 0; at = lines.indexOf(begin, at)) {
    at += field.length;
    const user = lines.toString("latin1", at, lines.indexOf('"', at));
    counts[user] = (counts[user] ?? 0) + 1;
  }
  return counts;
}

/** The peak memory of the process; 0 where the system does not report it. */
function peakBytes(app: App): number {
  if (process.platform !== "linux") return 0;
  const status = readFileSync(`/proc/${app.pid}/status`, "utf8");
  const bytes = Number(/VmHWM:\s+(\d+) kB/.exec(status)?.[1]) * KIB;
  if (process.env["PEAK"]) console.log(Math.round(bytes / MIB), "MiB");
  return bytes;
}
