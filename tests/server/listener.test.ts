/** HTTPS served by the server itself, and certificates renewed while it serves. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { connect as connectPlain } from "node:net";
import { connect } from "node:tls";

import { event } from "../support/events.ts";
import { testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(30_000);

const NO_DATABASE = "postgres://daybook:x@127.0.0.1:1/daybook";
const EVENT = event("ann");

/** Writes a certificate for 127.0.0.1 with the common name `name`. */
function certify(folder: { file(name: string): string }, name: string): void {
  const made = Bun.spawnSync(
    `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=${name}
     -addext subjectAltName=IP:127.0.0.1 -keyout ${folder.file("key.pem")} -out ${folder.file("cert.pem")}`.split(
      /\s+/,
    ),
    { stderr: "pipe" },
  );
  if (!made.success) throw new Error(`openssl: ${made.stderr}`);
}

/** The name in the certificate that the server at `port` presents. */
function nameOf(port: number): Promise<string> {
  return new Promise((resolve, reject) => {
    const socket = connect({ port, host: "127.0.0.1", rejectUnauthorized: false }, () => {
      resolve(String(socket.getPeerCertificate().subject.CN));
      socket.destroy();
    });
    socket.on("error", reject);
  });
}

function settings(folder: { file(name: string): string }) {
  const tls = { TLS_CERT: folder.file("cert.pem"), TLS_KEY: folder.file("key.pem") };
  return { ...tls, DATABASE_URL: NO_DATABASE, DATA_DIR: folder.file("data") };
}

test("with a certificate the server and the client speak HTTPS", async () => {
  using folder = tempDir();
  certify(folder, "first");
  const env = settings(folder);
  const dataDir = folder.file("data");
  await using app = await startApp({ dataDir, databaseUrl: NO_DATABASE, env });
  expect(app.url).toMatch(/^https:\/\/127\.0\.0\.1:\d+$/);
  const file = folder.file("a.jsonl");
  await Bun.write(file, `${EVENT}\n`);
  const trusting = { SERVER_URL: app.url, NODE_EXTRA_CA_CERTS: env.TLS_CERT };
  const sent = await run("client.ts", { args: [file], env: trusting });
  expect({ code: sent.code, stderr: sent.stderr }).toEqual({ code: 0, stderr: "" });
  const plain = await fetch(app.url.replace("https", "http")).catch(() => null);
  expect(plain?.ok ?? false).toBe(false);
});

test("over HTTPS the path is found behind a host of any length, and two hosts are refused", async () => {
  using folder = tempDir();
  certify(folder, "first");
  await using app = await startApp({
    ...{ dataDir: folder.file("data"), databaseUrl: NO_DATABASE, env: settings(folder) },
    args: ["--no-processor"],
  });
  const port = Number(new URL(app.url).port);
  const statusOf = (path: string, ...hosts: string[]) =>
    new Promise<number>((resolve, reject) => {
      const socket = connect({ port, host: "127.0.0.1", rejectUnauthorized: false });
      const head = hosts.map((host) => `Host: ${host}\r\n`).join("");
      socket.write(`GET ${path} HTTP/1.1\r\n${head}Connection: close\r\n\r\n`);
      socket.on("data", (bytes) => resolve(Number(String(bytes).split(" ")[1])));
      socket.on("error", reject);
    });
  for (const host of ["x", "xy", "xyz", "x.example.com", "x:1"]) {
    expect([host, await statusOf("/healthz", host)]).toEqual([host, 200]);
    expect([host, await statusOf("/q/healthz", host)]).toEqual([host, 404]);
  }
  expect(await statusOf("/healthz", "x", "y")).toBe(400);
});

test("a refused flood is cut off behind the answer, and an honest sender gets its answer whole", async () => {
  using folder = tempDir();
  const dataDir = folder.file("data");
  const args = ["--no-processor"];
  await using app = await startApp({ dataDir, databaseUrl: NO_DATABASE, args });
  const head = (length: string) =>
    `POST /liveEvents HTTP/1.1\r\nHost: x\r\nAuthorization: wrong\r\n${length}\r\n\r\n`;
  for (const length of ["Content-Length: 10000000000", "Transfer-Encoding: chunked"]) {
    let isClosed = false;
    const socket = connectPlain(Number(new URL(app.url).port), "127.0.0.1");
    socket.on("error", () => {}).on("close", () => void (isClosed = true));
    socket.resume();
    socket.write(head(length));
    const piece = `100000\r\n${"x".repeat(2 ** 20)}\r\n`;
    // Far more than all buffers on the way.
    for (let i = 0; i < 200 && !isClosed; i++)
      await new Promise((resolve) => socket.write(piece, resolve));
    await until(() => isClosed);
  }
  const headers = { authorization: "wrong", "content-type": "application/x-ndjson" };
  const body = "x".repeat(2 ** 20);
  for (let i = 0; i < 20; i++) {
    const answer = await fetch(`${app.url}/liveEvents`, { method: "POST", headers, body });
    expect(answer.status).toBe(401);
    expect(await answer.text()).toContain("Authorization");
  }
});

