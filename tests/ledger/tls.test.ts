/** A real Postgres with a certificate of a test's own: what each sslmode requires of it. And its socket. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, chownSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { openDatabase } from "../../lib/ledger/database.ts";
import { tempDir } from "../support/programs.ts";
import { createServer, hasServers } from "../support/servers.ts";

setDefaultTimeout(60_000);

const hasPostgres = hasServers();

/** A certificate of an own authority, for `localhost` alone. Returns the path of the authority's. */
function writeCertificate(folder: ReturnType<typeof tempDir>) {
  const openssl = (...args: string[]) => {
    const { success, stderr } = Bun.spawnSync(["openssl", ...args], { cwd: folder.path });
    if (!success) throw new Error(stderr.toString());
  };
  const create = ["req", "-newkey", "rsa:2048", "-nodes"];
  openssl(
    ...create,
    "-x509",
    "-days",
    "2",
    "-subj",
    "/CN=authority",
    "-keyout",
    "ca.key",
    "-out",
    "ca.pem",
  );
  openssl(...create, "-subj", "/CN=localhost", "-keyout", "key.pem", "-out", "request.pem");
  writeFileSync(folder.file("names"), "subjectAltName=DNS:localhost\n");
  openssl(
    ...["x509", "-req", "-days", "2", "-in", "request.pem", "-CA", "ca.pem", "-CAkey", "ca.key"],
    ...["-CAcreateserial", "-extfile", "names", "-out", "certificate.pem"],
  );
}

/** "tls" or "plain", or why it does not connect. */
async function connectBy(url: string): Promise<string> {
  const database = openDatabase(() => url, "test", 1);
  try {
    const [row] = await database.use(
      (sql) => sql<{ ssl: boolean }[]>`select ssl from pg_stat_ssl where pid = pg_backend_pid()`,
    );
    return row?.ssl ? "tls" : "plain";
  } catch (error) {
    return (error as Error).message;
  } finally {
    await database.close();
  }
}

test.if(hasPostgres)("sslmode: who is connected to, and how", async () => {
  using folder = tempDir();
  writeCertificate(folder);
  await using server = await createServer();
  for (const name of ["key.pem", "certificate.pem"]) {
    const path = join(server.data, name);
    await Bun.write(path, Bun.file(folder.file(name)));
    chmodSync(path, 0o600);
    if (server.user) chownSync(path, server.user.uid, server.user.gid);
  }
  await server.start("ssl=on", "ssl_cert_file=certificate.pem", "ssl_key_file=key.pem");
  const at = (host: string, query: string) =>
    connectBy(`postgres://daybook@${host}:${server.port}/postgres?${query}`);
  const root = `sslrootcert=${folder.file("ca.pem")}`;

  expect(await at("localhost", "sslmode=disable")).toBe("plain");
  for (const mode of ["allow", "prefer", "require"])
    expect(await at("localhost", `sslmode=${mode}`)).toBe("tls");
  expect(await at("localhost", "")).toBe("tls");
  for (const host of ["localhost", "127.0.0.1"]) {
    expect(await at(host, `sslmode=verify-ca&${root}`)).toBe("tls");
    expect(await at(host, `sslmode=require&${root}`)).toBe("tls");
    expect(await at(host, "sslmode=verify-ca")).toMatch(/certificate/);
  }
  expect(await at("localhost", `sslmode=verify-full&${root}`)).toBe("tls");
  expect(await at("localhost", `channel_binding=require&sslmode=require&${root}`)).toBe("tls");
  expect(await at("127.0.0.1", `sslmode=verify-full&${root}`)).toMatch(/altnames|IP/);
  for (const query of ["sslmode=verify-full", "sslmode=require&channel_binding=require"])
    expect(await at("localhost", query)).toMatch(/certificate/);

  await server.stop();
  await server.start("ssl=off");
  expect(await at("localhost", "sslmode=prefer")).toBe("plain");
  expect(await at("localhost", "sslmode=require")).toMatch(/TLS|SSL/);
});

test.if(hasPostgres)("a Unix socket, which has no TLS whatever sslmode says", async () => {
  await using server = await createServer();
  await server.start(`unix_socket_directories=${server.data}`);
  const { data, port } = server;
  for (const url of [
    `postgres:///postgres?host=${data}&port=${port}&user=daybook`,
    `postgres://daybook@${encodeURIComponent(data)}:${port}/postgres?sslmode=verify-full`,
  ])
    expect(await connectBy(url)).toBe("plain");
});
