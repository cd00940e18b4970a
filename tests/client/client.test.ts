/**
 * The client as a program: what it sends, what it prints, and how it ends. The server is a real one,
 * usually without a database, which accepting events does not need; a real one behind a proxy that
 * causes faults; or a stand-in.
 */
import { afterAll, expect, setDefaultTimeout, test } from "bun:test";
import { createHash } from "node:crypto";
import {
  appendFileSync,
  closeSync,
  existsSync,
  fstatSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";

import { counted } from "../../lib/progress.ts";
import { line, readRejected, rejectedFaults, writeEvents } from "../support/events.ts";
import { type Fault, openMeddler } from "../support/network.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, SECRET, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { IS_LONG, longTest, seeded } from "../support/random.ts";

setDefaultTimeout(20_000);

const LINES = IS_LONG ? 40_000 : 15_000;
const NOWHERE = "http://127.0.0.1:1";
const TOO_LONG = expect.stringMatching(/^longer than 65536/);

test("every event of a file is on the server's disk, and the last line on stdout is the summary", async () => {
  await using server = await openServer();
  const fixture = readFileSync(join(import.meta.dir, "..", "fixtures", "assignment.jsonl"), "utf8");
  const sent = await server.send(server.write("assignment.jsonl", fixture));
  expect(sent).toMatchObject({ code: 0, stderr: "" });
  expect(sent.stdout).toMatch(
    /^sent 5 events \(0 rejected\) from \S+assignment.jsonl: 264 bytes in [\d.]+ s, \d+ events\/s\n$/,
  );
  expect(server.journal()).toHaveLength(5);
});

test("without FILE, the client sends events.jsonl of the current folder", async () => {
  await using server = await openOwnServer();
  server.write("events.jsonl", line("ann", 1));
  const sent = await run("client.ts", {
    cwd: server.folder,
    env: { SERVER_URL: `${server.url}/` },
  });
  expect(sent).toMatchObject({ code: 0, stderr: "" });
  expect(sent.stdout).toStartWith("sent 1 event (0 rejected) from events.jsonl: ");
  expect(server.journal()).toEqual([line("ann", 1)]);
});

test("rejected lines are kept with number, reason and text, the others are sent, and the exit code is 1", async () => {
  await using server = await openServer();
  const file = server.write(
    "a.jsonl",
    `${line("ann", 1)}nonsense\n\n${line("", 2)}${line("ben", 3)}`,
  );
  const sent = await server.send(file);
  expect(sent).toMatchObject({
    code: 1,
    stderr: `2 lines were rejected: see ${file}.rejected.jsonl\n`,
  });
  expect(sent.stdout).toStartWith("sent 2 events (2 rejected) from ");
  expect(server.journal()).toEqual([line("ann", 1), line("ben", 3)]);
  expect(rejected(file)).toEqual([
    { line: 2, at: line("ann", 1).length, message: "not JSON", text: "nonsense" },
    {
      line: 4,
      at: line("ann", 1).length + 10,
      message: expect.stringMatching(/^userId must be a string of 1 to 256/),
      text: line("", 2).trimEnd(),
    },
  ]);
});

test("the rejected lines of two chunks are found again where a client died before it noted them", async () => {
  using server = await openServer();
  const bad = `${"x".repeat(99)}\n`;
  const text = Buffer.from(`${line("ann", 1)}${bad}${line("ben", 2).repeat(20)}`.repeat(2_500));
  const file = server.write("a.jsonl", `${text}`);
  let from = 0;
  for (let chunk = 0; chunk < 2; chunk++) {
    const to = text.lastIndexOf("\n", from + MIB - 1) + 1;
    const digest = createHash("sha256").update(text.subarray(0, to)).digest("hex");
    const headers = {
      authorization: SECRET,
      "content-type": "application/x-ndjson",
      "upload-offset": `${from}`,
      "source-digest": digest,
    };
    const url = `${server.url}/sources/${basename(file)}`;
    const init = { method: "PATCH", headers, body: text.subarray(from, to) };
    expect((await fetch(url, init)).status).toBe(200);
    from = to;
  }
  const sent = await server.send(file);
  expect(sent.stderr).toBe(`2500 lines were rejected: see ${file}.rejected.jsonl\n`);
  expect(rejected(file).length).toBe(2_500);
});

test("25,000 consecutive bad lines are all kept, each with its own number", async () => {
  await using server = await openServer();
  const bad = Array.from({ length: 25_000 }, (_, i) => `b${i + 1}`);
  const file = server.write("a.jsonl", `${bad.join("\n")}\n${line("ann", 1)}`);
  const sent = await server.send(file);
  expect(sent.code).toBe(1);
  expect(sent.stdout).toStartWith("sent 1 event (25000 rejected) from ");
  let at = 0;
  const kept = bad.map((text, i) => {
    const record = { line: i + 1, at, message: "not JSON", text };
    at += text.length + 1;
    return record;
  });
  expect(rejected(file)).toEqual(kept);
});

test("line numbers stay right across chunks, blank lines and lines that are too long", async () => {
  await using server = await openServer();
  const note = "n".repeat(50_000);
  const large = line("ann", 1, { note });
  const endless = "y".repeat(3_000_000);
  const lines = `${large.repeat(45)}bad46\n\r\n${endless}\n${large.repeat(45)}${"z".repeat(70_000)}\nbad95`;
  const file = server.write("a.jsonl", `${lines}\n${line("ben", 2)}`);
  const sent = await server.send(file);
  expect(sent.code).toBe(1);
  expect(sent.stdout).toStartWith("sent 91 events (4 rejected) from ");
  expect(server.journal()).toHaveLength(91);
  const at = (text: string) => ({ at: lines.indexOf(text) });
  const long = "z".repeat(4096);
  expect(rejected(file)).toEqual([
    { line: 46, ...at("bad46"), message: "not JSON", text: "bad46" },
    { line: 48, ...at(endless), message: TOO_LONG, text: endless.slice(0, 4096) },
    { line: 94, ...at(long), message: TOO_LONG, text: long },
    { line: 95, ...at("bad95"), message: "not JSON", text: "bad95" },
  ]);
});

test("CRLF, a BOM, blank lines and a last line without newline are accepted", async () => {
  await using server = await openServer();
  const text = `\ufeff${line("ann", 1)}\n  \n${line("ben", 2)}${line("cid", 3)}`;
  const file = server.write("a.jsonl", text.trimEnd().replaceAll("\n", "\r\n"));
  expect(await server.send(file)).toMatchObject({ code: 0, stderr: "" });
  expect(server.journal()).toEqual([line("ann", 1), line("ben", 2), line("cid", 3)]);
});

test("an incomplete last line is reported, not sent, and sent by the run that finds it complete", async () => {
  await using server = await openServer();
  const last = line("ben", 2);
  const file = server.write("a.jsonl", line("ann", 1) + last.slice(0, 20));
  const torn = await server.send(file);
  expect(torn).toMatchObject({
    code: 1,
    stderr: `${file}: line 2 has no newline and is not a complete event: left for the next run\n`,
  });
  expect(torn.stdout).toContain(`: ${line("ann", 1).length} bytes in `);
  appendFileSync(file, last.slice(20));
  for (const events of [1, 0]) {
    const sent = await server.send(file);
    expect(sent).toMatchObject({ code: 0, stderr: "" });
    expect(sent.stdout).toStartWith(`sent ${counted(events, "event")} `);
  }
  expect(server.journal()).toEqual([line("ann", 1), last]);
});

test("a last line without newline that is a complete event is sent once", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1) + line("ben", 2).trimEnd());
  expect((await server.send(file)).stdout).toStartWith("sent 2 events ");
  appendFileSync(file, `\nbad\n${line("cid", 3)}`);
  expect((await server.send(file)).stdout).toStartWith("sent 1 event (1 rejected) ");
  expect(server.journal()).toEqual([line("ann", 1), line("ben", 2), line("cid", 3)]);
  expect(readRejected(file)).toMatchObject([{ line: 3, text: "bad" }]);
});