test("SIGHUP under load: new connections get the new certificate, and no request fails for long", async () => {
  using folder = tempDir();
  certify(folder, "first");
  const dataDir = folder.file("data");
  await using app = await startApp({
    ...{ dataDir, databaseUrl: NO_DATABASE, env: settings(folder) },
    args: ["--no-processor"],
  });
  const port = Number(new URL(app.url).port);
  expect(await nameOf(port)).toBe("first");
  let going = true;
  const statuses: unknown[] = [];
  const senders = Array.from({ length: 8 }, async () => {
    while (going)
      statuses.push(
        await fetch(`${app.url}/liveEvent`, {
          method: "POST",
          headers: { authorization: "secret", "content-type": "application/json" },
          body: EVENT,
          tls: { rejectUnauthorized: false },
        }).then(
          ({ status }) => status,
          (error: Error) => error.message,
        ),
      );
  });
  for (const name of ["second", "third"]) {
    const enough = statuses.length + 100;
    await until(() => statuses.length > enough);
    certify(folder, name);
    app.kill("SIGHUP");
    await until(async () => (await nameOf(port).catch(() => null)) === name);
  }
  going = false;
  await Promise.all(senders);
  // Connections between two requests are closed: each may cost its sender one more try.
  const lost = statuses.filter((status) => status !== 201);
  expect(lost.filter((status) => !String(status).includes("closed"))).toEqual([]);
  expect(lost.length).toBeLessThanOrEqual(2 * senders.length);

  await Bun.write(folder.file("cert.pem"), "no certificate");
  app.kill("SIGHUP");
  await until(() => app.stderr.text().includes("the old certificate stays in use: TLS_CERT"));
  expect(await nameOf(port)).toBe("third");
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  expect(app.stderr.text()).not.toContain("PRIVATE KEY");
});

test("SIGHUP without a certificate ends neither the server nor a processor that follows", async () => {
  using folder = tempDir();
  const env = { DATABASE_URL: NO_DATABASE, DATA_DIR: folder.file("data") };
  const options = { dataDir: env.DATA_DIR, databaseUrl: NO_DATABASE, args: ["--no-processor"] };
  await using app = await startApp(options);
  await using processor = spawn("processor.ts", { env });
  await until(() => processor.stderr.text().includes("following"));
  for (const program of [app, processor]) {
    program.kill("SIGHUP");
    await until(() => program.stderr.text().includes("SIGHUP: there is nothing to reload"));
  }
  expect((await app.post(EVENT)).status).toBe(201);
  for (const program of [app, processor]) {
    program.kill("SIGTERM");
    expect(await program.exit()).toBe(0);
  }
});

// It mostly waits.
test.concurrent(
  "IDLE_SECONDS closes idle connections, and cuts off no answer that takes less",
  async () => {
    using folder = tempDir();
    await using database = await testDatabase();
    const start = (name: string, IDLE_SECONDS: string) =>
      startApp({
        ...{ dataDir: folder.file(name), databaseUrl: database.url, args: ["--no-processor"] },
        env: { IDLE_SECONDS },
      });
    await using soon = await start("soon", "6");
    await using late = await start("late", "255");
    const { position } = (await (await soon.post(EVENT)).json()) as { position: string };
    let lateIsClosed = false;
    const kept = await openIdle(late.url, () => (lateIsClosed = true));
    const closed = Promise.withResolvers<void>();
    await openIdle(soon.url, closed.resolve);
    // Bun looks at all connections every 4 s: whatever part of these the wait begins in.
    const waits = Array.from({ length: 8 }, async (_, i) => {
      await Bun.sleep(i * 500);
      return (await fetch(`${soon.url}/userEvents/ann?after=${position}`)).status;
    });
    expect(await Promise.all(waits)).toEqual(waits.map(() => 504));
    await closed.promise;
    expect(lateIsClosed).toBe(false);
    kept.end();
  },
);

/** A connection that has had an answer. */
async function openIdle(url: string, close: () => void) {
  const answered = Promise.withResolvers<void>();
  const port = Number(new URL(url).port);
  const socket = { data: () => answered.resolve(), close };
  const connection = await Bun.connect({ hostname: "127.0.0.1", port, socket });
  connection.write("GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
  await answered.promise;
  return connection;
}

test("an unusable certificate or a port in use ends the start with one line", async () => {
  using folder = tempDir();
  const env = settings(folder);
  const { code, stdout, stderr } = await run("app.ts", { env });
  expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
  expect(stderr).toBe(`TLS_CERT: cannot read ${env.TLS_CERT} (ENOENT)\n`);
  certify(folder, "first");
  const options = { dataDir: folder.file("data"), databaseUrl: NO_DATABASE, env };
  await using app = await startApp({ ...options, args: ["--no-processor"] });
  const PORT = new URL(app.url).port;
  const second = await run("app.ts", { env: { ...env, PORT, DATA_DIR: folder.file("second") } });
  expect([second.code, second.stderr]).toEqual([1, expect.stringContaining(`:${PORT}: `)]);
  const { TLS_KEY: _, ...alone } = env;
  const half = await run("app.ts", { env: alone });
  expect([half.code, half.stderr]).toEqual([
    2,
    "TLS_KEY is not set: set both TLS_CERT and TLS_KEY\n",
  ]);
});
