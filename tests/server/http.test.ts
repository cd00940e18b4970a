/**
 * The HTTP contract of a real server: what each route accepts, what it rejects and how, and what is on
 * disk afterwards. The test reads the journal with its own parser.
 *
 * Every request carries MARKER in a header, and every rejected one also in its body. No failure may
 * show it, the secret or a stack.
 */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, statSync } from "node:fs";
import { connect } from "node:net";
import { constants, crc32, gzipSync, zstdCompressSync } from "node:zlib";

import { event } from "../support/events.ts";
import { connectTest, testDatabase } from "../support/postgres.ts";
import { closedPort, startApp, tempDir, until, untilBalance } from "../support/programs.ts";

const SECRET = "a-secret-of-this-test";
const MARKER = "zebra-quagga-okapi";
const KIB = 1024;
const MIB = 1024 * KIB;

type Bytes = Uint8Array<ArrayBuffer>;
interface Fault {
  path: string;
  message: string;
}
interface Sent {
  method?: string;
  headers?: Record<string, string>;
  body?: string | Bytes | ReadableStream;
}

setDefaultTimeout(20_000);

const dir = tempDir();
let database: Awaited<ReturnType<typeof testDatabase>>;
let app: Awaited<ReturnType<typeof startApp>>;

beforeAll(async () => {
  database = await testDatabase();
  const env = { AUTH_SECRET: SECRET };
  app = await startApp({ dataDir: dir.path, databaseUrl: database.url, env });
});

afterAll(async () => {
  await app?.[Symbol.asyncDispose]();
  await database?.drop();
  dir[Symbol.dispose]();
});

// Routes and methods

const ALLOWED: Record<string, string[]> = {
  "/liveEvent": ["POST"],
  "/liveEvents": ["POST"],
  "/userEvents": ["GET", "HEAD"],
  "/userEvents/somebody": ["GET", "HEAD"],
  "/userEvents/a%2Fb%20c": ["GET", "HEAD"],
  "/healthz": ["GET", "HEAD"],
  "/readyz": ["GET", "HEAD"],
  "/metrics": ["GET", "HEAD"],
  "/openapi": ["GET", "HEAD"],
  "/openapi/json": ["GET", "HEAD"],
  "/": ["GET", "HEAD"],
};

