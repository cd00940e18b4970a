/**
 * Sources over HTTP: each byte counts once, whichever client sends it, whichever server receives it, and
 * whatever dies in between. Each event has its own user and its number as value, so every single one can
 * be checked: a lost event is missing, one counted twice has twice its value.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { connect } from "node:net";
import { gzipSync, zstdCompressSync } from "node:zlib";

import { Fold } from "../../lib/processor/fold.ts";
import { type Disk, disk } from "../../lib/journal/disk.ts";
import { parseFrames, parseJournalHeader } from "../../lib/journal/format.ts";
import { encodeSourceMark } from "../../lib/journal/source-mark.ts";
import { openJournal } from "../../lib/journal/writer.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { openSources } from "../../lib/server/sources.ts";
import { line } from "../support/events.ts";
import { balances, connectTest, testDatabase } from "../support/postgres.ts";
import { run, SECRET, spawn, startApp, tempDir, until, untilBalance } from "../support/programs.ts";
import { seeded } from "../support/random.ts";

type Bytes = Uint8Array<ArrayBuffer>;
type Random = () => number;

const NOWHERE = "postgres://nobody@127.0.0.1:1/nothing";
const ALONE = ["--no-processor"];
const NOTHING = sha256(bytesOf(""));

setDefaultTimeout(20_000);

const dir = tempDir();
let database: Awaited<ReturnType<typeof testDatabase>>;
let app: Awaited<ReturnType<typeof startApp>>;

beforeAll(async () => {
  database = await testDatabase();
  app = await startApp({ dataDir: dir.path, databaseUrl: database.url });
});

afterAll(async () => {
  await app?.[Symbol.asyncDispose]();
  await database?.drop();
  dir[Symbol.dispose]();
});

// One source, one server

test("an unknown source is answered 404", async () => {
  expect((await look(newName())).status).toBe(404);
});

test("a name that is not UTF-8, or holds what stands for that, is refused", async () => {
  for (const [name, status] of [
    ["%ff", 422],
    ["%ef%bf%bd", 422],
    ["%00", 422],
  ] as const) {
    const headers = { ...headersOf(0, lines(1, 1)) };
    const init = { method: "PATCH", headers, body: lines(1, 1) };
    expect((await fetch(`${app.url}/sources/${name}`, init)).status).toBe(status);
  }
});

test("HEAD answers how much is stored, and the digest that the sender gave", async () => {
  const name = newName();
  const bytes = lines(1, 3);
  await take(name, bytes);
  const { status, headers, text } = await look(name);
  expect([status, text]).toEqual([204, ""]);
  expect(headers.get("upload-offset")).toBe(`${bytes.length}`);
  expect(headers.get("source-digest")).toBe(sha256(bytes));
});

test("successive bytes are stored, and each event counts once", async () => {
  const name = newName();
  const [user, other] = [newName(), newName()];
  const bytes = bytesOf(line(user, 1), line(other, 2), line(user, 3));
  const cut = line(user, 1).length;
  const first = await patch(name, 0, bytes, cut);
  expect(first.headers.get("upload-offset")).toBe(`${cut}`);
  expect(first.answer).toEqual({ accepted: 1, rejected: 0, errors: [], position: POSITION });
  const rest = await patch(name, cut, bytes);
  expect(rest.headers.get("upload-offset")).toBe(`${bytes.length}`);
  expect(await stands(name)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
  expect(await balanceAfter(user, rest.answer.position)).toBe("4");
  expect(await balanceAfter(other, rest.answer.position)).toBe("2");
});

test("another offset is answered 409 with the true one, and nothing is stored", async () => {
  const name = newName();
  const bytes = lines(1, 4);
  expect(await refused(name, 5, bytes, 409)).toMatchObject({ offset: "0", digest: NOTHING });
  await take(name, bytes);
  const before = journalSize();
  for (const from of [0, 1, bytes.length - 1, bytes.length + 1, 999_999_999_999_999]) {
    const { offset, digest } = await refused(name, from, bytes, 409);
    expect([offset, digest]).toEqual([`${bytes.length}`, sha256(bytes)]);
  }
  expect(journalSize()).toBe(before);
});

test("a sender that got 409 can continue at the offset in the answer", async () => {
  const name = newName();
  const bytes = lines(1, 6);
  await patch(name, 0, bytes, lines(1, 2).length);
  const { offset } = await refused(name, 0, bytes, 409);
  expect((await patch(name, Number(offset), bytes)).answer).toMatchObject({ accepted: 4 });
});

for (const [what, header, value] of [
  ["no Upload-Offset", "upload-offset", null],
  ["an empty Upload-Offset", "upload-offset", ""],
  ["a negative Upload-Offset", "upload-offset", "-1"],
  ["half a byte", "upload-offset", "1.5"],
  ["an Upload-Offset in hexadecimal", "upload-offset", "0x10"],
  ["an Upload-Offset of 16 digits", "upload-offset", "1234567890123456"],
  ["no Source-Digest", "source-digest", null],
  ["a short Source-Digest", "source-digest", "ab".repeat(31)],
  ["a long Source-Digest", "source-digest", "ab".repeat(33)],
  ["a Source-Digest in base64", "source-digest", `${"x".repeat(63)}=`],
] as const)
  test(`${what} is answered 422, which names the header`, async () => {
    const name = newName();
    const headers = new Headers(headersOf(0, lines(1, 1)));
    headers.delete(header);
    if (value !== null) headers.set(header, value);
    const response = await send(name, { method: "PATCH", headers, body: lines(1, 1) });
    const { errors } = await problem(response, 422);
    expect(errors.map(({ path }) => path.toLowerCase())).toEqual([header]);
    expect((await look(name)).status).toBe(404);
  });

test("of a body whose rejected lines no answer can list, nothing is stored but for a part that is named", async () => {
  const name = newName();
  const bytes = bytesOf(line("before"), '{"id":0}\n'.repeat(20_000), line("after"));
  const listing = (from: number, to: number) =>
    fetch(`${app.url}/sources/${name}?errors=20000`, {
      method: "PATCH",
      headers: headersOf(from, bytes, to),
      body: bytes.subarray(from, to),
    });
  const errors: number[] = [];
  let requests = 0;
  for (let from = 0; from < bytes.length; requests++) {
    const whole = await listing(from, bytes.length);
    const text = await whole.text();
    expect(text.length).toBeLessThan(1024 * 1024);
    const fits = whole.status === 413 ? (JSON.parse(text) as { bytes: number }).bytes : null;
    const to = fits === null ? bytes.length : from + fits;
    const stored = fits === null ? whole : await listing(from, to);
    const answer = JSON.parse(fits === null ? text : await stored.text()) as Answer;
    expect(stored.status).toBe(200);
    expect(stored.headers.get("upload-offset")).toBe(`${to}`);
    expect(answer.errors.length).toBe(answer.rejected);
    errors.push(answer.rejected);
    // Sent again, its answer is the 409 with the same list.
    const again = await listing(from, to);
    expect(again.status).toBe(409);
    const { lines } = (await again.json()) as { lines: Answer };
    expect(lines.errors).toEqual(answer.errors);
    from = to;
  }
  expect(requests).toBeGreaterThan(1);
  expect(errors.reduce((sum, count) => sum + count)).toBe(20_000);
  // Asked for fewer of them, it is stored whole.
  const { answer } = await patch(newName(), 0, bytes);
  expect(answer).toMatchObject({ accepted: 2, rejected: 20_000 });
  expect(answer.errors.length).toBe(100);
});

test("a Source-Digest may be in upper case", async () => {
  const name = newName();
  const bytes = lines(1, 1);
  const digest = sha256(bytes);
  await patch(name, 0, bytes, bytes.length, { "source-digest": digest.toUpperCase() });
  expect(await stands(name)).toEqual({ offset: bytes.length, digest });
});

// The digest

const WRONG = "0".repeat(64);

for (const [what, compress, more] of [
  ["as it is", (bytes: Bytes) => bytes, {}],
  ["in gzip", gzipSync, { "content-encoding": "gzip" }],
] as const)
  test(`a first piece ${what} whose digest is wrong is answered 422, and its real file can be sent`, async () => {
    const [name, user] = [newName(), newName()];
    const bytes = bytesOf(line(user, 1), "bad\n", line(user, 2));
    const before = journalSize();
    const almost = sha256(bytes).replace(/^./, (digit) => (digit === "0" ? "1" : "0"));
    for (const digest of [WRONG, almost, NOTHING]) {
      const headers = { ...headersOf(0, bytes), ...more, "source-digest": digest };
      const body = compress(bytes) as Bytes;
      const { errors } = await problem(await send(name, { method: "PATCH", headers, body }), 422);
      expect(errors.map(({ path }) => path)).toEqual(["Source-Digest"]);
    }
    expect(journalSize()).toBe(before);
    expect((await look(name)).status).toBe(404);
    const { answer } = await patch(name, 0, bytes);
    expect(answer).toMatchObject({ accepted: 2, rejected: 1 });
    expect(await balanceAfter(user, answer.position)).toBe("3");
  });

test("a further piece whose digest is wrong is answered 409 with the state of the source", async () => {
  const name = newName();
  const bytes = bytesOf(lines(1, 2), "bad\n", lines(3, 6));
  const cuts = [lines(1, 2).length, lines(1, 3).length + 4, bytes.length];
  await patch(name, 0, bytes, cuts[0]);
  for (const [i, cut] of cuts.slice(1).entries()) {
    const from = cuts[i] as number;
    const before = journalSize();
    for (const digest of [
      WRONG,
      sha256(bytes.subarray(from, cut)),
      sha256(bytes.subarray(0, from)),
    ]) {
      const response = await request(name, from, bytes, cut, { "source-digest": digest });
      await problem(response, 409);
      expect(response.headers.get("upload-offset")).toBe(`${from}`);
      expect(response.headers.get("source-digest")).toBe(sha256(bytes.subarray(0, from)));
    }
    expect(journalSize()).toBe(before);
    await patch(name, from, bytes, cut);
  }
  expect(await stands(name)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
});

test("another file of the same name and length is not continued by its rest", async () => {
  const name = newName();
  const [bytes, other] = [lines(1, 4), lines(5, 8)];
  const cut = lines(1, 2).length;
  await patch(name, 0, bytes, cut);
  await problem(await request(name, cut, other), 409);
  await patch(name, cut, bytes);
});

test("pieces that arrive at once are checked as well", async () => {
  const name = newName();
  const bytes = lines(1, 40);
  const cuts = Array.from({ length: 21 }, (_, i) => Math.floor((i * bytes.length) / 20));
  for (let done = 0; done < 20;) {
    const sent = cuts.slice(done, -1).map((from, i) => {
      const wrong = i % 2 === 0 ? { "source-digest": WRONG } : {};
      return [
        request(name, from, bytes, cuts[done + i + 1], wrong),
        request(name, from, bytes, cuts[done + i + 1]),
      ];
    });
    const statuses = (await Promise.all(sent.flat())).map(({ status }) => status);
    expect(statuses.every((status) => [200, 409, 422].includes(status))).toBe(true);
    expect(statuses).toContain(200);
    const { offset, digest } = await stands(name);
    expect(digest).toBe(sha256(bytes.subarray(0, offset)));
    done = cuts.indexOf(offset);
  }
});

test("an empty piece cannot change the digest, nor after a restart", async () => {
  using folder = tempDir();
  const name = newName();
  const bytes = lines(1, 3);
  const open = () => startApp({ dataDir: folder.path, databaseUrl: database.url, args: ALONE });
  const rejects = async (server: App) => {
    const wrong = { "source-digest": WRONG };
    await problem(await request(name, bytes.length, bytes, bytes.length, wrong, server), 409);
    await patch(name, bytes.length, bytes, bytes.length, {}, server);
    expect(await stands(name, server)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
  };
  {
    await using server = await open();
    await problem(await request(name, 0, bytes, 0, { "source-digest": WRONG }, server), 422);
    await patch(name, 0, bytes, bytes.length, {}, server);
    await rejects(server);
  }
  await using server = await open();
  await rejects(server);
});

test("after a restart the sender's digest stands: the digest of the stored bytes cannot be continued", async () => {
  using folder = tempDir();
  const name = newName();
  const bytes = lines(1, 3);
  const cut = lines(1, 2).length;
  const open = () => startApp({ dataDir: folder.path, databaseUrl: database.url, args: ALONE });
  {
    await using server = await open();
    await patch(name, 0, bytes, cut, {}, server);
  }
  await using server = await open();
  await patch(name, cut, bytes, bytes.length, { "source-digest": WRONG }, server);
  expect(await stands(name, server)).toEqual({ offset: bytes.length, digest: WRONG });
});

for (const authorization of [null, "wrong", "Bearer wrong", `Basic ${SECRET}`])
  test(`HEAD and PATCH are answered 401 with Authorization ${authorization}`, async () => {
    const name = newName();
    const headers = new Headers(headersOf(0, lines(1, 1)));
    headers.delete("authorization");
    if (authorization) headers.set("authorization", authorization);
    expect((await send(name, { method: "HEAD", headers })).status).toBe(401);
    await problem(await send(name, { method: "PATCH", headers, body: lines(1, 1) }), 401);
    expect((await look(name)).status).toBe(404);
  });

for (const method of ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
  test(`${method} of a source is answered 405 with the accepted methods`, async () => {
    const body = method === "GET" ? {} : { body: lines(1, 1) };
    const response = await send(newName(), { method, headers: headersOf(0, lines(1, 1)), ...body });
    await problem(response, 405);
    expect(response.headers.get("allow")?.split(/, */).sort()).toEqual(["HEAD", "PATCH"]);
  });

