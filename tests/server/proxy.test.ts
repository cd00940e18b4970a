/** Who counts as a local caller: headers of proxies, foreign hosts, and a real nginx in front. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { writeFileSync } from "node:fs";

import { event } from "../support/events.ts";
import { openConnection } from "../support/network.ts";
import { closedPort, isInstalled, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(20_000);
const json = { "content-type": "application/json" };

/** A server with the defaults, whose database is down: an open read is answered 503, another one 401. */
async function start(dataDir: string, env: Record<string, string> = {}) {
  const databaseUrl = `postgres://daybook@127.0.0.1:${await closedPort()}/daybook`;
  return startApp({ dataDir, databaseUrl, env: { AUTH_SECRET: "", ...env } });
}

const read = async (url: string, headers: Record<string, string>) =>
  (await fetch(`${url}/userEvents/ann`, { headers })).status;
const write = async (url: string, headers: Record<string, string>, authorization = "secret") => {
  const init = {
    method: "POST",
    body: event("ann"),
    headers: { ...json, authorization, ...headers },
  };
  return (await fetch(`${url}/liveEvent`, init)).status;
};

test("a request through a proxy or for another host needs a credential, and not the default one", async () => {
  using dir = tempDir();
  await using app = await start(dir.path, { ALLOWED_HOSTS: "books.example, other.example" });
  for (const headers of [
    {},
    { host: "localhost" },
    { host: "127.0.0.1:81" },
    { host: "[::1]:8000" },
    { host: "Books.Example:443" },
    { host: "other.example" },
  ] as Record<string, string>[])
    expect([headers, await read(app.url, headers), await write(app.url, headers)]).toEqual([
      headers,
      503,
      201,
    ]);
  expect(app.stderr.text()).not.toContain("default secret");
  expect(app.stderr.text()).toContain("(default)");
  for (const headers of [
    { forwarded: "for=192.0.2.1" },
    { "x-forwarded-for": "192.0.2.1" },
    { "X-Forwarded-Anything": "" },
    { host: "evil.example" },
    { host: "localhost.evil.example" },
    { host: "127.0.0.1.evil.example" },
  ] as Record<string, string>[])
    expect([headers, await read(app.url, headers), await write(app.url, headers)]).toEqual([
      headers,
      401,
      401,
    ]);
  expect((await fetch(`${app.url}/healthz`, { headers: { forwarded: "for=_x" } })).status).toBe(
    200,
  );
  const refused = await fetch(`${app.url}/metrics`, {
    headers: { authorization: "secret", forwarded: "for=_x" },
  });
  expect(await refused.text()).toContain("the default secret is valid only for direct requests");
  await until(() => app.stderr.text().includes("default secret"));
  expect(app.stderr.text().split("default secret was refused")).toHaveLength(2);
});

test("two Host headers, and one that is no host, are answered 400 on every route", async () => {
  using dir = tempDir();
  await using app = await start(dir.path);
  const port = Number(new URL(app.url).port);
  const invalid = ["127.999.0.1", "localhost:70000", "a@localhost", "localhost/x", "[::1", "é", ""];
  for (const hosts of [
    ["localhost", "evil.example"],
    ["evil.example", "localhost"],
    ["localhost", "localhost"],
    ...invalid.map((host) => [host]),
  ])
    for (const path of ["/userEvents", "/userEvents/ann", "/openapi", "/healthz", "/nowhere"]) {
      const answer = Promise.withResolvers<string>();
      const lines = hosts.map((host) => `Host: ${host}\r\n`).join("");
      const data = (_: unknown, bytes: Buffer) => answer.resolve(`${bytes}`);
      const open = (socket: Bun.Socket) =>
        void socket.write(`GET ${path} HTTP/1.1\r\n${lines}\r\n`);
      const socket = await Bun.connect({ hostname: "127.0.0.1", port, socket: { data, open } });
      expect([hosts, path, await answer.promise]).toEqual([
        hosts,
        path,
        expect.stringMatching(/^HTTP\/1\.1 400 [^]*application\/problem\+json/),
      ]);
      socket.end();
    }
  expect(app.stderr.text()).not.toContain("internal error");
});

test("a request without Host, as a load balancer may probe, is answered like one from elsewhere", async () => {
  using dir = tempDir();
  await using app = await start(dir.path);
  for (const [path, status] of [
    ["/healthz", 200],
    ["/readyz", 200],
    ["/userEvents", 401],
    ["/userEvents/ann", 401],
  ] as const) {
    using connection = openConnection(app.url);
    connection.send(`GET ${path} HTTP/1.0\r\n\r\n`);
    await until(() => connection.text() !== "");
    expect(connection.text()).toStartWith(`HTTP/1.1 ${status} `);
  }
});

test.if(isInstalled("nginx"))(
  "behind nginx with the documented lines the defaults are closed",
  async () => {
    using dir = tempDir();
    await using app = await start(dir.path);
    const [bare, told] = [await closedPort(), await closedPort()];
    const lines = "proxy_set_header Host $host; proxy_set_header X-Forwarded-For $remote_addr;";
    const server = (port: number, more: string) =>
      `server { listen 127.0.0.1:${port}; location / { proxy_pass ${app.url}; ${more} } }`;
    const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
    const paths = temporary.map((name) => `${name}_temp_path ${dir.file(name)};`).join(" ");
    writeFileSync(
      dir.file("nginx.conf"),
      `daemon off; master_process off; pid ${dir.file("pid")}; error_log stderr; events {}
     http { access_log off; ${paths} ${server(bare, "")} ${server(told, lines)} }`,
    );
    const nginx = Bun.spawn(["nginx", "-c", dir.file("nginx.conf"), "-e", "stderr"], {
      stderr: "ignore",
    });
    try {
      const isUp = (port: number) =>
        fetch(`http://127.0.0.1:${port}/healthz`).then(
          () => true,
          () => false,
        );
      await until(async () => (await isUp(bare)) && (await isUp(told)));
      expect(await read(`http://127.0.0.1:${told}`, {})).toBe(401);
      expect(await write(`http://127.0.0.1:${told}`, {})).toBe(401);
      // The limit that deploy/README.md states.
      expect(await read(`http://127.0.0.1:${bare}`, { host: "books.example" })).toBe(503);
      expect(await write(`http://127.0.0.1:${bare}`, { host: "books.example" })).toBe(201);
    } finally {
      nginx.kill();
      await nginx.exited;
    }
  },
);
