/**
 * DATABASE_URL as providers hand it out. What libpq's parameters mean here is said in this file alone; the
 * driver would send those that it does not know to Postgres, or ignore them (`sslrootcert`), so each one
 * works or is refused by name. No message repeats what may be a piece of the password.
 */
import { readFileSync } from "node:fs";
import { isIP } from "node:net";

import { InvalidSetting, type Settings } from "../config.ts";

const FORM = "use postgres://USER:PASSWORD@HOST:PORT/DATABASE";
const ESCAPE_AND = "write & as %26 in the password";
const ANY = /^/s;
const SSL_MODES = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"] as const;
type SslMode = (typeof SSL_MODES)[number];

/** What is accepted: the values, and what is required otherwise. */
const PARAMETERS = new Map<string, [values: RegExp, requires: string]>(
  Object.entries({
    host: [ANY, ""],
    port: [/^\d{1,5}(,\d{1,5})*$/, "a number"],
    dbname: [ANY, ""],
    user: [ANY, ""],
    password: [ANY, ""],
    sslmode: [new RegExp(`^(${SSL_MODES.join("|")})$`), SSL_MODES.join(", ")],
    ssl: [/^true$/, "true, which is sslmode=require"],
    sslrootcert: [/./, "a file, or system"],
    sslcert: [/./, "a file"],
    sslkey: [/./, "a file"],
    sslnegotiation: [/^postgres$/, "postgres"],
    channel_binding: [/^(disable|prefer|require)$/, "disable, prefer or require"],
    gssencmode: [/^(disable|prefer)$/, "disable or prefer"],
    connect_timeout: [/^\d{1,6}$/, "a number of seconds"],
    keepalives: [/^[01]$/, "0 or 1"],
    keepalives_idle: [/^\d{1,6}$/, "a number of seconds"],
    application_name: [ANY, ""],
    options: [ANY, ""],
    client_encoding: [/^(utf-?8|auto)$/i, "UTF8"],
    target_session_attrs: [/^(any|read-write|primary)$/, "any, read-write or primary"],
    load_balance_hosts: [/^disable$/, "disable"],
    // Not libpq's. `pgbouncer` is Prisma's, `supa` a mark in Supabase's URLs, `uselibpqcompat` node-postgres'.
    pgbouncer: [/^(true|false)$/, "true or false"],
    supa: [ANY, ""],
    uselibpqcompat: [/^true$/, "true"],
  }),
);

/** What to do instead of a parameter that is refused. */
const REMEDIES = new Map(
  Object.entries({
    search_path: "use options=-csearch_path%3DNAME",
    schema: "use options=-csearch_path%3DNAME",
    statement_timeout: "remove it; each transaction has its limits",
  }),
);

export type DriverOptions = Record<string, unknown> & { connection: Record<string, string> };
/** What a server must be (target_session_attrs). */
export type Session = "any" | "read-write" | "primary";

/** What DATABASE_URL says. */
export interface DatabaseUrl {
  /** The driver's options for each host, in the order in which they are tried. */
  hosts: DriverOptions[];
  session: Session;
  /** A line for the log, where a parameter means something else here. */
  note: string | null;
}

/** For `readCommand`: what is wrong with DATABASE_URL, a line or none. */
export function checkDatabaseUrl({ DATABASE_URL: url }: Settings<"DATABASE_URL">): string[] {
  try {
    if (url) parseDatabaseUrl(url);
    return [];
  } catch (error) {
    return [(error as Error).message];
  }
}

/** Throws InvalidSetting. */
export function parseDatabaseUrl(url: string): DatabaseUrl {
  const { authority, database, parameters } = split(url);
  const at = authority.lastIndexOf("@"); // an unescaped @ belongs to the password
  const [user, password] = authority.slice(0, Math.max(at, 0)).split(/:(.*)/s).map(decode);
  const { dbname, connect_timeout = "5", keepalives, keepalives_idle = "60" } = parameters;
  const { application_name, options, target_session_attrs: session = "any" } = parameters;
  const { mode, note } = chooseMode(parameters);
  const common = {
    ...given("database", dbname ?? database),
    ...given("username", parameters["user"] ?? user),
    ...given("password", parameters["password"] ?? password),
    connect_timeout: Number(connect_timeout),
    keep_alive: keepalives === "0" ? null : Number(keepalives_idle),
    prepare: parameters["pgbouncer"] !== "true" && !parameters["supa"],
    connection: { ...given("application_name", application_name), ...given("options", options) },
  };
  const hosts = findHosts(authority.slice(at + 1), parameters).map(({ host, port }) => {
    const isSocket = host.startsWith("/");
    if (isSocket && parameters["channel_binding"] === "require")
      refuse("has channel_binding=require: it requires TLS, which a Unix socket does not have");
    const path = isSocket ? { path: `${host}/.s.PGSQL.${port}` } : {};
    const ssl = isSocket ? false : tlsOptions(mode, parameters, host);
    // Without a host, the driver's default is PGHOST or localhost.
    return { ...common, ...(host && { host: [host] }), port: [port], ...path, ssl };
  });
  return { hosts, session: session as Session, note };
}

function refuse(problem: string): never {
  throw new InvalidSetting(`DATABASE_URL ${problem}`);
}