test("every rejected line is kept, also where no answer can list those of a chunk", async () => {
  await using server = await openServer();
  const file = server.write("bad.jsonl", `${line("ann", 1)}${'{"id":0}\n'.repeat(20_000)}`);
  expect((await server.send(file)).code).toBe(1);
  const numbers = rejected(file).map((record) => (record as { line: number }).line);
  expect(numbers).toEqual(Array.from({ length: 20_000 }, (_, i) => i + 2));
  expect(server.journal()).toEqual([line("ann", 1)]);
});

test("a second run sends nothing, prints what is stored already, and keeps the rejected lines", async () => {
  await using server = await openServer();
  const text = `${line("ann", 1)}bad\n`;
  const file = server.write("a.jsonl", text);
  await server.send(file);
  const before = readFileSync(`${file}.rejected.jsonl`, "utf8");
  const again = await server.send(file);
  expect(again.code).toBe(1);
  expect(again.stdout).toMatch(
    /^sent 0 events \(0 rejected\) from \S+: 0 bytes in .*; already there: (\d+) bytes \(2 lines\)\n$/,
  );
  expect(again.stdout).toContain(`there: ${text.length} bytes`);
  expect(readFileSync(`${file}.rejected.jsonl`, "utf8")).toBe(before);
  expect(server.journal()).toEqual([line("ann", 1)]);
});

test("only the new lines of a file that grew are sent, and bad ones keep their numbers", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", `${line("ann", 1)}bad2\n`);
  await server.send(file);
  appendFileSync(file, `${line("ben", 2)}bad4\n`);
  expect((await server.send(file)).stdout).toStartWith("sent 1 event (1 rejected) ");
  expect(server.journal()).toEqual([line("ann", 1), line("ben", 2)]);
  expect(readRejected(file)).toMatchObject([
    { line: 2, text: "bad2" },
    { line: 4, text: "bad4" },
  ]);
});

test("a file that begins with other bytes is sent whole, and each of the files resumes where it was left", async () => {
  await using server = await openServer();
  const [old, other] = [line("ann", 1) + line("ben", 2), line("ann", 5) + line("ben", 2)];
  const texts = [old, other, old + line("cid", 7), other + line("dan", 8), old.slice(0, 5) + other];
  const sent = [];
  for (const text of texts) {
    const { stdout } = await server.send(server.write("a.jsonl", text));
    sent.push(Number(/^sent (\d+) events?/.exec(stdout)?.[1]));
  }
  expect(sent).toEqual([2, 2, 1, 1, 1]);
  expect(server.journal().join("")).toBe(
    old + other + line("cid", 7) + line("dan", 8) + line("ben", 2),
  );
});

test("a file without bad lines that replaces one with bad lines ends with exit code 0 and no rejected lines", async () => {
  await using server = await openServer();
  expect((await server.send(server.write("a.jsonl", "bad\n"))).code).toBe(1);
  const file = server.write("a.jsonl", line("ann", 1));
  expect((await server.send(file)).code).toBe(0);
  expect(existsSync(`${file}.rejected.jsonl`)).toBe(false);
});

