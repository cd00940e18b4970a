/** The attacks, each a row of the table. One throws if what it promises does not hold. */
import { createHash } from "node:crypto";
import { statSync, writeFileSync } from "node:fs";
import { connect as connectPlain, type Socket } from "node:net";
import { join } from "node:path";
import { connect as connectTls } from "node:tls";
import { gzipSync, zstdCompressSync } from "node:zlib";

import { openDatabase, type Sql } from "../../lib/ledger/database.ts";
import { ledgerUrl } from "../../lib/postgres/cluster.ts";
import { collidingIds, event, line } from "../support/events.ts";
import { root, run, SECRET, tempDir, until, untilBalance } from "../support/programs.ts";
import { fuzz } from "./fuzzer.ts";
import { peakMbOf, type Target } from "./target.ts";

export interface Row {
  name: string;
  /** Settings of a server of its own; else all rows share one. */
  env?: (folder: string) => Record<string, string>;
  maxMemoryMb?: number;
  maxDelayMs?: number;
  /** Returns what is worth noting in the table. */
  attack(target: Target, seed: number): Promise<string | void>;
}

const MIB = 1024 * 1024;
const BODY_BYTES = 16 * MIB;
const GZIP = { "content-encoding": "gzip" };

const LIST = `[${"0,".repeat(30_000)}0]`;

/** Bodies of 16 MiB, by what is in their lines. */
const BODIES: [string, string, Buffer][] = [
  ["not UTF-8", "201", filled("\xff\n")],
  ["not JSON", "201", filled("x\n")],
  ["no object", "201", filled("1\n")],
  ["no event", "201", filled("{}\n")],
  ["a bad field", "201", filled('{"id":0}\n')],
  ["no line at all", "201", Buffer.alloc(BODY_BYTES, "\n")],
  ["one line", "201", Buffer.alloc(BODY_BYTES, "x")],
  ["a long array", "201", filled(line("list", 1, { list: JSON.parse(LIST) }))],
  ["a long text", "201", filled(line("text", 1, { text: "\u0001\u{1f600}".repeat(6_000) }))],
  ["small fields", "201", filled(fieldsLine((i) => `"f${i}":${i}`))],
  ["one field again and again", "201", filled(fieldsLine(() => `"value":1`))],
  [
    "nested values",
    "201",
    filled(
      `{"userId":"n","name":"add_revenue","value":1,"v":[${'{"value":1},'.repeat(5_000)}0]}\n`,
    ),
  ],
  [
    "deep nesting",
    "201",
    filled(
      `{"userId":"deep","name":"add_revenue","value":1,"v":${"[".repeat(4_000)}${"]".repeat(4_000)}}\n`,
    ),
  ],
  [
    "deeper nesting",
    "201",
    filled(
      `{"userId":"deep","name":"add_revenue","value":1,"v":${"[".repeat(32_000)}${"]".repeat(32_000)}}\n`,
    ),
  ],
  [
    "long numbers",
    "201",
    filled(`{"userId":"long","name":"add_revenue","value":${"9".repeat(60_000)}}\n`),
  ],
  [
    "zeros before a digit",
    "201",
    filled(`{"userId":"long","name":"add_revenue","value":0.${"0".repeat(60_000)}1}\n`),
  ],
  [
    "large exponents",
    "201",
    filled(
      '{"userId":"e","name":"add_revenue","value":1e-999999999}\n{"userId":"e","name":"add_revenue","value":1E+99999999999999999999}\n',
    ),
  ],
  [
    "escapes",
    "201",
    filled(`{"userId":"${"\\u0041".repeat(256)}","name":"add_revenue","value":1}\n`),
  ],
  ["BOMs", "201", filled(`\ufeff${line("bom")}`)],
  ["users alike but for their end", "201", alikeUsers()],
];

