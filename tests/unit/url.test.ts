/** DATABASE_URL: each parameter works or is refused by name, and no message holds a piece of the password. */
import { expect, test } from "bun:test";

import { InvalidSetting } from "../../lib/config.ts";
import { parseDatabaseUrl } from "../../lib/ledger/url.ts";

const parse = (url: string) => parseDatabaseUrl(url);
/** The driver's options for the only host. */
const one = (url: string) => {
  const { hosts } = parse(url);
  expect(hosts).toHaveLength(1);
  return hosts[0] as Record<string, unknown>;
};
const base = "postgres://ann:pw@db.example:6543/app";

/** The message with which a URL is refused. */
function refusal(url: string): string {
  try {
    parse(url);
  } catch (error) {
    if (error instanceof InvalidSetting) return error.message;
    throw error;
  }
  throw new Error(`accepted: ${url}`);
}

test("user, password, host, port and database", () => {
  expect(one(base)).toMatchObject({
    ...{ username: "ann", password: "pw", host: ["db.example"], port: [6543], database: "app" },
  });
  expect(one("postgresql://ann:p%40s%2Fs%3A@h/d%23")).toMatchObject({
    ...{ password: "p@s/s:", host: ["h"], port: [5432], database: "d#" },
  });
  expect(one("postgres://[::1]:6000")).toMatchObject({ host: ["::1"], port: [6000] });
  expect(one("postgres:///app?host=h&port=1&user=u&password=p")).toMatchObject({
    ...{ username: "u", password: "p", host: ["h"], port: [1], database: "app" },
  });
});

test("an unescaped @ or : belongs to the password", () => {
  expect(one("postgres://ann:p@ss:w@rd@h/app")).toMatchObject({
    password: "p@ss:w@rd",
    host: ["h"],
  });
});

test("beside the parameter password, no message shows what may be a piece of it", () => {
  for (const query of [
    "password=open&Sesame",
    "password=open&Sesame=1",
    "Sesame&password=open",
    "pass%77ord=open&Sesame",
    "password=open&sslmode=Sesame",
    "password=open&port=Sesame",
    "port=Sesame&password=open",
  ]) {
    const message = refusal(`postgres://h.example/d?user=ann&${query}`);
    expect(message).not.toMatch(/Sesame|open/);
    expect(message).toContain("& as %26");
  }
  expect(refusal("postgres://h.example/d?user=ann&Sesame")).toContain("has Sesame");
});

test("a password that ends the URL too early is refused, and no piece of it is shown", () => {
  for (const password of [
    "hush@a/hush",
    "hush/hush",
    "hush?hush",
    "1?hush=hush",
    "1#hush",
    "hush%zz",
    "1/hush?hush=hush",
    "hush]@hush/",
  ]) {
    const message = refusal(`postgres://ann:${password}@h.example/app`);
    expect(message).not.toContain("hush");
    expect(message).toMatch(/^DATABASE_URL is invalid: /);
  }
});

test("an invalid host or port is refused, and not shown", () => {
  for (const host of ["h:port", "h:123456", "h:1:2", "[::1", "pw"].map((one) => `ann:${one}`)) {
    const message = refusal(`postgres://${host}/app`);
    expect(message).toBe(
      "DATABASE_URL is invalid: use postgres://USER:PASSWORD@HOST:PORT/DATABASE",
    );
  }
});

test("a port is 1 to 65535", () => {
  for (const port of ["0", "65536", "99999"])
    expect(refusal(`postgres://ann@h:${port}/app`)).toContain("use 1 to 65535");
});

test("Unix sockets", () => {
  for (const url of [
    "postgres:///app?host=/run/postgresql",
    "postgres://%2Frun%2Fpostgresql/app",
    "postgres://%2Frun%2Fpostgresql:5432/app?sslmode=require",
  ])
    expect(one(url)).toMatchObject({ path: "/run/postgresql/.s.PGSQL.5432", ssl: false });
});