test("a file in another folder counts once; under another name or --source it counts again", async () => {
  await using server = await openOwnServer();
  const text = line("ann", 1);
  for (const [name, args, events] of [
    ["a.jsonl", [], 1],
    ["elsewhere/a.jsonl", [], 0],
    ["b.jsonl", [], 1],
    ["c.jsonl", ["--source", "a.jsonl"], 0],
    ["a.jsonl", ["--source", "shop / 1: ü?#"], 1],
    ["d.jsonl", ["--source", "shop / 1: ü?#"], 0],
  ] as const) {
    const sent = await server.send(server.write(name, text), ...args);
    expect(sent.code).toBe(0);
    expect(sent.stdout).toStartWith(`sent ${counted(events, "event")} `);
  }
  expect(server.journal()).toHaveLength(3);
});

test("--again sends the whole file once more; what is appended later is sent once", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1) + line("ben", 2));
  await server.send(file);
  expect((await server.send(file, "--again")).stdout).toStartWith("sent 2 events ");
  appendFileSync(file, line("cid", 3));
  for (const events of [1, 0])
    expect((await server.send(file)).stdout).toStartWith(`sent ${counted(events, "event")} `);
  expect(server.journal().join("")).toBe(
    `${(line("ann", 1) + line("ben", 2)).repeat(2)}${line("cid", 3)}`,
  );
});

test.each([
  ["of a file that was sent whole", true, 0],
  ["of a file that has grown since", true, 55_000],
  ["of a file that was not sent before", false, 0],
])(
  "an interrupted --again %s is continued by --again, which says so; the next one is another copy",
  async (_, isSent, grownLines) => {
    await using server = await openServer();
    const text = line("ann", 1).repeat(70_000);
    const first = line("ann", 1).repeat(70_000 - grownLines);
    const file = server.write("a.jsonl", first);
    if (isSent) await server.send(file);
    writeFileSync(file, text);

    const ran: { code: number | null; text: string }[] = [];
    for (const signal of ["SIGKILL", "SIGTERM", null, null] as const) {
      let chunks = 0;
      await using proxy = await openMeddler(server.url, ({ method }) => {
        if (signal && method === "PATCH" && ++chunks === 2) client.kill(signal);
        return null;
      });
      const env = { SERVER_URL: proxy.url };
      await using client = spawn("client.ts", { args: [file, "--again"], env });
      ran.push({ code: await client.exit(), text: client.stderr.text() });
    }
    const continues = /a\.jsonl: continuing the copy that .* after the \d+ bytes that are stored\n/;
    expect(ran.map(({ text }) => continues.test(text))).toEqual([false, true, true, false]);
    expect(ran.map(({ code }) => code)).toEqual([null, 143, 0, 0]);
    const stored = (isSent ? first.length : 0) + 2 * text.length;
    expect(server.journal().join("").length).toBe(stored);
    expect(existsSync(`${file}.again`)).toBe(false);
  },
);

test("--follow sends what is appended to the file; SIGTERM ends it with exit code 0 and a summary", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1));
  await using client = server.start(file, "--follow");
  await until(() => server.journal().length === 1);
  appendFileSync(file, line("ben", 2) + line("cid", 3).slice(0, 10));
  await until(() => server.journal().length === 2);
  appendFileSync(file, line("cid", 3).slice(10));
  await until(() => server.journal().length === 3);
  expect(client.child.exitCode).toBeNull();
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(0);
  expect(client.stderr.text()).toBe("");
  expect(client.stdout.text()).toStartWith("sent 3 events (0 rejected) from ");
  expect((await server.send(file)).stdout).toStartWith("sent 0 events ");
  expect(server.journal()).toEqual([line("ann", 1), line("ben", 2), line("cid", 3)]);
});

test("--follow continues with the file that replaces the first one", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1) + line("ann", 2));
  await using client = server.start(file, "--follow");
  await until(() => server.journal().length === 2);
  server.write("a.jsonl", line("ben", 3));
  await until(() => server.journal().length === 3);
  appendFileSync(file, line("cid", 4));
  await until(() => server.journal().length === 4);
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(0);
  expect(server.journal().slice(2)).toEqual([line("ben", 3), line("cid", 4)]);
});

test.each([true, false])(
  "when a file is replaced while it is sent, each event of both files counts once (--follow: %s)",
  async (follows) => {
    await using server = await openServer();
    let chunks = 0;
    await using proxy = await openMeddler(server.url, ({ method }) => {
      if (method === "PATCH") chunks++;
      return { delayMs: chunks < 3 ? 300 : 0 };
    });
    const lines = (user: string) =>
      Array.from({ length: 60_000 }, (_, i) => line(`${user}${i}`, 1));
    const file = server.write("a.jsonl", lines("old").join(""));
    const next = server.write("next.jsonl", lines("new").join(""));
    const start = () =>
      spawn("client.ts", {
        args: follows ? [file, "--follow"] : [file],
        env: { SERVER_URL: proxy.url },
      });
    await using client = start();
    await until(() => chunks === 1);
    renameSync(next, file);
    if (!follows) {
      expect(await client.exit()).toBe(0);
      await using again = start();
      expect(await again.exit()).toBe(0);
    } else {
      await until(() => server.journal().length >= 120_000);
      client.kill("SIGTERM");
      expect(await client.exit()).toBe(0);
    }
    expect(server.journal().toSorted()).toEqual([...lines("old"), ...lines("new")].toSorted());
  },
);

test("--follow sends a rotated file to its end, and then the file that has its name", async () => {
  await using server = await openServer();
  let delayMs = 0;
  await using proxy = await openMeddler(server.url, () => ({ delayMs }));
  const file = server.write("a.jsonl", line("ann", 1));
  await using client = spawn("client.ts", {
    args: [file, "--follow"],
    env: { SERVER_URL: proxy.url },
  });
  await until(() => server.journal().length === 1);
  delayMs = 300;
  appendFileSync(file, line("ann", 2));
  await until(() => server.journal().length === 2);
  appendFileSync(file, line("ann", 3)); // while the answer to the event before is delayed
  renameSync(file, `${file}.1`);
  writeFileSync(file, line("ben", 4));
  await until(() => server.journal().length === 4);
  expect(server.journal()).toEqual([1, 2, 3].map((n) => line("ann", n)).concat(line("ben", 4)));
  // Nor does it wait for a file of that name when it is stopped.
  rmSync(file);
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(0);
});