export const ROWS: Row[] = [
  ...BODIES.map(([what, status, body]): Row => ({
    name: `a body of 16 MiB: ${what}`,
    async attack(target) {
      const packed = gzipSync(body);
      const hash = createHash("sha256").update(body).digest("hex");
      const path = `${target.url}/sources/${crypto.randomUUID()}?errors=0`;
      const headers = {
        ...{ authorization: SECRET, "content-type": "application/x-ndjson", ...GZIP },
        ...{ "upload-offset": "0", "source-digest": hash },
      };
      const [one, two, patched] = await Promise.all([
        target.send(packed, GZIP, "?errors=0"),
        target.send(packed, GZIP, "?errors=0"),
        fetch(path, { method: "PATCH", headers, body: packed }),
      ]);
      expectOneOf([one.status, two.status], [Number(status), 503]);
      expectOneOf([patched.status], [200, 503]);
      return `${packed.length} bytes sent`;
    },
  })),
  {
    name: "500 events of 60 KiB at once",
    async attack(target) {
      const text = fieldsLine(() => `"value":1`);
      const answers = await Promise.all(Array.from({ length: 500 }, () => target.post(text)));
      expectOneOf(
        answers.map(({ status }) => status),
        [201, 503],
      );
    },
  },
  {
    name: "bodies of 16 MB in chunks of one byte",
    env: () => ({}),
    maxMemoryMb: 200,
    async attack(target) {
      const send = async () => {
        const sender = await openSender(target, target.head("Transfer-Encoding: chunked"));
        await sender.repeat("1\r\n\n\r\n".repeat(10_000), 1_600);
        await until(() => sender.text() !== "" || sender.isClosed(), 60_000);
        sender.close();
        // Who goes on sending after the answer may be disconnected before having read it.
        return Number(sender.text().split(" ")[1] ?? 413);
      };
      expectOneOf(await Promise.all([send(), send(), send()]), [413]); // ten: 52 to 59 ms
    },
  },
  {
    name: "answers that nobody reads",
    async attack(target) {
      const body = gzipSync('{"id":0}\n'.repeat(20_000));
      const head = target.head(
        `Content-Encoding: gzip\r\nContent-Length: ${body.length}`,
        "/liveEvents?errors=20000",
      );
      await withSilent(target, 300, [head, body]);
    },
  },
  {
    name: "balances that nobody reads",
    async attack(target) {
      const users = Array.from({ length: 3_000 }, (_, i) => line("\u0001".repeat(200) + String(i)));
      await store(target, users.join(""));
      await target.settled();
      await withSilent(target, 1_500, [
        "GET /userEvents?limit=1000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
      ]);
    },
  },
  {
    name: "memory that is announced and not sent",
    async attack(target) {
      const sizes = [...Array(860).fill(65_000), ...Array(70).fill(4_000)];
      const senders = sizes.map((bytes: number) => {
        const connection = target.connect();
        connection.send(target.head(`Content-Length: ${bytes}`));
        return connection;
      });
      await Bun.sleep(500);
      for (let i = 0; i < 20; i++)
        expectOneOf(
          [(await target.post(event("honest", 1, { text: "x".repeat(60_000) }))).status],
          [201],
        );
      for (const sender of senders) sender[Symbol.dispose]();
    },
  },
  {
    name: "users whose ids collide",
    async attack(target) {
      const ids = collidingIds(100_000).map(String);
      const others = ids.map((id, i) => id.slice(0, -6) + String(i).padStart(6, "0"));
      const timeOf = async (users: string[]) => {
        const fromMs = performance.now();
        await store(target, users.map((user) => line(user)).join(""));
        await target.settled();
        return performance.now() - fromMs;
      };
      await timeOf(others.map((user) => `w${user}`)); // both find the same tables
      const otherMs = await timeOf(others);
      const collidingMs = await timeOf(ids);
      if (collidingMs > 2 * otherMs + 1_000)
        throw new Error(`${Math.round(collidingMs)} ms, others ${Math.round(otherMs)} ms`);
      return `${Math.round(collidingMs)} ms, others ${Math.round(otherMs)} ms`;
    },
  },
  {
    name: "conflicting ids",
    maxMemoryMb: 900, // most of it is the processor's
    async attack(target) {
      const run = crypto.randomUUID().slice(0, 8);
      const bodyOf = (value: number) =>
        Array.from({ length: 150_000 }, (_, i) => line("c", value, { id: `${run}${i}` })).join("");
      for (const value of [1, 2]) await store(target, bodyOf(value));
      await target.settled();
      return boundedTables(target, ["quarantine", "packed_quarantine"], 20);
    },
  },
  {
    name: "duplicates between fresh ids",
    maxMemoryMb: 900, // most of it is the processor's
    async attack(target) {
      const run = crypto.randomUUID().slice(0, 8);
      const known = line("d", 1, { id: run });
      const lines = Array.from(
        { length: 75_000 },
        (_, i) => line("d", 1, { id: `${run}${i}` }) + known,
      );
      await store(target, lines.join(""));
      await target.settled();
      return boundedTables(target, ["uncounted"], 10);
    },
  },
  {
    name: "quarantined lines that nobody reads",
    async attack(target) {
      const run = crypto.randomUUID().slice(0, 8);
      for (const value of [1, 2]) {
        const lines = Array.from({ length: 1_200 }, (_, i) =>
          line("q", value, { id: `${run}${i}`, text: "\u0001".repeat(500) }),
        );
        await store(target, lines.join(""));
      }
      await target.settled();
      await withSilent(target, 300, [
        "GET /quarantine?limit=1000 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
      ]);
    },
  },
  {
    name: "zstd of a million frames",
    async attack(target) {
      const frame = zstdCompressSync(Buffer.from("\n"));
      const count = Math.floor(BODY_BYTES / frame.length);
      const body = Buffer.concat(Array.from({ length: count }, () => frame));
      const answers = await Promise.all(
        [1, 2].map(() => target.send(body, { "content-encoding": "zstd" })),
      );
      expectOneOf(
        answers.map(({ status }) => status),
        [201, 503],
      );
      return `${count} frames`;
    },
  },
  {
    name: "decompression bombs",
    async attack(target) {
      const zeros = Buffer.alloc(1024 * MIB);
      const bombs: [string, Buffer][] = [
        ["gzip", gzipSync(zeros)],
        ["zstd", zstdCompressSync(zeros)],
      ];
      for (const [coding, bomb] of bombs) {
        const sending = Array.from({ length: 8 }, () =>
          target.send(bomb, { "content-encoding": coding }),
        );
        expectOneOf(
          (await Promise.all(sending)).map(({ status }) => status),
          [413, 503],
        );
      }
    },
  },
  {
    name: "a drip of one byte a second",
    async attack(target) {
      const connection = target.connect();
      connection.send(`${target.head("Transfer-Encoding: chunked")}1\r\n\n\r\n`);
      const fromMs = performance.now();
      while (!connection.isClosed() && performance.now() - fromMs < 100_000) {
        await Bun.sleep(1_000);
        connection.send("1\r\n\n\r\n");
      }
      if (!connection.text().startsWith("HTTP/1.1 408") || !connection.isClosed())
        throw new Error(`not closed after 100 s: ${connection.text()}`);
      return `closed after ${Math.round((performance.now() - fromMs) / 1000)} s`;
    },
  },
  {
    name: "a flood after a 401",
    async attack(target) {
      const head = target.head("Content-Length: 10000000000").replace(SECRET, "wrong");
      const sender = await openSender(target, head);
      const sent = await sender.repeat("x".repeat(MIB), 10_000);
      if (sent > 100 * MIB) throw new Error(`${sent} bytes were read`);
      return `${Math.round(sent / MIB)} MiB sent`;
    },
  },
  {
    name: "wrong credentials",
    async attack(target) {
      const guess = (i: number) => {
        const authorization = `Bearer guess-${i}.${"x".repeat(i % 3_000)}.x`;
        return fetch(`${target.url}/liveEvent`, { method: "POST", headers: { authorization } });
      };
      const answers = await Promise.all(Array.from({ length: 3_000 }, (_, i) => guess(i)));
      expectOneOf(
        answers.map(({ status }) => status),
        [401, 429],
      );
    },
  },
  {
    name: "half of a head on 2,000 connections",
    async attack(target) {
      await withSilent(target, 2_000, ["POST /liveEvents HTTP/1.1\r\nHost: 127.0.0.1\r\nX: y"]);
    },
  },
  {
    name: "heads of 100 fields",
    // Bun copies all fields of a head before one can be read: 43 µs for these, and 45 requests of each connection are
    // served in one turn.
    maxDelayMs: 250,
    async attack(target) {
      const fields = Array.from({ length: 95 }, (_, i) => `X-${i}: ${"v".repeat(100)}\r\n`).join(
        "",
      );
      await pipelined(target, `GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n${fields}\r\n`, 200);
      const large = target.connect();
      large.send(`GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ${"v".repeat(10 * MIB)}\r\n\r\n`);
      await until(() => large.text().startsWith("HTTP/1.1 431") || large.isClosed());
      large[Symbol.dispose]();
    },
  },
  {
    name: "HEAD again and again, pipelined",
    attack: (target) =>
      pipelined(target, "HEAD /userEvents/ann HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 1_000),
  },
  {
    name: "two Host headers",
    async attack(target) {
      for (const path of ["/healthz", "/liveEvent", "/nothing"]) {
        const connection = target.connect();
        connection.send(`GET ${path} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n`);
        await until(() => connection.text() !== "");
        if (!connection.text().startsWith("HTTP/1.1 400")) throw new Error(connection.text());
        connection[Symbol.dispose]();
      }
    },
  },
  {
    name: "odd paths, queries and ranges",
    async attack(target) {
      const paths = [
        ...[
          "/%",
          "/%ff",
          "/%00",
          "/..%2f..%2fetc/passwd",
          "/./healthz",
          "//healthz",
          "/healthz/",
          "/\\",
        ],
        ...[
          "/userEvents/%2e%2e",
          "/userEvents/%c0%ae",
          "/userEvents/%ed%a0%80",
          "/userEvents/a%2Fb",
        ],
        ...[
          "/userEvents?limit=0",
          "/userEvents?limit=1e3",
          "/userEvents?limit=9999999999999999999",
        ],
        ...[
          "/userEvents?cursor=%00",
          "/userEvents?cursor=" + "A".repeat(8_000),
          "/userEvents?order=x",
        ],
        ...[
          "/userEvents?user_id=a&user_id=b",
          "/userEvents?user_id=%00",
          "/userEvents?__proto__=1",
        ],
        ...[
          "/quarantine?cursor=AAAA",
          "/quarantine?limit=-1",
          "/revenue?from=x",
          "/revenue?from=-1&to=99999",
        ],
        ...[
          "/revenue?step=minute&from=0001-01-01&to=9999-12-31",
          "/revenue?from=+275760-09-13T00:00:00Z",
        ],
        ...["/userEvents/a?after=x", `/userEvents/a?after=${crypto.randomUUID()}:999999999999999`],
        ...[
          "/sources/%2e%2e",
          "/sources/" + "%41".repeat(2_000),
          "/openapi?x=<script>",
          "/page.js?x",
        ],
        ...["/metrics?" + "a&".repeat(4_000), "/live?" + "x".repeat(4_000), "/readyz?reads=%ff"],
      ];
      const headers = {
        ...{ range: "bytes=0-1,5-9,-1", "if-none-match": '"x"', "accept-encoding": "br;q=2,*;q=x" },
        ...{ accept: "text/csv;q=nan, application/x-ndjson;q=0", "x-request-id": "x".repeat(500) },
      };
      for (const path of paths)
        for (const method of ["GET", "HEAD", "PATCH", "DELETE", "OPTIONS", "PUT"]) {
          if (path.startsWith("/live?") && method === "GET") continue; // endless
          const init = {
            method,
            headers: method === "PATCH" ? { ...headers, authorization: SECRET } : headers,
          };
          const signal = AbortSignal.timeout(15_000);
          const asking = fetch(target.url + path, { ...init, signal });
          const answer = await asking
            .then(async (response) => {
              await response.bytes();
              return response;
            })
            .catch((error) => {
              throw new Error(`${method} ${path.slice(0, 100)}: ${error}`);
            });
          if (answer.status >= 500 && answer.status !== 504)
            throw new Error(`${method} ${path}: ${answer.status}`);
        }
    },
  },
  {
    name: "viewers of /live that never read",
    attack: (target) =>
      withSilent(target, 1_200, ["GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]),
  },
  {
    name: "5,000 waits for positions of other journals",
    async attack(target) {
      const waits = Array.from({ length: 5_000 }, () =>
        fetch(`${target.url}/userEvents/a?after=${crypto.randomUUID()}:1`).then(
          ({ status }) => status,
        ),
      );
      expectOneOf(await Promise.all(waits), [503, 504]);
    },
  },
  {
    name: "readers of CSV that stall",
    async attack(target) {
      const head = "GET /userEvents HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/csv\r\n\r\n";
      await withSilent(target, 300, [head]);
    },
  },
  {
    name: "readers that ask for everything at once",
    async attack(target) {
      const paths = [
        "/userEvents?limit=1000",
        "/userEvents?order=revenue&limit=1000",
        "/quarantine?limit=1000",
      ];
      const more = [
        "/revenue?step=minute",
        "/metrics",
        "/openapi",
        "/openapi/json",
        "/readyz?reads",
      ];
      const all = Array.from({ length: 40 }, () => [...paths, ...more]).flat();
      const answers = await Promise.all(
        all.map((path) =>
          fetch(target.url + path).then(async (answer) => (await answer.bytes(), answer.status)),
        ),
      );
      expectOneOf(answers, [200, 503]);
    },
  },
  {
    name: "the embedded Postgres",
    async attack(target) {
      const answer = await withLedger(target, async (sql) => {
        const [row] = await sql<{ rolsuper: boolean; listens: string }[]>`
          select rolsuper, current_setting('listen_addresses') as listens
          from pg_roles where rolname = current_user`;
        return row;
      });
      if (answer?.rolsuper !== false || answer.listens !== "")
        throw new Error(JSON.stringify(answer));
      const denied = await withLedger(
        target,
        (sql) => sql`copy (select 1) to program 'true'`,
      ).catch(String);
      if (!String(denied).includes("permission denied"))
        throw new Error(`copy to program: ${denied}`);
      const isRoot = process.getuid?.() === 0;
      for (const [path, isOurs] of [
        ["", true],
        ["postgres", true],
        ["postgres/cluster", !isRoot],
      ] as const) {
        const { mode, uid } = statSync(join(target.dataDir, path));
        if ((mode & 0o077) !== 0 || (uid === process.getuid?.()) !== isOurs)
          throw new Error(`${path}: mode ${mode.toString(8)}, owner ${uid}`);
      }
    },
  },
  {
    name: "EVENT_SCHEMA: uniqueItems and patterns",
    env(folder) {
      const properties = { list: { uniqueItems: true }, note: { pattern: "(.*)(.*)x$" } };
      writeFileSync(join(folder, "schema.json"), JSON.stringify({ properties }));
      return { EVENT_SCHEMA: join(folder, "schema.json") };
    },
    async attack(target) {
      const list = Array.from({ length: 9_000 }, (_, i) => [i]);
      const slow = [event("slow", 1, { note: "a".repeat(60_000) }), event("slow", 1, { list })];
      const bodies = slow.map((text) => gzipSync(`${text}\n`.repeat(200)));
      const attacking = Promise.all(bodies.map((body) => target.send(body, GZIP)));
      const user = crypto.randomUUID();
      let honest = 0;
      let isOver = false;
      attacking.finally(() => (isOver = true));
      const alone = await Promise.all(slow.map((text) => target.post(text)));
      expectOneOf(
        alone.map(({ status }) => status),
        [422],
      );
      for (; !isOver; honest++) expectOneOf([(await target.post(event(user))).status], [201]);
      expectOneOf(
        (await attacking).map(({ status }) => status),
        [201, 413],
      );
      await untilBalance(balanceOf(target), user, `${honest}`);
      return `${honest} honest events meanwhile`;
    },
  },
  {
    name: "HTTPS with short hosts",
    env(folder) {
      const [cert, key] = [join(folder, "cert.pem"), join(folder, "key.pem")];
      const made = Bun.spawnSync(
        `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=a
         -addext subjectAltName=IP:127.0.0.1 -keyout ${key} -out ${cert}`.split(/\s+/),
      );
      if (!made.success) throw new Error("openssl failed");
      return { TLS_CERT: cert, TLS_KEY: key };
    },
    async attack(target) {
      const statusOf = (path: string, ...hosts: string[]) =>
        new Promise<number>((resolve, reject) => {
          const port = Number(new URL(target.url).port);
          const socket = connectTls({ port, host: "127.0.0.1", rejectUnauthorized: false });
          const head = hosts.map((host) => `Host: ${host}\r\n`).join("");
          socket.write(`GET ${path} HTTP/1.1\r\n${head}Connection: close\r\n\r\n`);
          socket.on("data", (bytes) => resolve(Number(String(bytes).split(" ")[1])));
          socket.on("error", reject);
        });
      for (const host of ["x", "xy", "x.y", "a.example.com:1"]) {
        expectOneOf([await statusOf("/healthz", host)], [200]);
        expectOneOf([await statusOf("/q/healthz", host)], [404]);
      }
      expectOneOf([await statusOf("/healthz", "x", "y")], [400]);
    },
  },
  {
    name: "an issuer of keys that answers without end",
    env() {
      issuer ??= Bun.serve({
        ...{ port: 0, hostname: "127.0.0.1", idleTimeout: 60 },
        fetch: ({ url }) =>
          new URL(url).pathname === "/far"
            ? Response.json({ keys: [] })
            : asked++ % 2 === 0
              ? endless()
              : Response.redirect(new URL("/far", url).href, 302),
      });
      return { JWKS_URL: `${issuer.url}keys` };
    },
    async attack(target) {
      const token = (claims: string) =>
        [`{"alg":"RS256","kid":"${crypto.randomUUID()}"}`, claims, "x"]
          .map((part) => Buffer.from(part).toString("base64url"))
          .join(".");
      const claims = ['{"exp":1e999}', `{"exp":${Date.now()}}`, "{}", "[]", "null", "x"];
      for (let round = 0; round < 5; round++) {
        const answers = claims.map((claim) =>
          fetch(`${target.url}/liveEvent`, {
            method: "POST",
            headers: { authorization: `Bearer ${token(claim)}` },
          }),
        );
        expectOneOf(
          (await Promise.all(answers)).map(({ status }) => status),
          [401, 503],
        );
      }
    },
  },
  {
    name: "weak secrets",
    async attack(target) {
      const far = { HOST: "0.0.0.0", PORT: "0", DATA_DIR: target.folder.file("other") };
      for (const env of [
        far,
        { ...far, AUTH_SECRET: "short" },
        { ...far, AUTH_SECRET: "a-secret-of-more-than-16,short" },
        { JWT_SECRET: "x".repeat(31) },
        { JWT_SECRET: `${"x".repeat(31)}     ` },
        { AUTH_SECRET: "same-secret-in-both", READ_SECRET: "same-secret-in-both" },
        { JWKS_URL: "http://issuer.example/keys" },
      ]) {
        const { code, stderr } = await run("app.ts", { env });
        if (code !== 2) throw new Error(`${JSON.stringify(env)}: ${code} ${stderr}`);
      }
    },
  },
  {
    name: "a server that answers a client without end",
    async attack() {
      using folder = tempDir();
      const file = folder.file("a.jsonl");
      writeFileSync(file, line("ann").repeat(1_000));
      await using server = Bun.serve({
        port: 0,
        hostname: "127.0.0.1",
        fetch: ({ method }) =>
          method === "HEAD" ? new Response(null, { status: 404 }) : endless(),
      });
      const child = Bun.spawn([process.execPath, "run", join(root, "client.ts"), file], {
        env: { ...process.env, SERVER_URL: server.url.href },
        stdio: ["ignore", "ignore", "ignore"],
      });
      let mb = 0;
      while (child.exitCode === null) {
        mb = Math.max(mb, peakMbOf(child.pid));
        await Bun.sleep(5);
      }
      expectOneOf([child.exitCode], [3]);
      if (mb > 200) throw new Error(`the client took ${Math.round(mb)} MB`);
      return `client at most ${Math.round(mb)} MB`;
    },
  },
  { name: "fuzzed requests", env: () => ({}), attack: fuzz },
];

let issuer: Bun.Server<undefined> | null = null;
let asked = 0;

function endless(): Response {
  const piece = new Uint8Array(64 * 1024);
  return new Response(new ReadableStream({ pull: (controller) => controller.enqueue(piece) }));
}

function filled(text: string): Buffer {
  const bytes = Buffer.from(text, text.startsWith("\xff") ? "latin1" : "utf8");
  return Buffer.concat(Array.from({ length: Math.floor(BODY_BYTES / bytes.length) }, () => bytes));
}

/** One event of about 60 KiB, of small fields. */
function fieldsLine(field: (i: number) => string): string {
  const fields = Array.from({ length: 4_500 }, (_, i) => field(i));
  return `{"userId":"f","name":"add_revenue","value":1,${fields.join(",")}}\n`;
}

function alikeUsers(): Buffer {
  const lines: string[] = [];
  for (let i = 0, bytes = 0; bytes < BODY_BYTES - 400; i++) {
    lines.push(line("u".repeat(250) + i.toString(36).padStart(6, "0")));
    bytes += (lines.at(-1) as string).length;
  }
  return Buffer.from(lines.join(""));
}

function expectOneOf(found: readonly number[], wanted: readonly number[]): void {
  const wrong = found.filter((status) => !wanted.includes(status));
  if (wrong.length > 0)
    throw new Error(`found ${[...new Set(wrong)].join(", ")}, expected ${wanted.join(" or ")}`);
}

/** Sends a body as an honest sender does: again, while the server is busy with what came before. */
async function store(target: Target, text: string): Promise<void> {
  const body = gzipSync(text);
  const isStored = async () => {
    const { status } = await target.send(body, GZIP);
    expectOneOf([status], [201, 503]);
    return status === 201;
  };
  await until(isStored, 60_000);
}

function balanceOf(target: Target) {
  return {
    async balance(user: string) {
      const answer = await fetch(`${target.url}/userEvents/${user}`);
      return answer.status === 404 ? null : ((await answer.json()) as { revenue: string }).revenue;
    },
  };
}

/** A connection that sends and notes what is answered. */
async function openSender(target: Target, head: string) {
  let text = "";
  let isClosed = false;
  const socket = connectPlain(Number(new URL(target.url).port), "127.0.0.1");
  socket
    .on("data", (bytes) => (text += bytes))
    .on("error", () => {})
    .on("close", () => (isClosed = true));
  const write = async (bytes: string) => {
    await new Promise<void>((resolve) => socket.write(bytes, () => resolve()));
    if (socket.destroyed) await Bun.sleep(1); // or its "close" would never be heard
  };
  await write(head);
  return {
    write,
    /** Sends a piece again and again, until it is closed; returns how many bytes were sent. */
    async repeat(piece: string, times: number): Promise<number> {
      let sent = 0;
      for (let i = 0; i < times && !isClosed; i++) {
        await write(piece);
        sent += piece.length;
      }
      return sent;
    },
    text: () => text,
    isClosed: () => isClosed,
    close: () => socket.destroy(),
  };
}

/** Connections that send and never read, for some seconds. Meanwhile an honest event is stored and read. */
async function withSilent(
  target: Target,
  count: number,
  parts: (string | Uint8Array)[],
): Promise<void> {
  const port = Number(new URL(target.url).port);
  const sockets: Socket[] = [];
  for (let i = 0; i < count; i++) {
    const socket = connectPlain(port, "127.0.0.1"); // without a listener for data, nothing is read
    socket.on("error", () => {});
    for (const part of parts) socket.write(part);
    sockets.push(socket);
    if (i % 50 === 49) await Bun.sleep(20);
  }
  await Bun.sleep(3_000);
  const user = crypto.randomUUID();
  await until(async () => (await target.post(event(user))).status === 201, 30_000);
  await untilBalance(balanceOf(target), user, "1", 30_000);
  for (const socket of sockets) socket.destroy();
}

/** Sends a request many times at once on a few connections, and waits for all answers. */
async function pipelined(target: Target, request: string, count: number): Promise<void> {
  const connections = Array.from({ length: 20 }, () => target.connect());
  for (const connection of connections) connection.send(request.repeat(count));
  for (const connection of connections) {
    await until(
      () => connection.text().split("HTTP/1.1 ").length > count || connection.isClosed(),
      60_000,
    );
    if (/HTTP\/1\.1 5/.test(connection.text())) throw new Error("answered with a 5xx");
    connection[Symbol.dispose]();
  }
}

async function withLedger<T>(target: Target, work: (sql: Sql) => Promise<T>): Promise<T> {
  const database = openDatabase(ledgerUrl({ DATA_DIR: target.dataDir } as never), "test", 1);
  try {
    return await database.use(work);
  } finally {
    await database.close();
  }
}

/** How large these tables are. */
async function boundedTables(target: Target, tables: string[], maxMb: number): Promise<string> {
  const mb = await withLedger(target, async (sql) => {
    let bytes = 0;
    for (const table of tables) {
      const [row] = await sql<
        { bytes: string }[]
      >`select pg_total_relation_size(${table}::regclass) as bytes`;
      bytes += Number(row?.bytes);
    }
    return bytes / MIB;
  });
  if (mb > maxMb) throw new Error(`${tables.join(", ")}: ${mb.toFixed(1)} MB`);
  return `${mb.toFixed(1)} MB in Postgres`;
}
