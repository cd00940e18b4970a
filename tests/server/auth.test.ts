/**
 * Authorization: every kind of route with every kind of credential, on servers that accept secrets,
 * tokens signed with a secret, and tokens signed with keys that this test serves.
 */
import { createHmac } from "node:crypto";

import { afterAll, beforeAll, expect, setDefaultTimeout, setSystemTime, test } from "bun:test";

import { exportJWK, generateKeyPair, type JWTPayload, SignJWT, UnsecuredJWT } from "jose";

import { openThrottle } from "../../lib/server/throttle.ts";
import { InvalidToken, KeysUnavailable, openTokens } from "../../lib/server/token.ts";
import { event } from "../support/events.ts";
import { connectTest, testDatabase } from "../support/postgres.ts";
import { run, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(30_000);

const OLD = "old-secret-of-a-writer";
const NEW = "new-secret-of-a-writer";
const READER = "secret-of-a-dashboard";
const SOON_S = Math.floor(Date.now() / 1000) + 3600;
const JWT_SECRET = "a-secret-that-signs-tokens-and-is-long-enough";
const ISSUER = { JWT_ISSUER: "https://issuer.test/", JWT_AUDIENCE: "daybook" };
const GOOD = { iss: ISSUER.JWT_ISSUER, aud: ISSUER.JWT_AUDIENCE };

/** Presented keys by the names of algorithms, and the issuer that serves their public halves. */
const keys = await Promise.all(
  ["RS256", "ES256", "EdDSA", "ES256"].map(async (alg, i) => {
    const pair = await generateKeyPair(alg, { extractable: true });
    const kid = `${alg}-${i}`;
    return { alg, kid, ...pair, jwk: { ...(await exportJWK(pair.publicKey)), kid, alg } };
  }),
);
const [rsa, ec, ed, late] = keys as [Key, Key, Key, Key];
type Key = (typeof keys)[number];
const issuer = { served: [rsa, ec, ed], asked: 0 };
const jwks = Bun.serve({
  port: 0,
  hostname: "127.0.0.1",
  fetch() {
    issuer.asked++;
    return Response.json({ keys: issuer.served.map(({ jwk }) => jwk) });
  },
});

interface Signed {
  alg?: string;
  kid?: string;
  expires?: string | null;
}

function sign(claims: JWTPayload, key: CryptoKey | string, options: Signed = {}): Promise<string> {
  const { alg = "HS256", kid, expires = "1h" } = options;
  const token = new SignJWT(claims).setProtectedHeader({ alg, ...(kid ? { kid } : {}) });
  if (expires) token.setExpirationTime(expires);
  return token.sign(typeof key === "string" ? new TextEncoder().encode(key) : key);
}

const signWith = ({ alg, kid, privateKey }: Key, claims: JWTPayload, expires?: string) =>
  sign({ ...GOOD, ...claims }, privateKey, { alg, kid, ...(expires ? { expires } : {}) });

const both = { scope: "events:write balances:read" };
const unsigned = new UnsecuredJWT({ ...GOOD, ...both }).setExpirationTime("1h").encode();

const databaseOf = await testDatabase();
const folders = [tempDir(), tempDir(), tempDir(), tempDir()] as const;
type App = Awaited<ReturnType<typeof startApp>>;
let open: App, keyed: App, secretly: App, outside: App;

beforeAll(async () => {
  const start = (folder: number, env: Record<string, string>) =>
    startApp({
      dataDir: folders[folder]!.path,
      databaseUrl: databaseOf.url,
      args: ["--no-processor"],
      env: { AUTH_SECRET: `${OLD},${NEW}`, ...env },
    });
  [open, keyed, secretly, outside] = await Promise.all([
    start(0, {}),
    start(1, { READ_SECRET: READER, JWKS_URL: jwks.url.href, ...ISSUER }),
    start(2, { READ_SECRET: `other,${READER}`, JWT_SECRET, ...ISSUER }),
    start(3, { HOST: "0.0.0.0" }),
  ]);
  await fetch(`${open.url}/readyz?reads`); // creates the tables
  await using sql = connectTest(databaseOf.url);
  await sql`insert into users_revenue values ('ann', 1), ('ben', 2)`;
});

afterAll(async () => {
  await Promise.all([open, keyed, secretly, outside].map((app) => app?.[Symbol.asyncDispose]()));
  await databaseOf.drop();
  for (const folder of folders) folder[Symbol.dispose]();
  jwks.stop(true);
});

const EVENT = event("ann");
const SHA256 = new Bun.CryptoHasher("sha256").update(`${EVENT}\n`).digest("hex");
const json = { "content-type": "application/json" };
const ndjson = { "content-type": "application/x-ndjson" };

/** A route of each kind: the request, and the status for a caller who may make it. */
const ROUTES: Record<"write" | "ann" | "other" | "open", [RequestInit, () => string, number][]> = {
  write: [
    [{ method: "POST", headers: json, body: EVENT }, () => "/liveEvent", 201],
    [{ method: "POST", headers: ndjson, body: EVENT }, () => "/liveEvents", 201],
    [{ method: "HEAD" }, () => "/sources/never", 404],
    [
      {
        method: "PATCH",
        headers: { ...ndjson, "upload-offset": "0", "source-digest": SHA256 },
        body: `${EVENT}\n`,
      },
      () => `/sources/${crypto.randomUUID()}`,
      200,
    ],
  ],
  ann: [
    [{}, () => "/userEvents/ann", 200],
    [{ method: "HEAD" }, () => "/userEvents/ann", 200],
    [{}, () => "/userEvents?user_id=ann", 200],
  ],
  other: [
    [{}, () => "/userEvents/ben", 200],
    [{}, () => "/userEvents/ben?user_id=ann", 200],
    [{}, () => "/userEvents?user_id=ben", 200],
    [{}, () => "/userEvents", 200],
    [{ headers: { accept: "text/csv" } }, () => "/userEvents", 200],
    [{}, () => "/revenue", 200],
    [{}, () => "/metrics", 200],
    [{}, () => "/metrics?user_id=ann", 200],
  ],
  open: [
    [{}, () => "/healthz", 200],
    [{}, () => "/readyz", 200],
    [{}, () => "/openapi", 200],
    [{}, () => "/openapi/json", 200],
    [{}, () => "/nowhere", 404],
  ],
};

test("/openapi/json says which routes need a credential", async () => {
  const writes = ["/liveEvent", "/liveEvents", "/sources/{source}"];
  const reads = [
    ...["/live", "/metrics", "/quarantine", "/revenue", "/userEvents", "/userEvents/{userid}"],
  ];
  const secured = async ({ url }: App) => {
    const { paths } = (await (await fetch(`${url}/openapi/json`)).json()) as {
      paths: Record<string, Record<string, { security?: unknown }>>;
    };
    const isSecured = ([, methods]: [string, Record<string, { security?: unknown }>]) =>
      Object.values(methods).some(({ security }) => security);
    return Object.entries(paths)
      .filter(isSecured)
      .map(([path]) => path)
      .toSorted();
  };
  expect(await secured(open)).toEqual(writes);
  expect(await secured(keyed)).toEqual([...writes, ...reads].toSorted());
});

/** For each kind of route `ok` or the status, and the fault that is reported for a token. */
type Row = [who: string, credential: string | null, answers: Answers, word?: string];
type Answers = Partial<Record<keyof typeof ROUTES, number>>;
const ALL: Answers = {};
const NONE: Answers = { write: 401, ann: 401, other: 401 };
const READS: Answers = { write: 403 };
const WRITES: Answers = { ann: 403, other: 403 };
const OWN: Answers = { write: 403, other: 403 };

async function expectRow(app: App, [who, credential, answers, word]: Row): Promise<void> {
  const url = app.url.replace("0.0.0.0", "127.0.0.1");
  const asked = Object.entries(ROUTES).flatMap(([kind, routes]) =>
    routes.map(async ([init, path, passed]) => {
      const headers: Record<string, string> = { ...(init.headers as Record<string, string>) };
      if (credential !== null) headers["authorization"] = credential;
      const response = await fetch(url + path(), { ...init, headers });
      const text = await response.text();
      const wanted = answers[kind as keyof typeof ROUTES] ?? passed;
      const what = `${who}: ${init.method ?? "GET"} ${path()}`;
      expect(`${what} ${response.status}`).toBe(`${what} ${wanted}`);
      const challenge = response.headers.get("www-authenticate") ?? "";
      const [, found] = /error_description="(\w+)"/.exec(challenge) ?? [];
      if (wanted === 401) expect([what, challenge, found]).toEqual([what, challenge, word]);
      if (wanted === 403) expect(challenge).toContain('error="insufficient_scope"');
      if (wanted === 401 || wanted === 403) {
        expect(challenge).toStartWith('Bearer realm="daybook"');
        if (init.method !== "HEAD") expect(JSON.parse(text).status).toBe(wanted);
        for (const hidden of [credential, OLD, NEW, READER, JWT_SECRET])
          if (hidden && hidden.length > 10) expect(text + challenge).not.toContain(hidden);
      }
    }),
  );
  await Promise.all(asked);
}

const SECRETS: Row[] = [
  ["none", null, NONE],
  ["empty", "Bearer ", NONE],
  ["wrong", "Bearer wrong", NONE],
  ["wrong by one letter", `${OLD}x`, NONE],
  ["both at once", `${OLD},${NEW}`, NONE],
  ["old", OLD, ALL],
  ["new", `Bearer ${NEW}`, ALL],
];

// Callers with many invalid credentials are slowed down: each test has its own server, and they run together.
test.concurrent(
  "secrets of a server without READ_SECRET: each route for each credential",
  async () => {
    for (const [who, credential, answers] of SECRETS)
      await expectRow(open, [who, credential, answers.write ? { write: answers.write } : ALL]);
  },
);

test.concurrent("on a non-loopback address reading requires a credential", async () => {
  for (const row of SECRETS) await expectRow(outside, row);
});

test.concurrent("tokens of an issuer's keys: each route for each kind of credential", async () => {
  const bySecret = await sign({ ...GOOD, ...both }, JWT_SECRET);
  // The classic confusion: a token signed with the public key as if it were a secret.
  const byPublicKey = await sign({ ...GOOD, ...both }, JSON.stringify(rsa.jwk), { kid: rsa.kid });
  const stranger = await generateKeyPair("ES256");
  const rows: Row[] = [
    ...SECRETS,
    ["read secret", READER, READS],
    ["RS256", `Bearer ${await signWith(rsa, both)}`, ALL],
    ["ES256", `Bearer ${await signWith(ec, both)}`, ALL],
    ["EdDSA", `Bearer ${await signWith(ed, both)}`, ALL],
    ["writes", await signWith(ec, { scope: "events:write", sub: "svc" }), WRITES],
    ["reads", await signWith(ec, { scope: "balances:read" }), READS],
    ["no scope", await signWith(ec, {}), { ...WRITES, write: 403 }],
    ["array in scope", await signWith(ec, { scope: ["balances:read", "openid"] }), READS],
    ["string in scp", await signWith(ec, { scp: "openid events:write", sub: "svc" }), WRITES],
    ["array in scp", await signWith(ec, { scp: ["events:write"], sub: "svc" }), WRITES],
    ["permissions", await signWith(ec, { scope: "openid", permissions: ["balances:read"] }), READS],
    [
      "two claims",
      await signWith(ec, { scp: "balances:read", permissions: ["events:write"] }),
      ALL,
    ],
    [
      "no text in scope",
      await signWith(ec, {
        scope: { "balances:read": 1 },
        scp: [1, null],
        permissions: [["events:write"]],
      }),
      { ...WRITES, write: 403 },
    ],
    [
      "two scopes in one element",
      await signWith(ec, { scp: ["events:write balances:read"] }),
      { ...WRITES, write: 403 },
    ],
    ["own sub", await signWith(ec, { sub: "ann" }), OWN],
    [
      "scope of another name",
      await signWith(ec, { scope: "events:writes" }),
      { ...WRITES, write: 403 },
    ],
    ["expired", await signWith(ec, both, "-31s"), NONE, "expired"],
    ["just expired", await signWith(ec, both, "-15s"), ALL],
    ["HS256", bySecret, NONE, "wrong_algorithm"],
    ["HS256 by the public key", byPublicKey, NONE, "wrong_algorithm"],
    ["none as algorithm", unsigned, NONE, "wrong_algorithm"],
    ["other issuer", await signWith(ec, { ...both, iss: "x" }), NONE, "wrong_issuer"],
    ["other audience", await signWith(ec, { ...both, aud: "x" }), NONE, "wrong_audience"],
    [
      "not yet",
      await signWith(ec, { ...both, nbf: Date.now() / 1000 + 60 }),
      NONE,
      "not_yet_valid",
    ],
    [
      "another key under that name",
      await signWith({ ...ec, privateKey: stranger.privateKey }, both),
      NONE,
      "wrong_signature",
    ],
    [
      "no expiry",
      await sign({ ...GOOD, ...both }, ec.privateKey, { ...ec, expires: null }),
      NONE,
      "no_expiry",
    ],
    ["hardly a token", "Bearer a.b.c", NONE, "malformed"],
  ];
  for (const row of rows) await expectRow(keyed, row);
  expect(issuer.asked).toBe(1);
});

test.concurrent("tokens of a secret: each route for each kind of credential", async () => {
  const token = (claims: JWTPayload, options?: Signed) =>
    sign({ ...GOOD, ...claims }, JWT_SECRET, options);
  const rows: Row[] = [
    ...SECRETS.slice(0, 3),
    ["read secret", `Bearer ${READER}`, READS],
    ["HS256", `Bearer ${await token(both)}`, ALL],
    ["own sub", await token({ sub: "ann" }), OWN],
    ["expired", await token(both, { expires: "-31s" }), NONE, "expired"],
    ["HS512", await token(both, { alg: "HS512" }), NONE, "wrong_algorithm"],
    ["RS256", await signWith(rsa, both), NONE, "wrong_algorithm"],
    ["none as algorithm", unsigned, NONE, "wrong_algorithm"],
    ["other secret", await sign({ ...GOOD, ...both }, OLD), NONE, "wrong_signature"],
    ["exp of 1e999", signedText('{"exp":1e999,"scope":"events:write"'), NONE, "malformed"],
    ["nbf of -1e999", signedText(`{"exp":${SOON_S},"nbf":-1e999`), NONE, "malformed"],
    ["iat of -1e999", signedText(`{"exp":${SOON_S},"iat":-1e999`), NONE, "malformed"],
    [
      "missing audience",
      await sign({ iss: GOOD.iss, ...both }, JWT_SECRET),
      NONE,
      "wrong_audience",
    ],
  ];
  for (const row of rows) await expectRow(secretly, row);
});

/** A token of claims as they are written, with those that the server requires. */
function signedText(claims: string): string {
  const { iss, aud } = GOOD;
  const payload = `${claims},${JSON.stringify({ iss, aud }).slice(1)}`;
  const encoded = [`{"alg":"HS256"}`, payload].map((part) =>
    Buffer.from(part).toString("base64url"),
  );
  const text = encoded.join(".");
  return `${text}.${createHmac("sha256", JWT_SECRET).update(text).digest("base64url")}`;
}

test("an issuer's answer is read up to 1 MiB, and a redirect is not followed", async () => {
  const reported: string[] = [];
  const health = { failing: (line: string) => reported.push(line), recovered() {} };
  const answers = [
    () => new Response(" ".repeat(2 ** 20) + JSON.stringify({ keys: [ec.jwk] })),
    () => Response.redirect("http://elsewhere.test/", 302),
  ];
  for (const answer of answers) {
    const asked: unknown[] = [];
    const verify = openTokens({ JWKS_URL: "http://issuer.test/" }, health, async (_, init) => {
      asked.push(init?.redirect);
      return answer();
    })!;
    const token = await signWith(ec, both);
    expect(await verify(token).catch((error) => error)).toBeInstanceOf(KeysUnavailable);
    expect(asked).toEqual(["manual"]);
  }
  expect(reported[0]).toContain("larger than 1048576 bytes");
});

test("app.ts --token prints a token that the server accepts, and names what is missing", async () => {
  const print = (...args: string[]) =>
    run("app.ts", { args: ["--token", ...args], env: { JWT_SECRET, ...ISSUER } });
  const { code, stdout, stderr } = await print(
    "--scope",
    "events:write",
    "--expires",
    "30d",
    "--sub",
    "ann",
  );
  expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
  await expectRow(secretly, ["printed", `Bearer ${stdout.trim()}`, { other: 403 }]);
  const claims = JSON.parse(atob(stdout.split(".")[1]!)) as { exp: number; iat: number };
  expect(claims.exp - claims.iat).toBe(30 * 86_400);
  const untold = await run("app.ts", { args: ["--scope", "events:write"] });
  expect(untold).toMatchObject({
    code: 2,
    stdout: "",
    stderr: expect.stringContaining("require --token"),
  });
  const wrong = await run("app.ts", { args: ["--token", "--scope", "all"] });
  expect({ code: wrong.code, stdout: wrong.stdout }).toEqual({ code: 2, stdout: "" });
  expect(wrong.stderr.split("\n").map((line) => line.split(" ")[0])).toEqual([
    ...["JWT_SECRET", "--scope", "--expires", ""],
  ]);
});

test("client.ts presents the token of --token or AUTH_TOKEN", async () => {
  using folder = tempDir();
  const file = folder.file("a.jsonl");
  await Bun.write(file, `${EVENT}\n`);
  const good = await sign({ ...GOOD, scope: "events:write" }, JWT_SECRET);
  const reads = await sign({ ...GOOD, scope: "balances:read" }, JWT_SECRET);
  const env = { SERVER_URL: secretly.url, AUTH_SECRET: "none" };
  const send = (args: string[], AUTH_TOKEN: string) =>
    run("client.ts", { args: [...args, file], env: { ...env, AUTH_TOKEN } });
  const [byEnv, byOption, denied] = await Promise.all([
    send(["--source", "1"], good),
    send(["--source", "2", "--token", good], reads),
    send(["--source", "3"], reads),
  ]);
  expect([byEnv, byOption, denied].map(({ code }) => code)).toEqual([0, 0, 2]);
  expect(denied.stderr).toContain("answered 403: this secret or token does not grant write access");
});

test("a secret is rotated under load without rejecting any valid credential", async () => {
  using folder = tempDir();
  let PORT = "0";
  let secret = OLD;
  let going = true;
  const statuses: number[] = [];
  const start = async (AUTH_SECRET: string) => {
    const options = { dataDir: folder.path, databaseUrl: databaseOf.url, args: ["--no-processor"] };
    const app = await startApp({ ...options, env: { PORT, AUTH_SECRET } });
    PORT = new URL(app.url).port;
    return app;
  };
  const replace = async (app: App, AUTH_SECRET: string) => {
    app.kill("SIGTERM");
    expect(await app.exit()).toBe(0);
    return start(AUTH_SECRET);
  };
  let app = await start(OLD);
  try {
    const writers = Array.from({ length: 8 }, async () => {
      while (going) {
        const authorization = secret;
        const headers = { ...json, authorization };
        const url = `http://127.0.0.1:${PORT}/liveEvent`;
        await fetch(url, { method: "POST", headers, body: EVENT }).then(
          ({ status }) => statuses.push(status),
          () => Bun.sleep(20), // between two servers
        );
      }
    });
    const grow = async () => {
      const enough = statuses.length + 200;
      await until(() => statuses.length >= enough);
    };
    await grow();
    app = await replace(app, `${OLD},${NEW}`);
    await grow();
    secret = NEW;
    await grow();
    app = await replace(app, NEW);
    await grow();
    going = false;
    await Promise.all(writers);
    expect(new Set(statuses)).toEqual(new Set([201]));
    const headers = { ...json, authorization: OLD };
    const old = await fetch(`${app.url}/liveEvent`, { method: "POST", headers, body: EVENT });
    expect(old.status).toBe(401);
  } finally {
    going = false;
    await app[Symbol.asyncDispose]();
  }
});

test("failures of one address are paced, those of another do not wait", async () => {
  let nowMs = 0; // a process that has just started
  const waits: number[] = [];
  const sleep = async (ms: number) => void waits.push(ms);
  const throttle = openThrottle({ now: () => nowMs, sleep });
  for (let i = 0; i < 100; i++) expect(await throttle.failed("a")).toBe(true);
  expect(waits).toEqual([]);
  await Promise.all([throttle.failed("a"), throttle.failed("a"), throttle.failed("a")]);
  await throttle.failed("b");
  expect(waits).toEqual([100, 200, 300]);
  nowMs += 10_500;
  for (let i = 0; i < 100; i++) await throttle.failed("a");
  expect(waits).toHaveLength(3);
});

test("keys are fetched at most every 30 s for an unknown one, and stay valid while the issuer is down", async () => {
  const startMs = Date.now();
  const passTime = (seconds: number) => setSystemTime(startMs + 1000 * seconds);
  let isDown = false;
  let fetches = 0;
  const served = [ec.jwk];
  const reported: string[] = [];
  const health = {
    failing: () => reported.push("failing"),
    recovered: () => reported.push("recovered"),
  };
  const verify = openTokens({ JWKS_URL: "http://issuer.test/" }, health, async () => {
    fetches++;
    if (isDown) throw new Error("down");
    return Response.json({ keys: served });
  })!;
  const outcome = async (key: Key) =>
    verify(await signWith(key, both, "1d")).then(
      () => "valid",
      (error: Error) => (error instanceof InvalidToken ? error.fault : error.constructor.name),
    );
  try {
    expect([await outcome(ec), fetches]).toEqual(["valid", 1]);
    served.push(late.jwk);
    passTime(29);
    expect([await outcome(late), fetches]).toEqual(["unknown_key", 1]);
    passTime(31);
    expect([await outcome(late), fetches]).toEqual(["valid", 2]);
    isDown = true;
    passTime(700);
    expect([await outcome(ec), fetches]).toEqual(["valid", 3]);
    expect(await outcome(ed)).toBe(KeysUnavailable.name);
    isDown = false;
    served.splice(0, 1);
    expect(await outcome(ed)).toBe("unknown_key");
    expect(await outcome(ec)).toBe("unknown_key");
    expect(await outcome(late)).toBe("valid");
    expect(reported).toEqual(["recovered", "recovered", "failing", "failing", "recovered"]);
  } finally {
    setSystemTime();
  }
});