test("SIGTERM ends --follow while the server is unreachable", async () => {
  using folder = tempDir();
  const file = folder.file("a.jsonl");
  writeFileSync(file, line("ann", 1));
  await using client = spawn("client.ts", {
    args: [file, "--follow"],
    env: { SERVER_URL: NOWHERE },
  });
  await until(() => client.stderr.text().includes("retrying for"));
  client.kill("SIGTERM"); // it would retry for five minutes
  expect(await client.exit()).toBe(3);
  expect(client.stdout.text()).toStartWith("stopped: sent 0 events ");
});

test("--wait returns when the balances are posted, also when there is nothing new and on another server", async () => {
  await using database = await testDatabase();
  await using server = await openOwnServer(database.url);
  const lines = Array.from({ length: 20_000 }, (_, i) => line(`user${i}`, 1));
  const file = server.write("a.jsonl", lines.join(""));
  const sent = await server.send(file, "--wait");
  expect(Object.values(await balances(database.url))).toEqual(lines.map(() => "1"));
  expect(sent).toMatchObject({
    code: 0,
    stderr: "waiting until all of it is posted to the ledger\n",
  });
  expect(sent.stdout).toEndWith("; all of it is in the ledger\n");

  const again = await server.send(file, "--wait");
  expect(again.code).toBe(0);
  expect(again.stdout).toStartWith("sent 0 events ");
  expect(again.stdout).toEndWith("; all of it is in the ledger\n");

  // On a server whose journal had no events, it once waited for ever.
  await using other = await openOwnServer(database.url);
  const elsewhere = await other.send(file, "--wait");
  expect(elsewhere).toMatchObject({
    code: 0,
    stderr: "waiting until all of it is posted to the ledger\n",
  });
  expect(elsewhere.stdout).toStartWith("sent 0 events ");
  expect(elsewhere.stdout).toEndWith("; all of it is in the ledger\n");
});

test("--wait includes what another client has sent meanwhile", async () => {
  await using database = await testDatabase();
  await using server = await openOwnServer(database.url);
  const lines = Array.from({ length: 45_000 }, (_, i) => line(`user${i % 100}`, 1));
  const file = server.write("a.jsonl", lines.join(""));
  let isSent = false;
  let waits = 0;
  await using proxy = await openMeddler(server.url, async ({ method, url = "" }) => {
    // The balances alone prove nothing: they are posted soon even if the client does not wait.
    if (url.includes("?after=")) waits++;
    // Another client sends all of it between HEAD and the first chunk.
    if (method === "PATCH" && !isSent) {
      isSent = true;
      expect((await server.send(file)).code).toBe(0);
    }
    return null;
  });
  const args = [file, "--wait"];
  const second = await run("client.ts", { args, env: { SERVER_URL: proxy.url } });
  expect(waits).toBeGreaterThan(0);
  expect(second.stdout).toEndWith("; all of it is in the ledger\n");
  expect(Object.values(await balances(database.url))).toEqual(Array(100).fill("450"));
});

test("the server alone decides what is rejected, by its event types and its schema, even when an answer was lost", async () => {
  using folder = tempDir();
  const schema = folder.file("schema.json");
  writeFileSync(schema, JSON.stringify({ properties: { value: { multipleOf: 0.01 } } }));
  const env = { EVENT_TYPES: "sale:+", EVENT_SCHEMA: schema };
  await using server = await openOwnServer(undefined, env);
  const sale = (value: number) => `{"userId":"ann","name":"sale","value":${value}}\n`;
  const file = server.write("a.jsonl", sale(19.99) + sale(0.001) + sale(4.35));
  let lost = 0;
  await using proxy = await openMeddler(server.url, ({ method }) =>
    method === "PATCH" && lost++ === 0 ? "lose" : null,
  );
  for (let again = 0; again < 3; again++) {
    const sent = await run("client.ts", { args: [file], env: { SERVER_URL: proxy.url } });
    expect(sent.code).toBe(1);
    expect(rejected(file)).toMatchObject([{ line: 2, text: sale(0.001).trimEnd() }]);
    expect(server.journal()).toEqual([sale(19.99), sale(4.35)]);
  }
});

test("--follow keeps the rejected lines of a file that is rotated away, and ends with exit code 1", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", `${line("ann", 1)}bad\n`);
  await using client = spawn("client.ts", {
    args: [file, "--follow"],
    env: { SERVER_URL: server.url },
  });
  await until(() => existsSync(`${file}.rejected.jsonl`));
  renameSync(file, `${file}.1`);
  writeFileSync(file, `${line("ben", 2)}worse\n`);
  await until(() => server.journal().length === 2);
  await until(() => existsSync(`${file}.rejected.jsonl`));
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(1);
  expect(rejected(file)).toMatchObject([{ text: "worse" }]);
  expect(readFileSync(`${file}.rejected.1.jsonl`, "utf8")).toContain('"text":"bad"');
});

test("when rejected lines cannot be kept, the client says so and sends the others", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", `bad\n${line("ann", 1)}`);
  mkdirSync(`${file}.rejected.jsonl`);
  for (let again = 0; again < 2; again++) {
    const sent = await server.send(file);
    expect(sent.code).toBe(1);
    expect(sent.stderr).toContain("rejected lines are only counted: cannot ");
    expect(server.journal()).toEqual([line("ann", 1)]);
  }
});