test("several hosts", () => {
  const { hosts, session } = parse(
    "postgres://u@a,b:2,[::1]:3/app?target_session_attrs=read-write",
  );
  expect(session).toBe("read-write");
  expect(hosts.map(({ host, port }) => [host, port])).toEqual([
    [["a"], [5432]],
    [["b"], [2]],
    [["::1"], [3]],
  ] as never);
  const listed = parse("postgres:///app?host=a,b&port=1,2").hosts;
  expect(listed.map(({ host, port }) => [host, port])).toEqual([
    [["a"], [1]],
    [["b"], [2]],
  ] as never);
  expect(refusal("postgres:///app?host=a,b,c&port=1,2")).toContain("3 hosts and 2 ports");
});

test("each sslmode", () => {
  const ssl = (query: string) => one(`${base}?${query}`)["ssl"];
  expect(one(base)["ssl"]).toBe("prefer");
  expect(ssl("sslmode=disable")).toBe(false);
  expect(ssl("sslmode=allow")).toBe("prefer");
  expect(ssl("sslmode=prefer")).toBe("prefer");
  expect(ssl("sslmode=require")).toEqual({ rejectUnauthorized: false });
  expect(ssl("ssl=true")).toEqual({ rejectUnauthorized: false });
  expect(ssl("sslmode=verify-ca")).toMatchObject({ rejectUnauthorized: true });
  expect(ssl("sslmode=verify-full")).toEqual({ rejectUnauthorized: true });
  expect(ssl("sslrootcert=system")).toEqual({ rejectUnauthorized: true });
  expect(ssl(`sslmode=verify-full&sslrootcert=${import.meta.path}`)).toMatchObject({
    ca: expect.stringContaining("each sslmode"),
  });
});

test("the URLs of providers", () => {
  const neon = parse(
    "postgresql://ann:pw@ep-x-pooler.eu-central-1.aws.neon.tech/neondb?sslmode=require&channel_binding=require",
  );
  expect(neon.note).toContain("channel_binding=require");
  expect(neon.hosts[0]).toMatchObject({ ssl: { rejectUnauthorized: true } });
  const supabase =
    "postgres://postgres.ref:pw@aws-0-eu-central-1.pooler.supabase.com:6543/postgres";
  expect(one(supabase)).toMatchObject({ ssl: "prefer", prepare: true });
  expect(one(`${supabase}?pgbouncer=true`)).toMatchObject({ prepare: false });
  expect(one(`${supabase}?sslmode=require&supa=base-pooler.x`)).toMatchObject({ prepare: false });
});

test("the other parameters", () => {
  const query =
    "connect_timeout=7&keepalives=1&keepalives_idle=30&application_name=a%20b&options=-c%20search_path%3Dx";
  expect(one(`${base}?${query}`)).toMatchObject({
    ...{ connect_timeout: 7, keep_alive: 30 },
    connection: { application_name: "a b", options: "-c search_path=x" },
  });
  expect(one(`${base}?keepalives=0`)).toMatchObject({ keep_alive: null });
  for (const query of [
    "channel_binding=prefer",
    "gssencmode=disable",
    "client_encoding=UTF8",
    "target_session_attrs=any",
  ])
    expect(one(`${base}?${query}`)).toBeDefined();
});

test("what cannot work is refused by its name", () => {
  for (const [query, message] of [
    ["sslmode=on", "sslmode=on: use disable, allow"],
    ["sslmode=require&sslmode=disable", "sslmode twice"],
    ["sslmode=prefer&sslrootcert=/x", "sslrootcert: use sslmode=verify-full"],
    ["sslmode=require&sslrootcert=system", "sslrootcert=system: use sslmode=verify-full"],
    ["sslmode=verify-full&sslrootcert=/none.pem", "cannot be read (ENOENT)"],
    ["sslmode=require&sslcert=/x", "only sslcert"],
    ["sslmode=disable&channel_binding=require", "channel_binding=require: it requires TLS"],
    ["keepalives_interval=5", "keepalives_interval, which is not supported"],
    ["connect_timeout=soon", "connect_timeout=soon: use a number"],
    ["target_session_attrs=standby", "target_session_attrs=standby: use any"],
    ["connection_limit=1", "connection_limit, which is not supported"],
    ["search_path=x", "search_path, which is not supported: use options="],
    ["host=b", "host twice"],
    ["constructor=1", "constructor, which is not supported"],
    ["__proto__=1", "__proto__, which is not supported"],
  ])
    expect(refusal(`${base}?${query}`)).toContain(message!);
});