for (const [path, allowed] of Object.entries(ALLOWED))
  for (const method of ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    if (!allowed.includes(method))
      test(`${method} ${path} is answered 405 with the methods that it accepts`, async () => {
        const body = method === "GET" || method === "HEAD" ? {} : { body: MARKER };
        const response = await refused(path, { method, ...body }, 405);
        expect(response.headers.get("allow")?.split(/, */).sort()).toEqual(allowed);
      });

for (const path of [
  "/nothing",
  "/LiveEvent",
  "/liveEvent/more",
  "/liveEvents/more",
  "/userEvents/",
  "/userEvents/a/b",
  "/healthz/more",
  "/healthz/",
  "/liveEvent/",
  "/userEvents/a/",
  "/__proto__",
  "/constructor",
])
  for (const method of ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
    test(`${method} ${path} is answered 404`, () => refused(path, { method }, 404));

for (const path of ["/healthz", "/readyz", "/metrics", "/openapi", "/openapi/json"])
  test(`GET ${path} is answered 200 without a secret, and HEAD the same without a body`, async () => {
    const get = await send(path);
    const head = await send(path, { method: "HEAD" });
    expect([get.status, head.status]).toEqual([200, 200]);
    expect((await get.text()).length).toBeGreaterThan(0);
    expect(await head.text()).toBe("");
    expect(head.headers.get("content-type")).toBe(get.headers.get("content-type"));
  });

test("a host name of one letter works", async () => {
  const { port } = new URL(app.url);
  const answer = await new Promise<string>((resolve) => {
    const socket = connect(Number(port), "127.0.0.1", () =>
      socket.write("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"),
    );
    let text = "";
    socket.on("data", (bytes) => (text += bytes)).on("close", () => resolve(text));
  });
  expect(answer).toStartWith("HTTP/1.1 200 OK");
});

for (const user of [
  ".",
  "..",
  "a/b",
  "a&b=c#d?e+f g",
  "%2e%2e",
  "../..",
  "\\",
  "",
  "\u0000",
  "😀 😀",
])
  test(`GET /userEvents?user_id= answers the user ${JSON.stringify(user)} alone`, async () => {
    const path = `/userEvents?user_id=${encodeURIComponent(user)}`;
    const list = async () => {
      const response = await send(path);
      expect(response.status).toBe(200);
      return (await response.json()) as { users: object[]; next: null };
    };
    expect(await list()).toEqual({ users: [], next: null });
    if (user === "" || user === "\u0000") return;
    await take(event(user, 1.5));
    await take(event(`${user}x`, 3));
    await until(async () => (await list()).users.length > 0);
    expect(await list()).toEqual({ users: [{ user_id: user, revenue: "1.5" }], next: null });
    expect((await send(path, { method: "HEAD" })).status).toBe(200);
  });

test("HEAD of a balance has the headers of GET and no body", async () => {
  const user = newUser();
  await take(event(user, 3));
  await settles(user, "3");
  const head = await send(`/userEvents/${user}`, { method: "HEAD" });
  expect([head.status, await head.text()]).toEqual([200, ""]);
  await refused(`/userEvents/${newUser()}`, { method: "HEAD" }, 404);
});

test("the first line on stdout is the address", () => {
  const [first] = app.stdout.text().split("\n");
  expect(first).toMatch(/^listening on http:\/\/127\.0\.0\.1:[1-9]\d*$/);
});

test("/openapi is a page, and /openapi/json describes every route", async () => {
  expect((await send("/openapi")).headers.get("content-type")).toStartWith("text/html");
  const { openapi, paths } = (await (await send("/openapi/json")).json()) as {
    openapi: string;
    paths: Record<string, Record<string, unknown>>;
  };
  expect(openapi).toStartWith("3.");
  const listed = Object.entries(paths).map(([path, methods]) => [path, Object.keys(methods)]);
  expect(Object.fromEntries(listed)).toMatchObject({
    "/liveEvent": ["post"],
    "/liveEvents": ["post"],
    "/userEvents": ["get"],
    "/userEvents/{userid}": ["get"],
    "/healthz": ["get"],
    "/readyz": ["get"],
    "/metrics": ["get"],
  });
});

// Who may write

const WRITES = [
  { path: "/liveEvent", type: "application/json" },
  { path: "/liveEvents", type: "application/x-ndjson" },
];

for (const { path, type } of WRITES) {
  for (const authorization of [SECRET, `Bearer ${SECRET}`])
    test(`${path} accepts "${authorization}"`, async () => {
      const headers = { authorization, "content-type": type };
      const response = await send(path, { method: "POST", headers, body: event(newUser(), 1) });
      expect(response.status).toBe(201);
    });

  for (const authorization of [
    null,
    "",
    "Bearer",
    "secret",
    "Bearer secret",
    `Basic ${SECRET}`,
    `Bearer Bearer ${SECRET}`,
    SECRET.slice(0, -1),
    `${SECRET}x`,
    SECRET.toUpperCase(),
    `${SECRET},${SECRET}`,
    MARKER,
  ])
    test(`${path} answers 401 to ${JSON.stringify(authorization)}`, () => {
      const headers = {
        "content-type": type,
        ...(authorization === null ? {} : { authorization }),
      };
      return refused(path, { method: "POST", headers, body: event(MARKER, 1) }, 401);
    });

  test(`${path} answers 401 without a credential, whatever else is wrong`, async () => {
    const headers = { "content-type": `text/${MARKER}` };
    for (const body of ["", MARKER, event(MARKER, 1), new Uint8Array(100 * KIB)])
      await refused(path, { method: "POST", headers, body }, 401);
  });

  for (const parameter of ["; charset=utf-8", ";charset=UTF-8", '; charset="utf-8"'])
    test(`${path} accepts ${type}${parameter}`, async () => {
      const headers = { "content-type": type + parameter };
      expect((await write(path, event(newUser(), 1), headers)).status).toBe(201);
    });

  for (const wrong of ["text/plain", "application/xml", `${type}x`, `text/${MARKER}`, ""])
    test(`${path} answers 415 to Content-Type "${wrong}"`, () =>
      refusedWrite(path, event(MARKER, 1), 415, { "content-type": wrong }));

  test(`${path} answers 415 to an unknown Content-Encoding`, async () => {
    for (const coding of ["br", "deflate", "constructor", "__proto__", MARKER])
      await refusedWrite(path, event(MARKER, 1), 415, { "content-encoding": coding });
  });
}

test("/liveEvent rejects many events, and /liveEvents rejects application/json", async () => {
  const body = event(MARKER, 1);
  await refusedWrite("/liveEvent", body, 415, { "content-type": "application/x-ndjson" });
  await refusedWrite("/liveEvents", body, 415, { "content-type": "application/json" });
});

for (const query of ["note=1", `${MARKER}=1`, `errors=${MARKER}`, `a=${MARKER}&%zz&=`]) {
  test(`?${query} is echoed in no error`, async () => {
    const stranger = { method: "POST", headers: { authorization: MARKER }, body: MARKER };
    for (const { path } of WRITES) await refused(`${path}?${query}`, stranger, 401);
    await refused(`/liveEvent?${query}`, { method: "PUT" }, 405);
    await refused(`/healthz?${query}`, { method: "POST", body: MARKER }, 405);
    await refused(`/userEvents/${newUser()}?${query}`, {}, 404);
    await refused(`/nothing?${query}`, {}, 404);
    await refusedWrite(`/liveEvent?${query}`, MARKER, 400);
    await refusedWrite(`/liveEvents?${query}`, MARKER, [415, 422], { "content-type": MARKER });
  });
}

test("?errors= is a whole number, given once", async () => {
  for (const value of ["", "1e2", "-1", "20001", "1&errors=1"]) {
    const { errors } = await refusedWrite(`/liveEvents?errors=${value}`, event(MARKER, 1), 422);
    expect(errors).toMatchObject([{ path: "/errors" }]);
  }
});

test("an unknown query parameter is ignored", async () => {
  for (const { path, type } of WRITES) {
    const headers = { authorization: SECRET, "content-type": type };
    const sent = { method: "POST", headers, body: event(newUser(), 1) };
    expect((await send(`${path}?note=1`, sent)).status).toBe(201);
  }
  expect((await send("/healthz?note=1")).status).toBe(200);
});

// POST /liveEvent

test("an event is in the journal when it is answered 201", async () => {
  const user = newUser();
  const response = await write("/liveEvent", event(user, 98));
  const answer = (await response.json()) as { message: string; position: string };
  expect(journalLines(user)).toEqual([event(user, 98)]);
  expect(response.status).toBe(201);
  expect(answer).toEqual({ message: "Event sent to process", position: expect.any(String) });
  expect(answer.position).not.toBe("");
  await settles(user, "98");
});

test("other fields are stored digit by digit, and do not count", async () => {
  const user = newUser();
  const more =
    `"big":12345678901234567890,"small":1.10e-400,"id ":[0.1000, -0],"note":"\\u0000\\ud800é😀",` +
    `"nested":{"userId":"other","name":"x","value":5}`;
  const sent = `{"value":7,${more},"name":"subtract_revenue","userId":"${user}"}`;
  await take(sent);
  expect(journalLines(user)).toEqual([sent]);
  await settles(user, "-7");
});

test("an event on several lines becomes one line of the journal, its numbers as written", async () => {
  const user = newUser();
  const body = `\r\n{\n\t"userId": "${user}",\r\n  "name": "add_revenue",\n"value"\n:\n1.50e1,\n"at": 12345678901234567890\n}\n\n`;
  await take(body);
  const [line = "", ...others] = journalLines(user);
  expect(others).toEqual([]);
  expect(line.replace(/\s/g, "")).toBe(body.replace(/\s/g, ""));
  await settles(user, "15");
});

test("an event of 64 KiB is accepted, one byte more is answered 413", async () => {
  const user = newUser();
  await take(padded(user, 64 * KIB));
  await settles(user, "1");
  for (const bytes of [64 * KIB + 1, MIB, 17 * MIB]) {
    await refusedWrite("/liveEvent", padded(MARKER, bytes), 413);
    await refusedWrite("/liveEvent", chunked(padded(MARKER, bytes)), 413);
  }
});

test("an event of 64 KiB without Content-Length is accepted", async () => {
  const user = newUser();
  const response = await write("/liveEvent", chunked(padded(user, 64 * KIB)));
  expect(response.status).toBe(201);
  await settles(user, "1");
});

const NOT_JSON: [what: string, body: string | Bytes][] = [
  ["nothing", ""],
  ["white space", " \r\n\t"],
  ["words", MARKER],
  ["half an object", `{"userId":"${MARKER}","name":"add_revenue","value":`],
  ["a comma too many", `{"userId":"${MARKER}","name":"add_revenue","value":1,}`],
  ["single quotes", `{'userId':'${MARKER}','name':'add_revenue','value':1}`],
  ["a comment", `${event(MARKER, 1)} // ${MARKER}`],
  ["two events", `${event(MARKER, 1)}\n${event(MARKER, 1)}`],
  ["a raw newline in a string", event(MARKER, 1).replace(MARKER, `${MARKER}\n`)],
  ["a raw NUL in a string", event(MARKER, 1).replace(MARKER, `${MARKER}\0`)],
  ["a wrong escape", event(MARKER, 1).replace(MARKER, `${MARKER}\\x41`)],
  ["a byte that is not UTF-8", bytesOf(`{"${MARKER}":"`, [0xff], '"}')],
  [
    "an overlong sequence",
    bytesOf('{"userId":"', [0xc0, 0xaf], `${MARKER}","name":"add_revenue"}`),
  ],
  ["a surrogate in UTF-8", bytesOf(`{"${MARKER}":"`, [0xed, 0xa0, 0x80], '"}')],
  ["a cut character", bytesOf(event(MARKER, 1), [0xe2, 0x82])],
  ["UTF-16", new Uint8Array(Buffer.from(event(MARKER, 1), "utf16le"))],
  ["gzip that nobody announced", new Uint8Array(gzipSync(event(MARKER, 1)))],
  ...["01", "+1", ".5", "1.", "1e", "0x10", "NaN", "Infinity", "-", "1_000", "--1"].map(
    (number): [string, string] => [`the number ${number}`, event(MARKER, number)],
  ),
];
for (const [what, body] of NOT_JSON)
  test(`/liveEvent answers 400 to ${what}`, () => refusedWrite("/liveEvent", body, 400));

test("very deeply nested JSON is accepted or rejected, and affects no other request", async () => {
  const deep = `{"${MARKER}":${"[".repeat(30_000)}${"]".repeat(30_000)}}`;
  await problem(await write("/liveEvent", deep), [400, 422]);
  expect((await send("/healthz")).status).toBe(200);
});

// What an event is. The same rules hold for a line of /liveEvents.

const GOOD_USERS: [what: string, json: string][] = [
  ["one byte", '"u"'],
  ["256 bytes", `"${"x".repeat(256)}"`],
  ["256 bytes of two each", `"${"é".repeat(128)}"`],
  ["256 bytes of three each and one", `"${"€".repeat(85)}x"`],
  ["256 bytes of four each", `"${"😀".repeat(64)}"`],
  ["256 bytes, escaped to 1,536", `"${"\\u0061".repeat(256)}"`],
  ["__proto__", '"__proto__"'],
  ["constructor", '"constructor"'],
  ["toString", '"toString"'],
  ["an emoji", '"😀"'],
  ["an escaped pair of surrogates", '"\\ud83d\\ude80"'],
  ["an escaped newline", '"line\\nbreak\\r\\ttab"'],
  ["control characters", '"\\u0001\\u001f\\u007f"'],
  ["a space", '" "'],
  ["a slash", '"a/b//c/"'],
  ["percent signs", '"100%"'],
  ["what looks percent-encoded", '"%2F%zz%00"'],
  ["URL characters", '"?a=b&c#d;e+f"'],
  ["quotes and backslashes", '"\\"\\\\\'"'],
  ["an array of Postgres", '"{a,NULL,\\"b\\"}"'],
  ["SQL", `"'; drop table users_revenue; --"`],
  ["NULL", '"NULL"'],
  ["separators of lines", '"\\u2028\\u2029\\u0085"'],
  ["a byte order mark", '"\\ufeffx"'],
  ["decomposed letters", '"e\\u0301"'],
  ["composed letters", '"\\u00e9"'],
  ["a journal's header", '"{\\"frame\\":{\\"bytes\\":1}}"'],
];
for (const [what, json] of GOOD_USERS)
  test(`userId: ${what} is accepted on both routes and has a balance`, async () => {
    await take(written(json, 1));
    expect(await takeLines(written(json, "0.5"))).toMatchObject({ accepted: 1, rejected: 0 });
    const user = JSON.parse(json) as string;
    await settles(user, "1.5");
    const response = await send(`/userEvents/${encodeURIComponent(user)}`);
    expect(await response.json()).toEqual({ user_id: user, revenue: "1.5" });
    expect(response.headers.get("content-type")).toStartWith("application/json");
  });

const GOOD_VALUES: [written: string, balance: string][] = [
  ["98", "98"],
  ["-98", "-98"],
  ["0", "0"],
  ["-0", "0"],
  ["-0.0", "0"],
  ["1.5e3", "1500"],
  ["1.5E+3", "1500"],
  ["-25e-1", "-2.5"],
  ["1e14", "100000000000000"],
  ["1e-9", "0.000000001"],
  ["-0.000000001", "-0.000000001"],
  ["0.123456789", "0.123456789"],
  ["999999999999999", "999999999999999"],
  ["-999999999999999", "-999999999999999"],
  ["123456.123456789", "123456.123456789"],
  ["99999999999999.9", "99999999999999.9"],
  ["1.100", "1.1"],
  ["100", "100"],
  ["1.0", "1"],
  ["0.1000", "0.1"],
];
for (const [value, balance] of GOOD_VALUES)
  test(`value: ${value} is accepted on both routes and is ${balance}`, async () => {
    const [one, many, less] = [newUser(), newUser(), newUser()];
    await take(event(one, value));
    await takeLines(`${event(many, value)}\n${event(less, value, { name: "subtract_revenue" })}`);
    const negative = balance.startsWith("-") ? balance.slice(1) : `-${balance}`;
    await settles(one, balance);
    await settles(many, balance);
    await settles(less, balance === "0" ? "0" : negative);
  });

const u = JSON.stringify(MARKER);
const NO_EVENTS: [what: string, json: string, field: string][] = [
  ["userId: an empty string", written('""', 1), "userId"],
  ["userId: 257 bytes", written(`"${"x".repeat(257)}"`, 1), "userId"],
  ["userId: 257 bytes in 129 characters", written(`"${"é".repeat(128)}x"`, 1), "userId"],
  ["userId: 260 bytes of four each", written(`"${"😀".repeat(65)}"`, 1), "userId"],
  ["userId: NUL", written('"\\u0000"', 1), "userId"],
  ["userId: NUL inside", written(`"${MARKER}\\u0000b"`, 1), "userId"],
  ["userId: a lone high surrogate", written(`"${MARKER}\\ud800"`, 1), "userId"],
  ["userId: a lone low surrogate", written(`"\\udc00${MARKER}"`, 1), "userId"],
  ["userId: surrogates the wrong way round", written('"\\ude00\\ud83d"', 1), "userId"],
  ["userId: null", written("null", 1), "userId"],
  ["userId: a number", written("1", 1), "userId"],
  ["userId: a list", written(`["${MARKER}"]`, 1), "userId"],
  ["userId: missing", `{"name":"add_revenue","value":1,"x":${u}}`, "userId"],
  [
    "userId: only in __proto__",
    `{"__proto__":${event(MARKER, 1)},"name":"add_revenue","value":1}`,
    "userId",
  ],
  ["name: missing", `{"userId":${u},"value":1}`, "name"],
  ["name: null", `{"userId":${u},"name":null,"value":1}`, "name"],
  ...[
    "",
    "add",
    "Add_revenue",
    "add_revenue ",
    "add_revenue\\u0000",
    "__proto__",
    "constructor",
    MARKER,
  ].map((name): [string, string, string] => [
    `name: "${name}"`,
    event(MARKER, 1, { name }),
    "name",
  ]),
  ["value: missing", `{"userId":${u},"name":"add_revenue"}`, "value"],
  ["value: only in another field", `{"userId":${u},"name":"add_revenue","x":{"value":1}}`, "value"],
  ...[
    "1234567890123456",
    "1234567.123456789",
    "999999999999999.5",
    "1.000000000000000",
    "0.1234567891",
    "0.0000000001",
    "1e-10",
    "-1e-10",
    "1e-400",
    "1000000000000000",
    "1e15",
    "-1e15",
    "10e14",
    "1e400",
    "-1e400",
    "1e999999999999999999999",
    '"98"',
    `"${MARKER}"`,
    '""',
    "null",
    "true",
    "false",
    "[1]",
    "{}",
    '{"value":1}',
  ].map((value): [string, string, string] => [`value: ${value}`, event(MARKER, value), "value"]),
];
for (const [what, json, field] of NO_EVENTS) {
  test(`${what} is answered 422, naming ${field}`, async () => {
    const { errors } = await refusedWrite("/liveEvent", json, 422);
    expect(errors).toEqual([
      { path: expect.stringContaining(field), message: expect.stringMatching(/./) },
    ]);
  });
  test(`${what} is a bad line, naming ${field}`, async () => {
    const { accepted, rejected, errors } = await takeLines(json);
    expect({ accepted, rejected }).toEqual({ accepted: 0, rejected: 1 });
    expect(errors).toEqual([{ line: 1, message: expect.stringContaining(field) }]);
    expect(JSON.stringify(errors)).not.toContain(MARKER);
  });
}

for (const json of ["null", "true", "12", `"${MARKER}"`, "[]", `[${event(MARKER, 1)}]`, "{}"])
  test(`/liveEvent answers 422 to ${json}`, async () => {
    const { errors } = await refusedWrite("/liveEvent", json, 422);
    expect(errors.length).toBeGreaterThan(0);
  });

test("every fault of an event is listed", async () => {
  const body = `{"userId":1,"name":"${MARKER}","value":"1"}`;
  const { errors } = await refusedWrite("/liveEvent", body, 422);
  const paths = errors.map(({ path }) => path);
  expect(paths.sort().join()).toMatch(/name.*userId.*value/);
});

test("a line may have 64 KiB however it comes; only its LF or CRLF is not counted", async () => {
  const user = newUser();
  const [fits, blankFits] = [padded(user, 64 * KIB), `${padded(user, 64 * KIB - 1)} `];
  const [over, blankOver] = [padded(user, 64 * KIB + 1), `${padded(user, 64 * KIB)} `];
  for (const line of [fits, blankFits]) await take(line);
  await take(` ${padded(user, 64 * KIB - 1)}`);
  for (const line of [over, blankOver, ` ${fits}`]) await refusedWrite("/liveEvent", line, 413);
  const lines = [
    fits,
    over,
    `${fits}\r`,
    blankFits,
    blankOver,
    ` ${fits}`,
    `${fits}\r\r`,
    `${fits}\t\r`,
  ];
  const { accepted, errors } = await takeLines(`${lines.join("\n")}\n`);
  expect(accepted).toBe(3);
  expect(errors.map(({ line }) => line)).toEqual([2, 5, 6, 7, 8]);
  for (const { message } of errors) expect(message).toContain("65536 bytes");
  await settles(user, "6");
});

for (const bytes of [65_500, 64 * KIB])
  test(`an event of ${bytes} bytes with the longest Idempotency-Key is accepted and counts once`, async () => {
    const user = newUser();
    const key = `${user}${'"'.repeat(128 - user.length)}`;
    for (let again = 0; again < 2; again++)
      expect(
        (await write("/liveEvent", padded(user, bytes), { "idempotency-key": key })).status,
      ).toBe(201);
    await settles(user, "1");
  });

test("a value may be nested 4,499 deep", async () => {
  const user = newUser();
  const nested = (levels: number) =>
    event(user, 1).replace("}", `,"x":${"[".repeat(levels)}${"]".repeat(levels)}}`);
  await take(nested(4_499));
  expect(await takeLines(`${nested(4_499)}\n${nested(4_500)}\n`)).toMatchObject({
    accepted: 1,
    errors: [{ line: 2, message: expect.stringContaining("4499 levels") }],
  });
  await refusedWrite("/liveEvent", nested(4_500), 400);
  await settles(user, "2");
});

test("the faults of fields and of the Idempotency-Key are listed together", async () => {
  const body = '{"userId":"","name":"add_revenue","value":1e-10}';
  const headers = { "idempotency-key": "x".repeat(129) };
  const { errors } = await refusedWrite("/liveEvent", body, 422, headers);
  expect(errors.map(({ path }) => path)).toEqual(["/userId", "/value", "/id"]);
  const { errors: lines } = await takeLines(body);
  expect(lines[0]?.message).toMatch(/userId.*value/);
});

// POST /liveEvents

test("LF, CRLF, a BOM, blank lines and a last line without newline are fine", async () => {
  const user = newUser();
  const line = event(user, 1);
  const body = `\ufeff${line}\n\n${line}\r\n\r\n \t\n\n${line}\n\r\n  ${line}  \r\n${line}`;
  expect(await takeLines(body)).toEqual({
    accepted: 5,
    rejected: 0,
    errors: [],
    position: expect.any(String),
  });
  expect(journalLines(user)).toHaveLength(5);
  await settles(user, "5");
});

test("bad lines are listed by number and left out, good ones are stored", async () => {
  const user = newUser();
  const bad = newUser();
  const lines = [
    event(user, 1),
    bad,
    "",
    event(bad, "null"),
    `${event(user, 2)}\r`,
    `${event(bad, 1)}${event(bad, 1)}`,
    event(user, 4),
    written('""', 8),
  ];
  const { accepted, rejected, errors } = await takeLines(lines.join("\n"));
  expect({ accepted, rejected }).toEqual({ accepted: 3, rejected: 4 });
  expect(errors.map(({ line }) => line)).toEqual([2, 4, 6, 8]);
  for (const { message } of errors) expect(message).toMatch(/./);
  expect(JSON.stringify(errors)).not.toContain(bad);
  expect(journalLines(user)).toEqual([1, 2, 4].map((value) => event(user, value)));
  expect(journalLines(bad)).toEqual([]);
  await settles(user, "7");
});

test("a line that is not UTF-8 is a bad line", async () => {
  const user = newUser();
  const body = bytesOf(`${event(user, 1)}\n{"`, [0xff], `":1}\n${event(user, 2)}\n`);
  const { accepted, errors } = await takeLines(body);
  expect({ accepted, lines: errors.map(({ line }) => line) }).toEqual({ accepted: 2, lines: [2] });
  await settles(user, "3");
});

test("of more than 100 bad lines the first 100 are listed and all are counted", async () => {
  const user = newUser();
  const bad = Array.from({ length: 250 }, () => MARKER);
  const answer = await takeLines([event(user, 1), ...bad, event(user, 2)].join("\n"));
  expect(answer).toMatchObject({ accepted: 2, rejected: 250 });
  expect(answer.errors.map(({ line }) => line)).toEqual(
    Array.from({ length: 100 }, (_, i) => i + 2),
  );
  await settles(user, "3");
});

test("a body of only bad lines is answered 201 with 0 accepted", async () => {
  const before = journalBytes();
  expect(await takeLines(`${MARKER}\n{}\n`)).toMatchObject({ accepted: 0, rejected: 2 });
  expect(journalBytes()).toBe(before);
});

for (const body of ["", "\n", "\r\n \n\t\n", "\ufeff"])
  test(`a body of ${JSON.stringify(body)} has no lines`, async () => {
    const before = journalBytes();
    expect(await takeLines(body)).toMatchObject({ accepted: 0, rejected: 0, errors: [] });
    expect(journalBytes()).toBe(before);
  });

const CODINGS: [coding: string, compress: (body: string | Buffer) => Buffer][] = [
  ["gzip", gzipSync],
  // With a checksum, as the zstd program writes it; otherwise damage inside goes unnoticed.
  ["zstd", (body) => zstdCompressSync(body, { params: { [constants.ZSTD_c_checksumFlag]: 1 } })],
];
for (const [coding, compress] of CODINGS) {
  const headers = { "content-encoding": coding };
  const compressed = (body: string | Buffer): Bytes => new Uint8Array(compress(body));

  test(`${coding} is accepted, announced or chunked`, async () => {
    const user = newUser();
    const body = compressed(`${event(user, 1)}\n${MARKER}\n${event(user, 2)}`);
    expect(await takeLines(body, headers)).toMatchObject({ accepted: 2, rejected: 1 });
    expect(await takeLines(chunked(body), headers)).toMatchObject({ accepted: 2, rejected: 1 });
    await settles(user, "6");
  });

  test(`${coding} of several members is read whole`, async () => {
    const user = newUser();
    const members = [compress(`${event(user, 1)}\n`), compress(`${event(user, 2)}\n`)];
    const body = new Uint8Array(Buffer.concat(members));
    expect(await takeLines(body, headers)).toMatchObject({ accepted: 2, rejected: 0 });
    await settles(user, "3");
  });

  test(`broken ${coding} is answered 400, and nothing of it is stored`, async () => {
    const lines = Array.from({ length: 500 }, () => event(`${MARKER}${Math.random()}`, 1));
    const whole = compressed(`${lines.join("\n")}\n`);
    const damaged = whole.slice();
    damaged.fill(0xa5, whole.length / 2, whole.length / 2 + 40);
    const pieces = [whole.subarray(0, -1), whole.subarray(0, whole.length / 2), whole.slice(0, 3)];
    const apart = new Uint8Array(Buffer.concat([whole, Buffer.alloc(9), whole]));
    for (const body of [...pieces, damaged, apart, MARKER, new Uint8Array(64)])
      await refusedWrite("/liveEvents", body, 400, headers);
  });

  test(`${coding} of 16 MiB is accepted, one byte more is answered 413`, async () => {
    const user = newUser();
    const body = compressed(spaced(event(user, 1), 16 * MIB));
    expect(await takeLines(body, headers)).toMatchObject({ accepted: 1, rejected: 0 });
    const more = compressed(spaced(event(MARKER, 1), 16 * MIB + 1));
    await refusedWrite("/liveEvents", more, 413, headers);
  });

  test(`a decompression bomb of ${coding} is answered 413`, async () => {
    await refusedWrite("/liveEvents", compressed(Buffer.alloc(64 * MIB, 32)), 413, headers);
  });
}

test("the limit of 16 MiB holds after decompression, even where gzip made the body larger", async () => {
  const user = newUser();
  const body = new Uint8Array(gzipSync(spaced(event(user, 1), 16 * MIB), { level: 0 }));
  expect(body.length).toBeGreaterThan(16 * MIB);
  expect(await takeLines(body, { "content-encoding": "gzip" })).toMatchObject({ accepted: 1 });
});

test("a body of 16 MiB is accepted; of one byte more nothing is stored, and it is answered 413", async () => {
  const user = newUser();
  for (const body of [spaced(event(user, 1), 16 * MIB), chunked(spaced(event(user, 2), 16 * MIB))])
    expect(await takeLines(body)).toMatchObject({ accepted: 1, rejected: 0 });
  await settles(user, "3");
  const over = spaced(`${event(MARKER, 1)}\n`, 16 * MIB + 1);
  await refusedWrite("/liveEvents", over, 413);
  await refusedWrite("/liveEvents", chunked(over), 413);
});

// GET /userEvents/:userid

test("balances are exact and have no trailing zeros", async () => {
  const sums: [values: string[], balance: string][] = [
    [["0.1", "0.2"], "0.3"],
    [["1.25", "1.75"], "3"],
    [["0.30", "-0.1", "-0.2"], "0"],
    [["5", "-7.50"], "-2.5"],
    [["90", "10"], "100"],
    [["999999999999999", "999999999999999", "0.000000001"], "1999999999999998.000000001"],
    [Array.from({ length: 1000 }, () => "0.1"), "100"],
  ];
  const users = sums.map(() => newUser());
  const lines = sums.flatMap(([values], i) => values.map((value) => event(users[i] ?? "", value)));
  await takeLines(lines.join("\n"));
  for (const [i, [, balance]] of sums.entries()) await settles(users[i] ?? "", balance);
});

test("subtract_revenue subtracts, even below zero", async () => {
  const user = newUser();
  await take(event(user, "1.5"));
  await take(event(user, "4", { name: "subtract_revenue" }));
  await take(event(user, "-0.25", { name: "subtract_revenue" }));
  await settles(user, "-2.25");
});

for (const path of [
  "nobody",
  "%00",
  "a%00b",
  "%F0%9F%98%B6",
  "x".repeat(300),
  "%2F",
  "%0A",
  "%ED%A0%80",
])
  test(`the balance of ${path.slice(0, 20)}, never posted, is answered 404`, () =>
    refused(`/userEvents/${path}`, {}, 404));

for (const path of ["%zz", "%", "%E2%82", "%FF"])
  test(`the path /userEvents/${path} is a client error, not a server error`, () =>
    refused(`/userEvents/${path}`, {}, [400, 404]));

test("a user whose events were all rejected has no balance", async () => {
  const user = newUser();
  await write("/liveEvent", event(user, "1e15"));
  await takeLines(event(user, "null"));
  const other = newUser();
  await take(event(other, 1));
  await settles(other, "1");
  await refused(`/userEvents/${user}`, {}, 404);
});

// The journal on the disk

test("every accepted event is in the journal once, in whole frames", async () => {
  const [ones, manys] = [200, 20].map((length) => Array.from({ length }, () => newUser()));
  await Promise.all([
    ...ones!.map((user) => take(event(user, 1))),
    ...manys!.map((user) => takeLines(`${event(user, 1)}\n${MARKER}\n${event(user, 2)}\r\n`)),
  ]);
  const counts = new Map<string, number>();
  for (const line of readJournal(dir.file("eventsPost.jsonl")).lines)
    counts.set(line, (counts.get(line) ?? 0) + 1);
  for (const user of ones!) expect(counts.get(event(user, 1))).toBe(1);
  for (const user of manys!)
    expect([counts.get(event(user, 1)), counts.get(event(user, 2))]).toEqual([1, 1]);
});

test("a keep-alive connection works after each kind of error", async () => {
  const statuses: number[] = [];
  for (const body of ["", "{}", event(newUser(), 1), padded(MARKER, 70 * KIB), event(newUser(), 1)])
    statuses.push((await write("/liveEvent", body)).status);
  expect(statuses).toEqual([400, 422, 201, 413, 201]);
});

// The stop, and database outages

test("SIGTERM under load: exit code 0, and each 201 is in the journal once", async () => {
  using dir = tempDir();
  await using app = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  const answered: string[] = [];
  let going = true;
  const writers = Array.from({ length: 30 }, async () => {
    for (; going;) {
      const line = event(newUser(), 1);
      const status = await app.post(line).then(
        (response) => response.status,
        () => 0,
      );
      if (status === 201) answered.push(line);
      going &&= status === 201;
    }
  });
  await until(() => answered.length > 300);
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  going = false;
  await Promise.all(writers);
  const { lines } = readJournal(dir.file("eventsPost.jsonl"));
  expect(new Set(lines).size).toBe(lines.length);
  expect(answered.filter((line) => !lines.includes(line))).toEqual([]);
  expect(app.stderr.text()).not.toMatch(/^\s+at /m);
});

test("SIGTERM while one body is half sent and other connections are idle: exit code 0", async () => {
  using dir = tempDir();
  await using app = await startApp({ dataDir: dir.path, databaseUrl: database.url });
  const { hostname, port } = new URL(app.url);
  const open = () => Bun.connect({ hostname, port: Number(port), socket: { data() {} } });
  const [slow, idle] = [await open(), await open()];
  slow.write("POST /liveEvent HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: secret\r\n");
  slow.write("content-type: application/json\r\ncontent-length: 100\r\n\r\n{");
  slow.flush();
  await app.post(event(newUser(), 1));
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  for (const socket of [slow, idle]) socket.end();
});

test("while the database is down, events are accepted and balances are answered 503", async () => {
  using dir = tempDir();
  const databaseUrl = `postgres://daybook:${MARKER}@127.0.0.1:${await closedPort()}/daybook`;
  await using app = await startApp({ dataDir: dir.path, databaseUrl });
  const user = newUser();
  expect((await app.post(event(user, 1))).status).toBe(201);
  expect((await app.postLines(event(user, 2))).status).toBe(201);
  expect(readJournal(dir.file("eventsPost.jsonl")).lines).toHaveLength(2);

  for (const path of [`/userEvents/${user}`, "/readyz?reads"]) {
    const response = await fetch(app.url + path);
    expect(response.headers.get("retry-after")).toMatch(/^\d+$/);
    expect((await problem(response, [503])).detail).toContain("database");
  }
  // A load balancer that asks must go on sending events.
  const ready = await fetch(`${app.url}/readyz`);
  expect({ status: ready.status, body: await ready.json() }).toMatchObject({
    status: 200,
    body: { status: "ready", reads: "unavailable" },
  });
  expect((await fetch(`${app.url}/healthz`)).status).toBe(200);
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  expect(app.stdout.text() + app.stderr.text()).not.toContain(MARKER);
});

test("a database that accepts connections and never answers holds up no probe about writes", async () => {
  using silent = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  using dir = tempDir();
  const databaseUrl = `postgres://daybook@127.0.0.1:${silent.port}/daybook`;
  await using app = await startApp({ dataDir: dir.path, databaseUrl });
  const [first, body] = await Promise.race([
    fetch(`${app.url}/readyz`).then(async (ready) => ["writes", await ready.json()] as const),
    fetch(`${app.url}/readyz?reads`).then(async (ready) => ["reads", await ready.json()] as const),
  ]);
  expect(first).toBe("writes");
  expect(body).toMatchObject({ status: "ready", reads: "unavailable" });
});

test("when the database returns, posting catches up by itself", async () => {
  using dir = tempDir();
  await using own = await testDatabase();
  const port = await closedPort();
  const databaseUrl = new URL(own.url);
  const { hostname, port: realPort } = databaseUrl;
  databaseUrl.hostname = "127.0.0.1";
  databaseUrl.port = String(port);
  await using app = await startApp({ dataDir: dir.path, databaseUrl: databaseUrl.href });
  const user = newUser();
  expect((await app.post(event(user, 4))).status).toBe(201);
  expect((await fetch(`${app.url}/readyz?reads`)).status).toBe(503);

  using _ = forward(port, hostname, Number(realPort || 5432));
  await until(async () => (await fetch(`${app.url}/readyz?reads`)).status === 200);
  await until(() =>
    app.balance(user).then(
      (balance) => balance === "4",
      () => false,
    ),
  );
  await using sql = connectTest(own.url);
  expect(await sql`select revenue::text from users_revenue`).toHaveLength(1);
});

// Helpers

/** A user that no other test uses. */
function newUser(): string {
  return `user-${crypto.randomUUID()}`;
}

/** An event whose user is already written as JSON. */
function written(user: string, value: number | string): string {
  return `{"userId":${user},"name":"add_revenue","value":${value}}`;
}

/** An event of `user` with exactly that many bytes. */
function padded(user: string, bytes: number): string {
  const bare = event(user, 1).replace(/}$/, `,"pad":""}`);
  return bare.replace(/""}$/, `"${"x".repeat(bytes - bare.length)}"}`);
}