test("a source with the longest possible name is found again and grows", async () => {
  await using server = await openOwnServer();
  const name = "m".repeat(256);
  const file = server.write("a.jsonl", line("ann", 1));
  for (const lines of [1, 2]) {
    expect((await server.send(file, "--source", name)).code).toBe(0);
    expect(server.journal()).toHaveLength(lines);
    appendFileSync(file, line("ben", 2));
  }
});

test("with -, stdin is sent, its bad lines are kept, and a message says that it cannot be resumed", async () => {
  await using server = await openServer();
  const sent = await run("client.ts", {
    args: ["-"],
    cwd: server.folder,
    env: { SERVER_URL: server.url },
    stdin: `${line("ann", 1).repeat(30_000)}bad\n${line("ben", 2).trimEnd()}`,
  });
  expect(sent.code).toBe(1);
  expect(sent.stdout).toStartWith("sent 30001 events (1 rejected) from stdin: ");
  expect(sent.stderr).toContain("cannot be resumed");
  expect(server.journal()).toHaveLength(30_001);
  expect(readRejected(join(server.folder, "stdin"))).toEqual([
    { line: 30_001, at: 30_000 * line("ann", 1).length, text: "bad" },
  ]);
});

test("stdin with a --source continues after what is stored, and other bytes are refused", async () => {
  await using server = await openServer();
  const pipe = (stdin: string, args = ["-", "--source", "feed"]) =>
    run("client.ts", {
      args,
      cwd: server.folder,
      env: { SERVER_URL: server.url },
      stdin,
    });
  const first = `${line("ann", 1).repeat(40_000)}bad\n`;
  expect(await pipe(first)).toMatchObject({
    code: 1,
    stderr: expect.not.stringContaining("resumed"),
  });
  // The rejected lines of another pipe are not this one's.
  expect((await pipe("worse\n", ["-"])).code).toBe(1);
  const again = await pipe(first + line("ben", 2));
  expect(again.stderr).toContain("1 line was rejected: see feed.rejected.jsonl");
  expect(again.stdout).toStartWith("sent 1 event (0 rejected) from stdin: ");
  expect(again.stdout).toContain(`already there: ${first.length} bytes (40001 lines)`);
  expect(server.journal()).toHaveLength(40_001);
  const [rejected] = readRejected(join(server.folder, "feed"));
  expect(rejected).toMatchObject({ line: 40_001, text: "bad" });
  for (const other of [line("cid", 3), line("cid", 3).repeat(60_000)]) {
    const refused = await pipe(other);
    expect(refused.code).toBe(2);
    expect(refused.stderr).toContain("are already stored as feed; use another --source");
  }
  expect(server.journal()).toHaveLength(40_001);
});

test("an empty file ends with exit code 0", async () => {
  await using server = await openServer();
  const sent = await server.send(server.write("a.jsonl", ""));
  expect(sent).toMatchObject({ code: 0, stderr: "" });
  expect(sent.stdout).toStartWith("sent 0 events (0 rejected) from ");
});

test("a missing file, a folder, --source for two files, an unknown option and a bad duration end with exit code 2 and a message", async () => {
  using folder = tempDir();
  const file = folder.file("a.jsonl");
  const wrong = await Promise.all(
    [
      [file],
      [folder.path],
      [file, file, "--source", "a"],
      ["--twice"],
      ["--retry-for", "soon", file],
    ].map((args) => run("client.ts", { args })),
  );
  expect(wrong.map(({ code, stdout }) => ({ code, stdout }))).toEqual(
    wrong.map(() => ({ code: 2, stdout: "" })),
  );
  const [missing, aFolder, two, option, soon] = wrong.map(({ stderr }) => stderr);
  expect(missing).toBe(`${file}: no such file\n`);
  expect(aFolder).toBe(`${folder.path}: not a regular file or a pipe\n`);
  expect(two).toBe("--source requires a single FILE\n");
  expect(option).toContain("--twice");
  expect(soon).toBe("--retry-for requires a duration like 90s, 5m or 2h\n");
});

test("a wrong secret ends with exit code 2, is not shown, and nothing is stored", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1));
  const sent = await server.sendWith({ AUTH_SECRET: "hunter2" }, file);
  expect(sent.code).toBe(2);
  expect(sent.stderr).toStartWith(`${server.url} answered 401: `);
  expect(sent.stdout).toStartWith("stopped: sent 0 events (0 rejected) from ");
  expect(sent.stdout + sent.stderr).not.toContain("hunter2");
  expect(server.journal()).toEqual([]);
});

test("the client presents the first of several secrets", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1));
  const sent = await server.sendWith({ AUTH_SECRET: `${SECRET},hunter2` }, file);
  expect(sent.code).toBe(0);
});

test("a server that is unreachable for the time of --retry-for ends with exit code 3 and the reason", async () => {
  using folder = tempDir();
  const file = folder.file("a.jsonl");
  writeFileSync(file, line("ann", 1));
  const args = [file, "--retry-for", "1s"];
  const sent = await run("client.ts", { args, env: { SERVER_URL: NOWHERE } });
  expect(sent.code).toBe(3);
  expect(sent.stderr).toStartWith(`${NOWHERE} does not answer: `);
  expect(sent.stderr.trimEnd().split("\n")).toHaveLength(1);
  expect(sent.stdout).toStartWith(`stopped: sent 0 events (0 rejected) from ${file}: 0 bytes in `);
});