test("a source needs a name, and has no sources below it", async () => {
  for (const path of ["", "a/b"])
    for (const method of ["HEAD", "PATCH"]) {
      const init = { method, headers: headersOf(0, lines(1, 1)) };
      expect((await fetch(`${app.url}/sources/${path}`, init)).status).toBe(404);
    }
});

test("another Content-Type is answered 415, and more than 16 MiB 413", async () => {
  const name = newName();
  const headers = { ...headersOf(0, lines(1, 1)), "content-type": "application/json" };
  await problem(await send(name, { method: "PATCH", headers, body: lines(1, 1) }), 415);
  await refused(name, 0, new Uint8Array(16 * 1024 * 1024 + 1), 413);
  expect((await look(name)).status).toBe(404);
});

for (const name of [
  "a b",
  "100%",
  "%2F%zz",
  "in/a/folder.jsonl",
  "../..",
  "日本語😀.jsonl",
  "two\nlines\r\n",
  "__proto__",
  "constructor",
  `"quoted" \\ {curly}, NULL`,
  "?a=b&c#d;e+f",
  "'; drop table checkpoints; --",
  "x".repeat(256),
  "😀".repeat(64),
])
  test(`a source may be named ${JSON.stringify(name.slice(0, 30))}`, async () => {
    const user = newName();
    expect((await look(name)).status).toBe(404);
    const bytes = bytesOf(line(user, 1), line(user, 2));
    await patch(name, 0, bytes, line(user, 1).length);
    await refused(name, 0, bytes, 409);
    const { answer } = await patch(name, line(user, 1).length, bytes);
    expect(await stands(name)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
    expect(await balanceAfter(user, answer.position)).toBe("3");
  });

for (const name of ["x".repeat(257), `${"😀".repeat(64)}x`, "a\0b"])
  test(`no source may be named ${JSON.stringify(name.slice(-10))} (${name.length}): 422`, async () => {
    expect((await look(name)).status).toBe(422);
    await refused(name, 0, lines(1, 1), 422);
  });

test("rejected lines are listed, and count as stored", async () => {
  const name = newName();
  const user = newName();
  const bytes = bytesOf("bad\n", line(user, 5), "\n", `{"userId":"${user}"}\r\n`, line(user, 6));
  const { answer, headers } = await patch(name, 0, bytes);
  expect(answer).toMatchObject({ accepted: 2, rejected: 2 });
  expect(answer.errors.map(({ line }) => line)).toEqual([1, 4]);
  expect(headers.get("upload-offset")).toBe(`${bytes.length}`);
  expect(await balanceAfter(user, answer.position)).toBe("11");
});

test("bytes without a good line are stored too; the first 100 bad lines are listed", async () => {
  const name = newName();
  const bytes = bytesOf("bad\n".repeat(150));
  const { answer } = await patch(name, 0, bytes);
  expect(answer).toMatchObject({ accepted: 0, rejected: 150 });
  expect(answer.errors).toHaveLength(100);
  expect(await stands(name)).toEqual({ offset: 600, digest: sha256(bytes) });
  await refused(name, 0, bytes, 409);
});

for (const [coding, compress] of [
  ["gzip", gzipSync],
  ["zstd", zstdCompressSync],
] as const)
  test(`offsets count the bytes before ${coding}`, async () => {
    const name = newName();
    const bytes = lines(1, 50);
    const headers = { "content-encoding": coding };
    const cut = lines(1, 20).length;
    for (const [from, to] of [
      [0, cut],
      [cut, bytes.length],
    ] as const) {
      const body = new Uint8Array(compress(bytes.subarray(from, to)));
      const init = {
        method: "PATCH",
        headers: { ...headersOf(from, bytes, to), ...headers },
        body,
      };
      expect((await send(name, init)).headers.get("upload-offset")).toBe(`${to}`);
    }
    expect(await stands(name)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
  });

test("a byte order mark at offset 0 counts as three bytes; elsewhere it makes a line bad", async () => {
  const name = newName();
  const user = newName();
  const bytes = bytesOf("\ufeff", line(user, 1), "\ufeff", line(user, 2), line(user, 4));
  const cut = 3 + line(user, 1).length;
  expect((await patch(name, 0, bytes, cut)).answer).toMatchObject({ accepted: 1, rejected: 0 });
  const { answer } = await patch(name, cut, bytes);
  expect(answer).toMatchObject({ accepted: 1, rejected: 1 });
  expect(await balanceAfter(user, answer.position)).toBe("5");
});

test("an empty body stores nothing and leaves the offset unchanged", async () => {
  const name = newName();
  const empty = await patch(name, 0, bytesOf(""));
  expect(empty.answer).toMatchObject({ accepted: 0, rejected: 0 });
  expect(empty.headers.get("upload-offset")).toBe("0");
  const bytes = lines(1, 2);
  await take(name, bytes);
  await patch(name, bytes.length, bytes);
  expect(await stands(name)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
});

test("of two requests with the same offset one is stored, and the other gets the true offset", async () => {
  const name = newName();
  const user = newName();
  let bytes = bytesOf("");
  let position = "";
  for (let round = 0; round < 20; round++) {
    const from = bytes.length;
    const offers = [1, 10].map((value) => bytesOf(bytes, line(user, value)));
    const answers = await Promise.all(offers.map((offer) => request(name, from, offer)));
    expect(answers.map(({ status }) => status).sort()).toEqual([200, 409]);
    const won = answers.findIndex(({ status }) => status === 200);
    bytes = offers[won] as Bytes;
    for (const { headers } of answers) {
      expect(headers.get("upload-offset")).toBe(`${bytes.length}`);
      expect(headers.get("source-digest")).toBe(sha256(bytes));
    }
    ({ position } = (await answers[won]?.json()) as Answer);
  }
  const values = Buffer.from(bytes)
    .toString()
    .matchAll(/"value":(\d+)/g);
  const sum = values.reduce((sum, [, value]) => sum + Number(value), 0);
  expect(await balanceAfter(user, position)).toBe(`${sum}`);
});

for (const those of ["come", "are cut off", "stand still"])
  test(`bytes that follow others which are still arriving wait for them: those ${those}`, async () => {
    const doCome = those === "come";
    const name = newName();
    const bytes = lines(1, 40);
    const cut = lines(1, 20).length;
    const { host, hostname, port } = new URL(app.url);
    const headers = { ...headersOf(0, bytes, cut), host, "content-length": `${cut}` };
    const head = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
    const slow = connect(Number(port), hostname);
    const answered = new Promise<string>((resolve) =>
      slow.once("data", (data) => resolve(`${data}`)),
    );
    slow.write(`PATCH /sources/${name} HTTP/1.1\r\n${head.join("")}\r\n`);
    slow.write(bytes.subarray(0, 10));
    // Requests that begin after this was written: the second is answered after it has been seen.
    for (let i = 0; i < 2; i++) expect((await look(name)).status).toBe(404);
    const following = request(name, cut, bytes);
    for (let i = 0; i < 2; i++) expect((await look(name)).status).toBe(404);
    if (doCome) slow.write(bytes.subarray(10, cut));
    if (those === "are cut off") slow.destroy();
    expect((await following).status).toBe(doCome ? 200 : 409);
    if (doCome) expect(await answered).toStartWith("HTTP/1.1 200 ");
    slow.destroy();
    const stored = doCome ? bytes.length : 0;
    expect((await following).headers.get("upload-offset")).toBe(`${stored}`);
    if (doCome) expect(await stands(name)).toEqual({ offset: stored, digest: sha256(bytes) });
  });

test("bytes are not stored where those before them could not be, although these were accepted", async () => {
  using folder = tempDir();
  let isFull = false;
  const noRoom = async () => {
    // The next bytes are accepted by now, and there is room for them.
    await until(() => sorted === 2);
    isFull = false;
    throw Object.assign(new Error("no room"), { code: "ENOSPC" });
  };
  let sorted = 0;
  const full: Disk = {
    ...disk,
    async openForAppend(path) {
      const file = await disk.openForAppend(path);
      return { ...file, append: (bytes) => (isFull ? noRoom() : file.append(bytes)) };
    },
  };
  const journal = await openJournal({ directory: folder.path, disk: full });
  const ledger = openDatabase(() => database.url, "test", 1);
  const sources = openSources(journal, ledger, async () => {});
  const name = newName();
  const bytes = lines(1, 40);
  const cut = lines(1, 20).length;
  const store = (from: number, to: number) => {
    const body = bytes.slice(from, to);
    const sort = async () => {
      sorted++;
      return { good: body, counts: { accepted: 20, rejected: 0, errors: [] }, errorBytes: 0 };
    };
    return sources.store({ name, from, digest: sha256(bytes.subarray(0, to)) }, body, sort);
  };
  isFull = true;
  const first = store(0, cut);
  const second = store(cut, bytes.length);
  await expect(first).rejects.toThrow("no room");
  expect(await second).toMatchObject({ why: "offset", state: { offset: 0 } });
  expect(await Promise.all([store(0, cut), store(cut, bytes.length)])).toMatchObject([
    { position: expect.any(Number) },
    { position: journal.end() },
  ]);
  await ledger.close();
  await journal.close();
});

test("an event with a field named source is an event, not a mark", async () => {
  const [name, user] = [newName(), newName()];
  const mark = { name, from: 0, to: 1_000, digest: NOTHING, events: 3 };
  const marked = `{"source":${JSON.stringify(mark)}`;
  const body = `${marked},"userId":"${user}","name":"add_revenue","value":7}\n${marked}}\n`;
  const response = await app.postLines(body);
  const answer = (await response.json()) as Answer;
  expect(answer).toMatchObject({ accepted: 1, rejected: 1 });
  expect(await balanceAfter(user, answer.position)).toBe("7");
  expect((await look(name)).status).toBe(404);
});

// Servers that are killed

test("a server that was killed reports the same offsets as before, posted or not, with or without the database", async () => {
  await using world = await openWorld(1);
  const [folder = ""] = world.folders;
  const sources = ["one", "two", "__proto__", "four"].map((name, i) => ({
    name,
    bytes: lines(100 * i, 100 * i + 50),
  }));
  const cut = (i: number) => lines(100 * i, 100 * i + 20).length;
  const start = (databaseUrl: string, args: string[]) =>
    startApp({ dataDir: folder, databaseUrl, args });
  const check = async (app: App, to: (i: number) => number) => {
    for (const [i, { name, bytes }] of sources.entries())
      expect(await stands(name, app)).toEqual({
        offset: to(i),
        digest: sha256(bytes.subarray(0, to(i))),
      });
    expect(await stands("empty", app)).toEqual({ offset: 0, digest: NOTHING });
    expect((await look("never", app)).status).toBe(404);
    await refused("one", 0, sources[0]!.bytes, 409, app);
  };
  const killed = async (app: App) => {
    app.kill();
    await app.exit();
  };
  {
    await using app = await start(world.databaseUrl, ALONE);
    for (const [i, { name, bytes }] of sources.entries())
      await patch(name, 0, bytes, cut(i), {}, app);
    await patch("empty", 0, bytesOf(""), 0, {}, app);
    await killed(app);
  }
  {
    await using app = await start(world.databaseUrl, ALONE);
    await check(app, cut);
    await killed(app);
  }
  {
    // Without the database the server accepts what follows.
    await using app = await start(NOWHERE, ALONE);
    await check(app, cut);
    for (const [i, { name, bytes }] of sources.entries())
      await patch(name, cut(i), bytes, bytes.length, {}, app);
    await killed(app);
  }
  {
    await using app = await start(world.databaseUrl, []);
    await untilBalance(app, "u349", "349");
    await killed(app);
  }
  for (const databaseUrl of [world.databaseUrl, NOWHERE]) {
    await using app = await start(databaseUrl, ALONE);
    await check(app, (i) => sources[i]!.bytes.length);
    await killed(app);
  }
  const wanted = sources.flatMap((_, i) => numbers(100 * i, 100 * i + 50));
  expect(await world.faults(wanted)).toEqual(NONE);
});

// Several servers, one ledger

test(
  "a source that two servers stored in different chunks counts once, whichever journal is posted first",
  seeded(async (random) => {
    await using world = await openWorld(2);
    await using other = await openWorld(0);
    await using third = await openWorld(0);
    const sources = Array.from({ length: 30 }, (_, i) =>
      randomSource(random, `s${i}.jsonl`, i * 100),
    );
    const [a, b] = await world.servers();
    await Promise.all(
      sources.map(async (source) => {
        // The second server gets everything; the first got a part of it before it died.
        const until = source.cuts[Math.floor(random() * source.cuts.length)] ?? 0;
        await sendAll(source, 0, until, random, a!);
      }),
    );
    a!.kill();
    await a!.exit();
    await Promise.all(sources.map((source) => sendAll(source, 0, source.bytes.length, random, b!)));
    b!.kill();
    await b!.exit();

    const [first, second] = world.journals as [string, string];
    await world.post(first, second);
    await other.post(second);
    await other.post(first);
    await Promise.all([third.post(first), third.post(second)]);
    const wanted = sources.flatMap(({ wanted }) => wanted);
    for (const ledger of [world, other, third]) expect(await ledger.faults(wanted)).toEqual(NONE);
    for (const ledger of [world, other, third]) {
      // Again on purpose: a journal given as a file is posted once.
      expect(await ledger.post(second, first)).toContain("posted 0 events");
      for (const { name, bytes } of sources)
        expect(await ledger.position(name)).toEqual([bytes.length, sha256(bytes)]);
    }
    for (const journal of world.journals) expect(readJournal(journal)).toBeGreaterThan(0);
  }),
);

test(
  "sources that move between servers count once, while processors start one by one",
  seeded(async (random) => {
    await using world = await openWorld(2);
    const sources = Array.from({ length: 12 }, (_, i) =>
      randomSource(random, `s${i}.jsonl`, i * 100),
    );
    const servers = await world.servers();
    await using processors = new AsyncDisposableStack();
    const unfinished = new Set(sources);
    for (let round = 0; unfinished.size > 0 || round <= 5; round++) {
      if (round === 3 || round === 5) {
        const DATA_DIR = world.folders[round === 3 ? 0 : 1] as string;
        const env = { DATA_DIR, DATABASE_URL: world.databaseUrl };
        processors.use(spawn("processor.ts", { env }));
      }
      await Promise.all(
        [...unfinished].map(async (source) => {
          const server = servers[random() < 0.5 ? 0 : 1]!;
          const from = (await standsOrNot(source.name, server)) ?? 0;
          const next = source.cuts.filter((cut) => cut > from);
          const to = next[Math.floor(random() * Math.min(8, next.length))];
          if (to === undefined) unfinished.delete(source);
          else {
            // 409: what the other server stored was posted since this one was asked.
            const sent = await request(source.name, from, source.bytes, to, {}, server);
            expect([200, 409]).toContain(sent.status);
            await sent.text();
          }
        }),
      );
    }
    for (const server of servers) await world.posted(server);
    expect(await world.faults(sources.flatMap(({ wanted }) => wanted))).toEqual(NONE);
    for (const journal of world.journals) expect(readJournal(journal)).toBeGreaterThan(0);
  }),
);

test("a last line without newline, whose file grew on another server, counts once, whichever journal is posted first", async () => {
  await using world = await openWorld(2);
  const [a, b] = await world.servers();
  for (const [first, one, two] of [
    [1, a!, b!],
    [4, b!, a!],
  ] as const) {
    const [begin, ...rest] = numbers(first, first + 3).map((number) => line(`u${number}`, number));
    const bytes = bytesOf(begin!, ...rest);
    await patch(`grows${first}`, 0, bytes, begin!.length + rest[0]!.length - 1, {}, one);
    await patch(`grows${first}`, 0, bytes, bytes.length, {}, two);
  }
  // Bad lines, carriage returns and blanks are skipped exactly, and not one event more.
  const head = `\ufeff${line("u7", 7).replace("\n", "\r\n")}bad, and long enough to be an event of its own, or two of them, or three\n`;
  const rest = `\n\r\n   ${line("u8", 8).replace("\n", " \t\r\n")}${line("u9", 9)}`;
  const bytes = bytesOf(head, rest);
  await patch("mixed", 0, bytes, bytesOf(head).length, {}, a!);
  await patch("mixed", 0, bytes, bytes.length, {}, b!);

  await world.post(...world.journals);
  expect(await world.faults(numbers(1, 10))).toEqual(NONE);
});

test("a source that moves to another server and back resumes where it was", async () => {
  await using world = await openWorld(2);
  const [a, b] = await world.servers();
  const bytes = lines(0, 90);
  const cut = (to: number) => lines(0, to).length;
  await patch("moves", 0, bytes, cut(30), {}, a!);
  await world.post(world.journals[0] as string);
  expect(await stands("moves", b!)).toMatchObject({ offset: cut(30) });
  await patch("moves", cut(30), bytes, cut(60), {}, b!);
  await world.post(world.journals[1] as string);
  expect(await stands("moves", a!)).toMatchObject({ offset: cut(60) });
  await refused("moves", 0, bytes, 409, a!);
  await patch("moves", cut(60), bytes, bytes.length, {}, a!);
  await world.post(...world.journals);
  expect(await stands("moves", b!)).toEqual({ offset: bytes.length, digest: sha256(bytes) });
  expect(await world.faults(numbers(0, 90))).toEqual(NONE);
});

// Helpers

type App = Awaited<ReturnType<typeof startApp>>;

interface Answer {
  accepted: number;
  rejected: number;
  errors: { line: number; message: string }[];
  position: string;
}

const POSITION = expect.stringMatching(/^[0-9a-f-]{36}:\d+$/);

function newName(): string {
  return `source-${crypto.randomUUID()}`;
}

function numbers(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, i) => from + i);
}

/** One event for each number, each with its own user. */
function lines(from: number, to: number): Bytes {
  return bytesOf(...numbers(from, to).map((number) => line(`u${number}`, number)));
}

function bytesOf(...parts: (string | Bytes)[]): Bytes {
  return new Uint8Array(Buffer.concat(parts.map((part) => Buffer.from(part as string))));
}

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

function headersOf(from: number, bytes: Bytes, to = bytes.length): Record<string, string> {
  return {
    authorization: SECRET,
    "content-type": "application/x-ndjson",
    "upload-offset": `${from}`,
    "source-digest": sha256(bytes.subarray(0, to)),
  };
}

function send(name: string, init: RequestInit, server = app): Promise<Response> {
  return fetch(`${server.url}/sources/${encodeURIComponent(name)}`, init);
}

async function look(name: string, server = app) {
  const init = { method: "HEAD", headers: { authorization: SECRET } };
  const response = await send(name, init, server);
  return { status: response.status, headers: response.headers, text: await response.text() };
}

async function stands(name: string, server = app) {
  const { status, headers } = await look(name, server);
  expect(status).toBe(204);
  const offset = Number(headers.get("upload-offset"));
  return { offset, digest: headers.get("source-digest") };
}

async function standsOrNot(name: string, server: App): Promise<number | null> {
  const { status, headers } = await look(name, server);
  return status === 404 ? null : Number(headers.get("upload-offset"));
}

/** PATCH with the bytes of the source from `from` to `to`. */
function request(name: string, from: number, bytes: Bytes, to = bytes.length, more = {}, on = app) {
  const headers = { ...headersOf(from, bytes, to), ...more };
  return send(name, { method: "PATCH", headers, body: bytes.subarray(from, to) }, on);
}

/** The same; it must be accepted. */
async function patch(...args: Parameters<typeof request>) {
  const response = await request(...args);
  const text = await response.text();
  expect(response.status, text).toBe(200);
  return { headers: response.headers, answer: JSON.parse(text) as Answer };
}

async function take(name: string, bytes: Bytes): Promise<void> {
  await patch(name, 0, bytes);
}

async function refused(name: string, from: number, bytes: Bytes, status: number, server = app) {
  const headers = headersOf(from, bytes);
  const response = await send(name, { method: "PATCH", headers, body: bytes }, server);
  await problem(response, status);
  const { headers: got } = response;
  return { offset: got.get("upload-offset"), digest: got.get("source-digest") };
}

async function problem(response: Response, status: number) {
  const text = await response.text();
  expect(response.status, text).toBe(status);
  expect(response.headers.get("content-type")).toStartWith("application/problem+json");
  return JSON.parse(text) as { errors: { path: string }[] };
}

async function balanceAfter(user: string, position: string, server = app): Promise<string | null> {
  const response = await fetch(`${server.url}/userEvents/${user}?after=${position}`);
  const { revenue } = (await response.json()) as { revenue?: string };
  return revenue ?? null;
}

function journalSize(): number {
  return readFileSync(dir.file("eventsPost.jsonl")).length;
}

/** How many whole frames a journal has; throws when anything in it cannot be read. */
function readJournal(path: string): number {
  const bytes = readFileSync(path);
  const { frames, rest } = parseFrames(bytes.subarray(parseJournalHeader(bytes)?.bytes));
  if (rest !== "nothing") throw new Error(`${path} cannot be read to its end`);
  return frames.length;
}

interface Source {
  name: string;
  bytes: Bytes;
  /** The offsets at which it may be split: around the ends of its lines. */
  cuts: number[];
  /** The numbers of its events. */
  wanted: number[];
}

/** A file with everything a file may contain: bad lines, blanks, both line endings, a torn end. */
function randomSource(random: Random, name: string, first: number): Source {
  const chance = (part: number) => random() < part;
  const parts = [chance(0.3) ? "\ufeff" : ""];
  const cuts: number[] = [];
  const wanted: number[] = [];
  let at = Buffer.byteLength(parts[0] as string);
  const add = (text: string) => {
    parts.push(text);
    at += text.length;
  };
  const count = 5 + Math.floor(random() * 40);
  const end = chance(0.5) ? "\n" : "\r\n";
  for (let i = 0; i < count; i++) {
    if (chance(0.15)) add("x".repeat(1 + random() * 150) + end);
    if (chance(0.1)) add(end);
    add(`${chance(0.1) ? "  " : ""}${line(`u${first + i}`, first + i).trimEnd()}`);
    wanted.push(first + i);
    if (chance(0.1)) add(" ");
    for (const character of chance(0.1) ? "\n" : end) {
      if (chance(0.3)) cuts.push(at);
      if (i < count - 1 || chance(0.5)) add(character);
    }
    if (chance(0.5)) cuts.push(at);
  }
  return { name, bytes: bytesOf(...parts), cuts: [...new Set([...cuts, at])], wanted };
}

/** Sends a source from `from` to `to`, split at some of the offsets where that is allowed. */
async function sendAll(source: Source, from: number, to: number, random: Random, server: App) {
  const cuts = source.cuts.filter((cut) => cut > from && cut < to && random() < 0.4);
  for (const cut of [...cuts, to]) {
    await patch(source.name, from, source.bytes, cut, {}, server);
    from = cut;
  }
}

const NONE = { missing: [], wrong: [], unknown: [], quarantined: 0 };

/** A ledger, and folders for some servers. */
async function openWorld(folders: number) {
  const database = await testDatabase();
  const root = tempDir();
  const dirs = numbers(0, folders).map((i) => root.file(`${i}`));
  const journals = dirs.map((path) => `${path}/eventsPost.jsonl`);
  const env = { DATA_DIR: root.file("processor"), DATABASE_URL: database.url };
  await using stack = new AsyncDisposableStack();
  stack.use(database);
  stack.use(root);
  const sql = stack.use(connectTest(database.url));
  const cleanup = stack.move();
  return {
    databaseUrl: database.url,
    folders: dirs,
    journals,
    /** One for each folder, without processors. */
    async servers() {
      const start = (dataDir: string) =>
        startApp({ dataDir, databaseUrl: database.url, args: ALONE });
      const servers = await Promise.all(dirs.map(start));
      for (const server of servers) cleanup.use(server);
      return servers;
    },
    /** Posts files; returns the output. */
    async post(...files: string[]): Promise<string> {
      const { code, stdout, stderr } = await run("processor.ts", { args: files, env });
      expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
      return stdout;
    },
    /** Returns when a follower has posted everything that `server` has accepted. */
    async posted(server: App) {
      const { position: after } = (await (await server.postLines("bad\n")).json()) as Answer;
      const path = `${server.url}/userEvents/nobody?after=${after}`;
      await until(async () => (await fetch(path)).status === 404);
    },
    async position(name: string) {
      const [row] =
        await sql`select position, digest from checkpoints where source = ${`sent:${name}`}`;
      return [Number(row?.["position"]), row?.["digest"]];
    },
    async faults(wanted: number[]) {
      const found = await balances(database.url);
      const [row] = await sql`select count(*) from quarantine`;
      return {
        missing: wanted.filter((number) => !(`u${number}` in found)),
        wrong: Object.entries(found).filter(([user, sum]) => sum !== user.slice(1)),
        unknown: Object.keys(found).filter((user) => !wanted.includes(Number(user.slice(1)))),
        quarantined: Number(row?.["count"]),
      };
    },
    [Symbol.asyncDispose]: () => cleanup.disposeAsync(),
  };
}

test("a batch moves a bounded number of sources (500,000 of one event each took 48 s)", () => {
  const fold = new Fold(1_000);
  let sources = 0;
  while (!fold.isFull && sources < 1_000) {
    const mark = { name: `device${sources++}`, from: 0, to: 50, digest: "0".repeat(64), events: 1 };
    fold.addFrame(Buffer.concat([encodeSourceMark(mark), Buffer.from(line("ann"))]), 0, 0);
  }
  expect(sources).toBe(100);
});