/** The parts of a URL. All but `authority` are decoded. */
function split(url: string) {
  const [, authority, path = "", query = ""] =
    /^postgres(?:ql)?:\/\/([^/?#]*)(?:\/([^?#]*))?(?:\?([^#]*))?$/s.exec(url) ?? [];
  if (authority === undefined) refuse(`is invalid: ${FORM}, and write # as %23`);
  // A password that holds / or ? ends the authority too early: what follows is a piece of it.
  if ((path + query).includes("@"))
    refuse(
      "is invalid: write @ as %40, / as %2F and ? as %3F in its user, password and parameters",
    );
  const parameters: Record<string, string> = Object.create(null);
  const pairs = query
    .split("&")
    .filter(Boolean)
    .map((part) => part.split(/=(.*)/s).map(decode) as [name: string, value?: string]);
  // A password that holds & ends too early: what follows is a piece of it.
  const hasPassword = pairs.some(([name]) => name === "password");
  for (const [name, value = ""] of pairs) {
    if (name in parameters) refuse(`has ${name} twice: give it once`);
    const [values, requires] = PARAMETERS.get(name) ?? refuseParameter(name, hasPassword);
    if (!values.test(value) && hasPassword)
      refuse(`has an invalid ${name}: use ${requires}, and ${ESCAPE_AND}`);
    if (!values.test(value)) refuse(`has ${name}=${value}: use ${requires}`);
    parameters[name] = value;
  }
  return { authority, database: decode(path), parameters };
}

function refuseParameter(name: string, hasPassword: boolean): never {
  const remedy = REMEDIES.get(name);
  if (hasPassword && !remedy)
    refuse(`has a parameter that is not supported: remove it, or ${ESCAPE_AND}`);
  refuse(`has ${name}, which is not supported: ${remedy ?? "remove it"}`);
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return refuse("is invalid: write % as %25");
  }
}

function given<T>(name: string, value: T | undefined): Record<string, T> {
  return value === undefined || value === "" ? {} : { [name]: value };
}

/** The hosts with their ports. A host that begins with / is the folder of a Unix socket. */
function findHosts(authority: string, parameters: Record<string, string>) {
  const { host, port } = parameters;
  if (authority !== "" && host !== undefined) refuse("has host twice: give it once");
  const listed = authority.split(",").map((one) => {
    const [, name, number] = /^(\[[^\]]*\]|[^:[\]]*)(?::(\d{1,5}))?$/.exec(one) ?? [];
    if (name === undefined) refuse(`is invalid: ${FORM}`);
    return { name: decode(name).replace(/^\[|\]$/g, ""), number };
  });
  const names = host?.split(",") ?? listed.map(({ name }) => name);
  const ports = port?.split(",") ?? listed.map(({ number }) => number ?? "5432");
  if (ports.length !== 1 && ports.length !== names.length)
    refuse(
      `has ${names.length} hosts and ${ports.length} ports: give each host a port, or one to all`,
    );
  return names.map((host, index) => {
    const number = Number(ports[index] ?? ports[0]);
    if (number < 1 || number > 65_535) refuse("has an invalid port: use 1 to 65535");
    return { host, port: number };
  });
}

/** How the connection is encrypted and the server verified: as libpq does, `prefer` if nothing is said. */
function chooseMode(parameters: Record<string, string>): { mode: SslMode; note: string | null } {
  const { ssl, sslrootcert, sslcert, sslkey, channel_binding } = parameters;
  const isSystem = sslrootcert === "system";
  const unsaid = ssl ? "require" : isSystem ? "verify-full" : "prefer";
  const mode = (parameters["sslmode"] ?? unsaid) as SslMode;
  if (isSystem && mode !== "verify-full")
    refuse("has sslrootcert=system: use sslmode=verify-full with it");
  if (!sslcert !== !sslkey) refuse(`has only ${sslcert ? "sslcert" : "sslkey"}: give both`);
  if ((sslrootcert ?? sslcert) !== undefined && /^(disable|allow|prefer)$/.test(mode))
    refuse(`has ${sslrootcert ? "sslrootcert" : "sslcert"}: use sslmode=verify-full with it`);
  if (channel_binding !== "require")
    return { mode: mode === "require" && sslrootcert ? "verify-ca" : mode, note: null }; // as libpq does
  if (mode === "disable") refuse("has channel_binding=require: it requires TLS, so remove sslmode");
  const note =
    "DATABASE_URL has channel_binding=require, which the driver lacks: the server's certificate and " +
    "name are verified instead (sslmode=verify-full)";
  return { mode: "verify-full", note };
}

function tlsOptions(mode: SslMode, parameters: Record<string, string>, host: string) {
  const { sslrootcert: root, sslcert, sslkey } = parameters;
  if (mode === "disable") return false;
  if (mode === "allow" || mode === "prefer") return "prefer";
  return {
    rejectUnauthorized: mode !== "require",
    ...(root && root !== "system" && { ca: readPem("sslrootcert", root) }),
    ...(sslcert && sslkey && { cert: readPem("sslcert", sslcert), key: readPem("sslkey", sslkey) }),
    ...(mode === "verify-ca" && { checkServerIdentity: () => undefined }),
    ...(isIP(host) && { host }),
  };
}

function readPem(name: string, path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    return refuse(
      `has ${name}, a file that cannot be read (${(error as NodeJS.ErrnoException).code}): use the path of a PEM file`,
    );
  }
}