test("a server that is not Daybook ends with exit code 3, whatever it answers", async () => {
  const answers = [
    () => new Response("hello"),
    () => new Response("made", { status: 201 }),
    () => new Response("none", { status: 404 }),
    onPatch(() => new Response("hello")),
    onPatch(() => Response.json({ accepted: 1 })),
    onPatch(() => Response.json(null)),
    onPatch(() => new Response("where?", { status: 409 })),
  ];
  for (const answer of answers) {
    await using server = standIn(answer);
    const sent = await server.send(line("ann", 1));
    expect(sent.code).toBe(3);
    expect(sent.stderr).toStartWith(`${server.url} `);
    expect(sent.stdout).toStartWith("stopped: sent 0 events ");
  }
});

test("the secret does not follow a redirect", async () => {
  let asked = 0;
  await using other = standIn(() => (asked++, new Response("thanks")));
  const redirect = () => Response.redirect(`${other.url}/sources/a`, 307);
  for (const answer of [redirect, onPatch(redirect)]) {
    await using server = standIn(answer);
    expect((await server.send(line("ann", 1))).code).toBe(3);
  }
  expect(asked).toBe(0);
});

test("a server that fails half-way ends with exit code 3, and the summary has the bytes on its disk", async () => {
  await using server = await openServer();
  const one = line("ann", 1);
  await using full = await openMeddler(server.url, ({ headers }) =>
    headers["upload-offset"] === `${20_000 * one.length}` ? { answer: 507 } : null,
  );
  const file = server.write("a.jsonl", one.repeat(25_000)); // a chunk has at most 20,000 lines
  const sent = await server.sendWith({ SERVER_URL: full.url }, file, "--retry-for", "1s");
  expect(sent.code).toBe(3);
  expect(sent.stderr).toStartWith(`${full.url} answered 507: `);
  expect(sent.stdout).toContain("stopped: sent 20000 events (0 rejected) from ");
  expect(sent.stdout).toContain(`: ${20_000 * one.length} bytes in `);
  expect((await server.send(file)).stdout).toStartWith("sent 5000 events ");
  expect(server.journal()).toHaveLength(25_000);
});

test.each<Exclude<Fault, null>>([
  { answer: 408 },
  { answer: 425 },
  { answer: 429 },
  { answer: 500 },
  { answer: 502 },
  { answer: 503, headers: { "retry-after": "0" } },
  { answer: 504 },
  { answer: 507 },
  "cut",
  "lose",
  "tear",
  { delayMs: 50 },
])("after %j the client retries, and every event counts once", async (fault) => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1).repeat(20_000) + line("ben", 2));
  const failed = new Set<string>();
  await using proxy = await openMeddler(server.url, ({ method, headers }) => {
    const request = `${method} ${headers["upload-offset"]}`;
    return failed.size !== failed.add(request).size ? fault : null; // each request fails once
  });
  const sent = await server.sendWith({ SERVER_URL: proxy.url }, file);
  expect(sent).toMatchObject({ code: 0, stderr: "" });
  expect(sent.stdout).toStartWith("sent 20001 events (0 rejected) ");
  // A chunk that fails by time is sent in smaller pieces.
  expect(failed.size).toBeWithin(3, 20);
  expect(server.journal()).toHaveLength(20_001);
});

test("on a slow link chunks become smaller until they arrive, and larger again", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1).repeat(60_000)); // 2.9 MB
  const sizes: number[] = [];
  let maxBytes = 200_000;
  await using proxy = await openMeddler(server.url, ({ method, headers }) => {
    if (method !== "PATCH") return null;
    const bytes = Number(headers["content-length"]);
    sizes.push(bytes);
    if (bytes <= maxBytes) return null;
    // The server may also have stored it when its 408, or nothing at all, arrives too late.
    return sizes.length % 2 === 0 ? "lose" : { answer: 408 };
  });
  const sending = server.sendWith({ SERVER_URL: proxy.url }, file);
  await until(() => sizes.filter((bytes) => bytes <= maxBytes).length > 3);
  maxBytes = Infinity;
  const sent = await sending;
  expect(sent).toMatchObject({ code: 0, stderr: "" });
  expect(server.journal()).toHaveLength(60_000);
  expect(Math.min(...sizes)).toBeLessThan(200_000);
  expect(Math.max(...sizes.slice(-3))).toBeGreaterThan(200_000);
});

test("after any other 4xx the client stops at once, without a retry", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1));
  for (const answer of [400, 401, 403, 404, 413, 415, 422]) {
    let tries = 0;
    await using proxy = await openMeddler(server.url, ({ method }) =>
      method === "PATCH" && ++tries ? { answer } : null,
    );
    const sent = await server.sendWith({ SERVER_URL: proxy.url }, file);
    expect({ answer, tries, code: sent.code }).toEqual({
      answer,
      tries: 1,
      code: answer === 401 || answer === 403 ? 2 : 3,
    });
    expect(sent.stdout).toStartWith("stopped: sent 0 events ");
  }
  expect(server.journal()).toEqual([]);
});

test("two clients that send copies of a file at once both end with 0, and every event counts once", async () => {
  await using server = await openServer();
  const lines = Array.from({ length: 45_000 }, (_, i) => line(`user${i}`, 1));
  const files = ["one", "two"].map((folder) => server.write(`${folder}/a.jsonl`, lines.join("")));
  await using proxy = await bothAtOnce(server.url);
  const sent = await Promise.all(
    files.map((file) => server.sendWith({ SERVER_URL: proxy.url }, file)),
  );
  expect(sent.map(({ code, stderr }) => ({ code, stderr }))).toEqual([
    { code: 0, stderr: "" },
    { code: 0, stderr: "" },
  ]);
  expect(server.journal().join("") === lines.join("")).toBe(true);
});