/** `line` and blank lines behind it. */
function spaced(line: string, bytes: number): Buffer<ArrayBuffer> {
  const body = Buffer.alloc(bytes, "\n");
  body.write(line);
  return body;
}

function bytesOf(...parts: (string | number[])[]): Bytes {
  return new Uint8Array(Buffer.concat(parts.map((part) => Buffer.from(part as string))));
}

/** The same body in pieces, without a Content-Length. */
function chunked(body: string | Bytes): ReadableStream {
  const bytes = typeof body === "string" ? new TextEncoder().encode(body) : body;
  let at = 0;
  return new ReadableStream({
    pull(controller) {
      if (at >= bytes.length) return controller.close();
      controller.enqueue(bytes.slice(at, (at += 64 * KIB)));
    },
  });
}

function send(path: string, { method = "GET", headers = {}, body }: Sent = {}): Promise<Response> {
  return fetch(app.url + path, {
    method,
    headers: { "x-note": MARKER, ...headers },
    ...(body === undefined ? {} : { body }),
  });
}

/** POST with the secret and the Content-Type that the route requires. */
function write(path: string, body: Sent["body"], headers: Record<string, string> = {}) {
  return send(path, writing(path, body, headers));
}

function writing(path: string, body: Sent["body"], headers: Record<string, string>): Sent {
  const type = WRITES.find((route) => route.path === path.split("?")[0])?.type ?? "";
  const all = { authorization: SECRET, "content-type": type, ...headers };
  return { method: "POST", headers: all, ...(body === undefined ? {} : { body }) };
}