test("a file that another client has sent further, while it grew and this one asked, counts once", async () => {
  await using server = await openServer();
  const file = server.write("grows.jsonl", line("ann", 1));
  let hasGrown = false;
  await using between = Bun.serve({
    ...{ port: 0, hostname: "127.0.0.1" },
    async fetch(request) {
      const { pathname, search } = new URL(request.url);
      if (!hasGrown) {
        hasGrown = true;
        appendFileSync(file, line("ben", 2));
        expect(await server.send(file)).toMatchObject({ code: 0 });
      }
      return fetch(server.url + pathname + search, request);
    },
  });
  const sent = await run("client.ts", {
    args: [file],
    env: { SERVER_URL: `http://127.0.0.1:${between.port}` },
  });
  expect(sent).toMatchObject({ code: 0, stderr: "" });
  expect(server.journal()).toEqual([line("ann", 1), line("ben", 2)]);
});

test("two clients that send different files of one name at once send each of them whole", async () => {
  await using server = await openServer();
  const files = ["one", "two"].map((folder) =>
    server.write(`${folder}/a.jsonl`, line(folder, 1).repeat(15_000)),
  );
  await using proxy = await bothAtOnce(server.url);
  const sent = await Promise.all(
    files.map((file) => server.sendWith({ SERVER_URL: proxy.url }, file)),
  );
  expect(sent.map(({ code }) => code)).toEqual([0, 0]);
  expect(server.journal().toSorted().join("")).toBe(
    line("one", 1).repeat(15_000) + line("two", 1).repeat(15_000),
  );
});

test(
  "two clients that send one file at once: every event counts once, and each bad line is kept once",
  seeded(async (random) => {
    await using server = await openServer();
    const file = server.write("a.jsonl", "");
    const { good, bad } = writeEvents(file, LINES, random);
    await using slow = await openMeddler(server.url, () => ({ delayMs: 30 }));
    const send = () => server.sendWith({ SERVER_URL: slow.url }, file);
    const sent = await Promise.all([send(), send()]);
    expect(sent.map(({ code }) => code)).toEqual([1, 1]);
    expect(server.journal().join("") === good.join("")).toBe(true);
    expect(rejectedFaults(file, bad).slice(0, 3)).toEqual([]);
  }),
);

// The points at which it can die are tried one by one below and in tests/faults/process.test.ts.
longTest(
  "however often the client is killed, FILE.rejected.jsonl has each bad line once in the end",
  seeded(async (random) => {
    await using server = await openServer();
    const file = server.write("a.jsonl", "");
    const { good, bad } = writeEvents(file, LINES, random);
    for (let kill = 0; kill < 10; kill++) {
      const from = server.size();
      await using client = server.start(file);
      await until(() => server.size() > from || client.child.exitCode !== null);
      await Bun.sleep(random() * 15);
      client.kill("SIGKILL");
      await client.exit();
    }
    expect((await server.send(file)).code).toBe(1);
    expect(rejectedFaults(file, bad)).toEqual([]);
    expect(server.journal().join("") === good.join("")).toBe(true);
  }),
);

const MIB = 1024 * 1024;
const padded = (line: string) => `${line.padEnd(127)}\n`;

test.each([
  ["a chunk of exactly 1 MiB", `${padded("bad").repeat(8192)}${padded(line("a", 1).trim())}`, 0],
  [
    "a second chunk of exactly 1 MiB",
    `${padded(line("a", 1).trim()).repeat(8192)}${padded("bad").repeat(8192)}`,
    MIB,
  ],
  ["the first part of a line of 3 MB", `${"x".repeat(3_000_000)}\n${line("a", 1)}bad\n`, 0],
  [
    "the first part of a line of 3 MB behind other lines",
    `${line("a", 1)}bad\n${"x".repeat(3_000_000)}\nbad\n`,
    line("a", 1).length + 4,
  ],
])(
  "a client killed before it receives the answer to %s: each bad line is kept once",
  async (_, text, offset) => {
    await using server = await openServer();
    const file = server.write("a.jsonl", text);
    await using proxy = await openMeddler(server.url, ({ headers }) => {
      if (headers["upload-offset"] !== `${offset}`) return null;
      if (lost) client.kill("SIGKILL");
      lost = true;
      return "lose";
    });
    let lost = false;
    await using client = spawn("client.ts", { args: [file], env: { SERVER_URL: proxy.url } });
    expect(await client.exit()).toBeNull();
    expect((await server.send(file)).code).toBe(1);
    let at = 0;
    const lines = text.split("\n").map((line, i) => {
      const record = { line: i + 1, at, text: line.trim().slice(0, 4096) };
      at += line.length + 1;
      return record;
    });
    const bad = lines.filter(({ text }) => text && !text.startsWith("{"));
    expect(rejectedFaults(file, bad)).toEqual([]);
  },
);

test.if(process.platform === "linux")(
  "the client sends 240 MB with less than 160 MB of memory",
  async () => {
    using folder = tempDir();
    const path = folder.file("a.jsonl");
    const part = line("ann", 1, { note: "n".repeat(60_000) });
    const lines = Buffer.from(part.repeat(100));
    for (let i = 0; i < 40; i++) appendFileSync(path, lines);
    let maxKib = 0;
    const answer = onPatch(async (request) => {
      await request.bytes();
      const status = readFileSync(`/proc/${client.pid}/status`, "utf8");
      maxKib = Number(/VmHWM:\s+(\d+)/.exec(status)?.[1]);
      return Response.json({ accepted: 1, rejected: 0, errors: [], position: "x:1" });
    });
    await using server = standIn(answer);
    await using client = spawn("client.ts", { args: [path], env: { SERVER_URL: server.url } });
    expect(await client.exit()).toBe(0);
    expect(maxKib).toBeGreaterThan(0);
    expect(maxKib).toBeLessThan(160 * 1024);
  },
);

function rejected(file: string): unknown[] {
  const lines = readFileSync(`${file}.rejected.jsonl`, "utf8").trimEnd().split("\n");
  return lines.map((line) => JSON.parse(line));
}

/** A proxy to the server at `url` that holds back chunks until two clients have asked for the state. */
function bothAtOnce(url: string) {
  let asked = 0;
  return openMeddler(url, async ({ method }) => {
    if (method === "HEAD") asked++;
    else await until(() => asked >= 2);
    return null;
  });
}

/** A stand-in that knows no source, and gives this answer to chunks. */
function onPatch(answer: (request: Request) => Response | Promise<Response>) {
  return (request: Request) =>
    request.method === "HEAD" ? new Response(null, { status: 404 }) : answer(request);
}

type App = Awaited<ReturnType<typeof startApp>>;

const NO_DATABASE = "postgres://nobody@127.0.0.1:1/none";
let shared: Promise<{ app: App; dir: ReturnType<typeof tempDir> }> | null = null;
let views = 0;

/** One server for all tests that need no database: one server each took a third of their time. */
async function startShared() {
  const dir = tempDir();
  const args = ["--no-processor"];
  return { dir, app: await startApp({ dataDir: dir.path, databaseUrl: NO_DATABASE, args }) };
}

afterAll(async () => {
  const used = await shared?.catch(() => null);
  await used?.app[Symbol.asyncDispose]();
  used?.dir[Symbol.dispose]();
  shared = null;
});

/** The shared server, as if the test were alone with it. */
async function openServer() {
  const { app, dir } = await (shared ??= startShared());
  // A file has the name of its source, and the server never forgets a source.
  return viewOf(app.url, dir.path, tempDir(), `${++views}.`);
}

/** A server of the test's own. */
async function openOwnServer(databaseUrl?: string, settings: Record<string, string> = {}) {
  const folder = tempDir();
  const dataDir = folder.file("data");
  const args = databaseUrl ? [] : ["--no-processor"];
  const app = await startApp({
    ...{ dataDir, env: settings, args, databaseUrl: databaseUrl ?? NO_DATABASE },
  });
  const view = viewOf(app.url, dataDir, folder, "");
  return {
    ...view,
    async [Symbol.asyncDispose]() {
      await app[Symbol.asyncDispose]();
      view[Symbol.dispose]();
    },
  };
}

/**
 * What a server stores from now on, a folder for files whose names get this prefix, and the client to
 * send them.
 */
function viewOf(url: string, dataDir: string, folder: ReturnType<typeof tempDir>, prefix: string) {
  const journal = join(dataDir, "eventsPost.jsonl");
  const from = statSync(journal).size;
  const env = { SERVER_URL: url };
  return {
    url,
    folder: folder.path,
    write(name: string, content: string) {
      const path = folder.file(join(dirname(name), prefix + basename(name)));
      mkdirSync(dirname(path), { recursive: true });
      writeFileSync(path, content);
      return path;
    },
    send: (...args: string[]) => run("client.ts", { args, env }),
    sendWith: (other: Record<string, string>, ...args: string[]) =>
      run("client.ts", { args, env: { ...env, ...other } }),
    start: (...args: string[]) => spawn("client.ts", { args, env }),
    /** The event lines on the server's disk. */
    journal: () =>
      readFrom(journal, from)
        .split("\n")
        .filter((line) => line !== "" && !/^\{"(journal|frame|source)":/.test(line))
        .map((line) => `${line}\n`),
    /** The bytes of the journal. */
    size: () => statSync(journal).size,
    [Symbol.dispose]: () => folder[Symbol.dispose](),
  };
}

/** A file from `from` on: it may be long, and is read often. */
function readFrom(path: string, from: number): string {
  const file = openSync(path, "r");
  try {
    const bytes = Buffer.alloc(fstatSync(file).size - from);
    return bytes.toString("utf8", 0, readSync(file, bytes, 0, bytes.length, from));
  } finally {
    closeSync(file);
  }
}

/** A server with these answers; `send` sends it a file of this content. */
function standIn(fetch: (request: Request) => Response | Promise<Response>) {
  const server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch });
  const url = `http://127.0.0.1:${server.port}`;
  return {
    url,
    async send(content: string) {
      using folder = tempDir();
      const path = folder.file("a.jsonl");
      writeFileSync(path, content);
      return await run("client.ts", { args: [path], env: { SERVER_URL: url } });
    },
    [Symbol.asyncDispose]: () => server.stop(true),
  };
}

test("a proxy of the environment is not used for this machine, and is named where it is used", async () => {
  await using server = await openServer();
  const file = server.write("a.jsonl", line("ann", 1));
  const proxy = "http://user:pass@127.0.0.1:9";
  for (const name of ["http_proxy", "HTTP_PROXY"])
    for (const NO_PROXY of ["", "elsewhere.test"]) {
      const env = { SERVER_URL: server.url, [name]: proxy, NO_PROXY };
      expect((await run("client.ts", { args: [file], env })).code).toBe(0);
    }
  const SERVER_URL = "http://daybook.test:8000";
  const far = await run("client.ts", {
    args: [file, "--retry-for", "0"],
    env: { SERVER_URL, http_proxy: proxy },
  });
  expect(far.code).toBe(3);
  expect(far.stderr).toContain(
    `${SERVER_URL} (through the proxy 127.0.0.1:9 of http_proxy) does not answer: `,
  );
  expect(far.stderr + far.stdout).not.toContain("pass");
  const exempt = { SERVER_URL, http_proxy: proxy, no_proxy: ".test" };
  const direct = await run("client.ts", { args: [file, "--retry-for", "0"], env: exempt });
  expect(direct.stderr).toContain(`${SERVER_URL} does not answer: `);
});