async function take(body: string): Promise<void> {
  const response = await write("/liveEvent", body);
  expect([response.status, await response.text()]).toEqual([201, expect.any(String)]);
}

async function takeLines(body: Sent["body"], headers = {}) {
  const response = await write("/liveEvents", body, headers);
  expect(response.status).toBe(201);
  return (await response.json()) as {
    accepted: number;
    rejected: number;
    errors: { line: number; message: string }[];
    position: string;
  };
}

/** The request is answered `status` with a problem document, and nothing is journaled. */
async function refused(path: string, sent: Sent, status: number | number[]) {
  const before = journalBytes();
  const response = await send(path, sent);
  const statuses = [status].flat();
  const errors = sent.method === "HEAD" ? [] : (await problem(response, statuses)).errors;
  if (sent.method === "HEAD") {
    expect(statuses).toContain(response.status);
    expect(await response.text()).toBe("");
  }
  expect(journalBytes()).toBe(before);
  return { headers: response.headers, errors };
}

function refusedWrite(
  path: string,
  body: Sent["body"],
  status: number | number[],
  headers: Record<string, string> = {},
) {
  return refused(path, writing(path, body, headers), status);
}

/** The problem document (RFC 9457) of a failure; checks that it shows nothing of the request. */
async function problem(response: Response, statuses: number[]) {
  const text = await response.text();
  expect(statuses, text).toContain(response.status);
  expect(response.headers.get("content-type")).toStartWith("application/problem+json");
  const document = JSON.parse(text) as Record<string, unknown>;
  expect(document["status"]).toBe(response.status);
  for (const field of ["type", "title", "detail"]) expect(document[field]).toMatch(/./);
  expect("errors" in document).toBe(response.status === 422);
  const shown = text + JSON.stringify([...response.headers]);
  for (const hidden of [MARKER, SECRET, import.meta.dir, "node_modules"])
    expect(shown).not.toContain(hidden);
  expect(text).not.toMatch(/\bat .*[:(]\d|\.ts\b/);
  return { detail: String(document["detail"]), errors: (document["errors"] ?? []) as Fault[] };
}

/** Waits until the balance is `wanted`. */
function settles(user: string, wanted: string): Promise<void> {
  return untilBalance(app, user, wanted, 5_000);
}

function journalBytes(): number {
  return statSync(dir.file("eventsPost.jsonl")).size;
}

/** The lines of the journal that hold `text`. */
function journalLines(text: string): string[] {
  return readJournal(dir.file("eventsPost.jsonl")).lines.filter((line) => line.includes(text));
}

/** Reads a journal as its format is documented; throws where it deviates. */
function readJournal(path: string): { id: string; lines: string[] } {
  const bytes = readFileSync(path);
  let at = 0;
  const header = nextLine() as { journal: string; base: number; version: number };
  if (header.base !== 0 || header.version !== 1) throw new Error("no header of a journal");
  const lines: string[] = [];
  while (at < bytes.length) {
    const { frame } = nextLine() as { frame: { bytes: number; crc32: string; at: number } };
    const payload = bytes.subarray(at, (at += frame.bytes));
    if (payload.length !== frame.bytes) throw new Error(`a frame is cut short at ${at}`);
    if (crc32(payload).toString(16).padStart(8, "0") !== frame.crc32)
      throw new Error(`a frame's checksum does not fit before ${at}`);
    if (!(frame.at > 1.7e12)) throw new Error(`a frame without its time before ${at}`);
    if (payload.at(-1) !== 10) throw new Error(`a frame without a last newline before ${at}`);
    lines.push(...payload.toString().slice(0, -1).split("\n"));
  }
  return { id: header.journal, lines };

  function nextLine(): unknown {
    const end = bytes.indexOf(10, at);
    const line = bytes.toString("utf8", at, end);
    at = end + 1;
    return JSON.parse(line);
  }
}

/** A proxy to `port`. */
function forward(port: number, hostname: string, toPort: number) {
  type Socket = Bun.Socket<{ other: Promise<Socket> }>;
  const socket = {
    data: async (from: Socket, bytes: Buffer) => void (await from.data.other).write(bytes.slice()),
    close: async (from: Socket) => void (await from.data.other).end(),
  };
  const listener = Bun.listen<{ other: Promise<Socket> }>({
    hostname: "127.0.0.1",
    port,
    socket: {
      ...socket,
      open(from) {
        const data = { other: Promise.resolve(from) };
        from.data = { other: Bun.connect({ hostname, port: toPort, data, socket }) };
      },
    },
  });
  return { [Symbol.dispose]: () => listener.stop(true) };
}
