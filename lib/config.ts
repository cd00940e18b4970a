/**
 * The table of settings, and the only reader of the environment and the command line. Settings are
 * checked once, when a program starts, and never change.
 */
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  openSync,
  readSync,
  statSync,
} from "node:fs";
import { isIPv4 } from "node:net";
import { dirname, resolve } from "node:path";
import { parseArgs } from "node:util";

import { version } from "../package.json";
import { reasonOf } from "./errors.ts";
import { say } from "./progress.ts";

type Program = "app" | "processor" | "client";

/** What a valid value is, for error messages, and how it is parsed: to `undefined` when it is invalid. */
interface Kind<T> {
  requires: string;
  parse(text: string): T | undefined;
  /** Its text is never shown. */
  isSecret?: true;
}

interface Setting {
  /** The programs that read it. */
  programs: readonly Program[];
  default?: string;
  /** What README and `--help` say about it. */
  meaning: string;
  kind: Kind<unknown>;
}

export const DEFAULT_SECRET = "secret";
/** On a non-loopback address: 16 random characters are beyond guessing. */
const MIN_SECRET_LENGTH = 16;
/** HS256 requires a key as long as its digest (RFC 7518). */
const MIN_JWT_SECRET_BYTES = 32;
const SECRETS = ["AUTH_SECRET", "READ_SECRET", "JWT_SECRET"] as const;
/** These may be given as NAME_FILE. */
const FROM_FILES = [...SECRETS, "AUTH_TOKEN", "DATABASE_URL", "JOURNAL_URL"] as readonly string[];
/** Longer than any secret: a path that was mistaken names something else. */
const MAX_SECRET_FILE_BYTES = 65_536;
/** A pipe has 5 s to deliver a secret. */
const SECRET_WAIT_MS = 10;
const MAX_SECRET_WAITS = 500;
const LOG_LEVELS = ["debug", "info", "warn", "error", "fatal", "silent"] as const;

const SECRET_LIST: Kind<string[]> = {
  requires: "one or more secrets of printable ASCII without spaces",
  parse: (text) => (/^[!-+\--~]+(,[!-+\--~]+)*$/.test(text) ? text.split(",") : undefined),
};
const ANY_TEXT = /^[^\0]+$/;

export const SETTINGS = {
  PORT: {
    programs: ["app"],
    default: "8000",
    meaning: "port of the server; `0` picks a free one",
    kind: whole(0, 65_535, "a whole number from 0 to 65535"),
  },
  HOST: {
    programs: ["app", "processor"],
    default: "127.0.0.1",
    meaning: "address to bind; a non-loopback address requires your own AUTH_SECRET",
    kind: textLike(/^[\w.:%-]+$/, "an address or a host name"),
  },
  ALLOWED_HOSTS: {
    programs: ["app"],
    meaning: "host names, besides loopback and HOST, under which reading needs no credential",
    kind: {
      requires: "host names, comma-separated, without ports",
      parse: (text) =>
        /^([\w.-]+|\[[\da-f:.]+\])(, *([\w.-]+|\[[\da-f:.]+\]))*$/i.test(text)
          ? text.toLowerCase().split(/, */)
          : undefined,
    },
  },
  AUTH_SECRET: {
    programs: ["app", "client"],
    default: DEFAULT_SECRET,
    meaning: "one or several, comma-separated; each grants write and read access",
    kind: secret(SECRET_LIST),
  },
  READ_SECRET: {
    programs: ["app"],
    meaning: "one or several; each grants read access to balances and metrics",
    kind: secret(SECRET_LIST),
  },
  JWT_SECRET: {
    programs: ["app"],
    meaning: "accept tokens (JWT) signed with this secret, HS256",
    kind: secret(
      textLike(
        new RegExp(`^(?=( *[!-~]){${MIN_JWT_SECRET_BYTES}})[ -~]+$`),
        `${MIN_JWT_SECRET_BYTES} or more characters of printable ASCII, blanks not counted, for example ` +
          "from `openssl rand -base64 32`; tokens signed with the old secret must be issued again",
      ),
    ),
  },
  JWKS_URL: {
    programs: ["app"],
    meaning: "accept tokens signed with one of the keys at this URL: RS256, ES256 or EdDSA",
    kind: secret({
      requires: "https://…, or http://… of a loopback address", // else anybody on the way signs tokens
      parse: (text) => {
        if (!URL.canParse(text)) return undefined;
        const { protocol, hostname } = new URL(text);
        const isSafe = protocol === "https:" || (protocol === "http:" && isLoopback(hostname));
        return isSafe ? text : undefined;
      },
    }), // its user or query may be one
  },
  JWT_ISSUER: {
    programs: ["app"],
    meaning: "required `iss` of tokens",
    kind: textLike(ANY_TEXT, "text"),
  },
  JWT_AUDIENCE: {
    programs: ["app"],
    meaning: "required `aud` of tokens",
    kind: textLike(ANY_TEXT, "text"),
  },
  TLS_CERT: {
    programs: ["app"],
    meaning: "PEM file of the certificate and its chain, for HTTPS; reloaded on SIGHUP",
    kind: textLike(ANY_TEXT, "the path of a file"),
  },
  TLS_KEY: {
    programs: ["app"],
    meaning: "PEM file of its key",
    kind: textLike(ANY_TEXT, "the path of a file"),
  },
  IDLE_SECONDS: {
    programs: ["app"],
    default: "75",
    meaning: "a connection that is idle for longer is closed; more than your load balancer's",
    kind: whole(6, 255, "a whole number from 6 to 255"),
  },
  DATA_DIR: {
    programs: ["app", "processor"],
    default: "./data",
    meaning: "everything this program keeps on disk",
    kind: textLike(ANY_TEXT, "a path"),
  },
  DATABASE_URL: {
    programs: ["app", "processor"],
    meaning:
      "a Postgres 13 or later, also behind a pooler; unset: an embedded Postgres under `DATA_DIR/postgres`",
    // lib/ledger/url.ts has the rest: it may name several hosts, and parameters.
    kind: secret(textLike(/^postgres(ql)?:\/\//, "postgres://USER:PASSWORD@HOST:PORT/DATABASE")),
  },
  DAYBOOK_POSTGRES: {
    programs: ["app", "processor"],
    meaning:
      "folder of the embedded Postgres; unset: the npm package, or `postgres/` beside the one-file program",
    kind: textLike(ANY_TEXT, "the path of a folder"),
  },
  JOURNAL_URL: {
    programs: ["app", "processor"],
    meaning:
      "keep the journal in a NATS JetStream stream, `nats://HOST,HOST/STREAM`; needs DATABASE_URL",
    // lib/journal/url.ts has the rest.
    kind: secret(textLike(/^(nats|tls):\/\//, "nats://HOST[,HOST…]/STREAM")),
  },
  JOURNAL_SEGMENT_BYTES: {
    programs: ["app"],
    default: `${256 * 1024 * 1024}`,
    meaning: "size at which a journal file is full and the next one begins",
    kind: whole(1, 10 ** 15 - 1, "a whole number of bytes, 1 or more"),
  },
  JOURNAL_KEEP_DAYS: {
    programs: ["app", "processor"],
    meaning: "delete full journal files that are older and fully posted; unset: never",
    kind: {
      requires: "a number of days, 0 or more",
      parse: (text) => (/^\d{1,5}(\.\d{1,6})?$/.test(text) ? Number(text) : undefined),
    },
  },
  ID_DAYS: {
    programs: ["app", "processor"],
    default: "30",
    meaning: "how many days event ids are remembered",
    kind: whole(1, 36_500, "a whole number from 1 to 36500"),
  },
  EVENT_TYPES: {
    programs: ["app", "processor", "client"],
    default: "add_revenue:+,subtract_revenue:-",
    meaning:
      "event names, and whether they add (`+`), subtract (`-`) or do not count (`0`); a change holds for events posted from then on",
    kind: {
      requires: "NAME:+, NAME:- or NAME:0, comma-separated, each name once",
      parse(text) {
        const parts = text
          .split(",")
          .map((part) => /^([\w.-]{1,64}):[+0-]$/.exec(part.trim())?.[1]);
        return parts.includes(undefined) || new Set(parts).size < parts.length ? undefined : text;
      },
    },
  },
  EVENT_SCHEMA: {
    programs: ["app"],
    meaning: "a JSON Schema (2020-12) file that every event must also satisfy",
    kind: textLike(ANY_TEXT, "the path of a file"),
  },
  LOG_LEVEL: {
    programs: ["app", "processor"],
    default: "info",
    meaning: LOG_LEVELS.map((level) => `\`${level}\``).join(", "),
    kind: {
      requires: `one of ${LOG_LEVELS.join(", ")}`,
      parse: (text) => LOG_LEVELS.find((level) => level === text),
    },
  },
  METRICS_PORT: {
    programs: ["processor"],
    meaning:
      "where a processor without a server serves `/metrics`, `/healthz` and `/readyz`, on HOST",
    kind: whole(0, 65_535, "a whole number from 0 to 65535"),
  },
  SERVER_URL: {
    programs: ["client"],
    default: "http://127.0.0.1:8000",
    meaning: "where the client sends",
    kind: url("http://HOST:PORT or https://HOST:PORT"),
  },
  AUTH_TOKEN: {
    programs: ["client"],
    meaning: "a token that the client presents instead of AUTH_SECRET",
    kind: secret(textLike(/^[!-~]+$/, "printable ASCII without spaces")),
  },
} as const satisfies Record<string, Setting>;

/** README says it in the same words. */
export const FILES_NOTE = `Instead of ${FROM_FILES.join(", ")}: NAME_FILE, a file that holds the value.`;

type Table = typeof SETTINGS;
export type SettingName = keyof Table;
type Value<S extends Setting> =
  NonNullable<ReturnType<S["kind"]["parse"]>> | (S extends { default: string } ? never : undefined);
export type Settings<Name extends SettingName> = { readonly [N in Name]: Value<Table[N]> };
/** The settings that a program reads. */
export type SettingsOf<P extends Program> = Settings<
  { [N in SettingName]: P extends Table[N]["programs"][number] ? N : never }[SettingName]
>;

/**
 * Reads the settings `names` from `env`. `invalid` has one line for each that is invalid: its name, what
 * was found, what is required. An empty setting counts as unset.
 */
export function readSettings<Name extends SettingName>(
  names: readonly Name[],
  env: Record<string, string | undefined>,
): { settings: Settings<Name>; invalid: string[] } {
  const invalid: string[] = [];
  const settings: Record<string, unknown> = {};
  for (const name of names) {
    const { default: fallback, kind }: Setting = SETTINGS[name];
    const { given, path, problem } = readGiven(name, env);
    const text = given || fallback;
    settings[name] = text === undefined ? undefined : kind.parse(text);
    if (problem) invalid.push(problem);
    if (problem || text === undefined || settings[name] !== undefined) continue;
    const found = kind.isSecret ? "invalid" : `"${text}"`;
    const where = path ? `${name}_FILE: the value in ${path}` : name;
    invalid.push(`${where} is ${found}: use ${kind.requires}`);
  }
  invalid.push(...checkTogether(settings));
  return { settings: Object.freeze(settings) as Settings<Name>, invalid };
}

/** The text of a setting, from the environment or from the file that NAME_FILE names. */
function readGiven(name: string, env: Record<string, string | undefined>) {
  const path = FROM_FILES.includes(name) ? env[`${name}_FILE`] : undefined;
  if (!path) return { given: env[name] };
  if (env[name]) return { problem: `${name} and ${name}_FILE are both set: set one of them` };
  try {
    return { given: readSecretFile(path), path };
  } catch (error) {
    const { code, message } = error as Error & { code?: string };
    const problem = `${name}_FILE: cannot use ${path} (${code ?? message}): use a file that holds the value`;
    return { problem };
  }
}

/**
 * Reads no more than it may, and does not wait for ever: the path may be that of a device, or of a pipe that
 * nobody writes to. The last newline is not part of the value.
 */
function readSecretFile(path: string): string {
  const file = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
  try {
    const bytes = Buffer.alloc(MAX_SECRET_FILE_BYTES + 1);
    let length = 0;
    for (let read = -1, waits = 0; read !== 0 && length < bytes.length;) {
      try {
        read = readSync(file, bytes, length, bytes.length - length, null);
        length += read;
      } catch (error) {
        // A pipe whose writer has not written yet: `NAME_FILE=<(command)`.
        if ((error as { code?: string }).code !== "EAGAIN" || ++waits > MAX_SECRET_WAITS)
          throw error;
        Bun.sleepSync(SECRET_WAIT_MS);
      }
    }
    if (length > MAX_SECRET_FILE_BYTES)
      throw new Error(`it is longer than ${MAX_SECRET_FILE_BYTES} bytes`);
    const text = bytes.toString("utf8", 0, length).replace(/\r?\n$/, "");
    if (text === "") throw new Error("it is empty");
    return text;
  } finally {
    closeSync(file);
  }
}

/** What is wrong with settings that depend on each other. */
function checkTogether(settings: Partial<Settings<SettingName>>): string[] {
  const { HOST, JWT_SECRET, JWKS_URL, TLS_CERT, TLS_KEY } = settings;
  const invalid: string[] = [];
  if (settings.JOURNAL_URL && !settings.DATABASE_URL)
    invalid.push(
      "JOURNAL_URL is set and DATABASE_URL is not: a journal in a stream needs a Postgres that all servers reach",
    );
  if (HOST && !isLoopback(HOST))
    for (const name of SECRETS) {
      const secrets = [settings[name] ?? []].flat();
      if (secrets.includes(DEFAULT_SECRET))
        invalid.push(`${name} is the default: HOST ${HOST} requires a secret of your own`);
      else if (secrets.some(({ length }) => length < MIN_SECRET_LENGTH))
        invalid.push(
          `${name} is too short: use at least ${MIN_SECRET_LENGTH} characters, as HOST is ${HOST}`,
        );
    }
  const { AUTH_SECRET = [], READ_SECRET = [] } = settings;
  if (READ_SECRET.some((each) => AUTH_SECRET.includes(each)))
    invalid.push(
      "a secret is in both READ_SECRET and AUTH_SECRET, so its readers may write: use another one in READ_SECRET",
    );
  if (JWT_SECRET && JWKS_URL) invalid.push("set JWT_SECRET or JWKS_URL, not both");
  if (!TLS_CERT !== !TLS_KEY)
    invalid.push(`TLS_${TLS_CERT ? "KEY" : "CERT"} is not set: set both TLS_CERT and TLS_KEY`);
  return invalid;
}

/** The settings for a log. Of a secret, it shows only whether it is the default or set. */
export function maskSettings(settings: Partial<Settings<SettingName>>): Record<string, unknown> {
  const masked: Record<string, unknown> = { ...settings };
  if (settings.DATA_DIR) masked["DATA_DIR"] = resolve(settings.DATA_DIR);
  for (const name of Object.keys(settings) as SettingName[])
    if (settings[name] && "isSecret" in SETTINGS[name].kind) {
      const { default: fallback }: Setting = SETTINGS[name];
      masked[name] = String(settings[name]) === fallback ? "(default)" : "(set)";
    }
  return masked;
}

/** What a setting refers to cannot be used. Ends a start with exit code 2, as an invalid setting does. */
export class InvalidSetting extends Error {}

/** `90`, `90s`, `5m`, `2h` or `30d` in milliseconds, or `undefined`. */
export function parseDuration(text: string): number | undefined {
  const [, amount, unit = "s"] = /^(\d{1,7})(s|m|h|d)?$/.exec(text) ?? [];
  const seconds = { s: 1, m: 60, h: 3600, d: 86_400 }[unit];
  return amount === undefined || !seconds ? undefined : Number(amount) * seconds * 1000;
}

/** `bare`: the value of a string option that is given without one. */
interface Option {
  type: "boolean" | "string";
  meaning: string;
  bare?: string;
  /** It may be given several times; its values are an array. */
  multiple?: true;
}

/** What a program accepts, and what its `--help` says. */
export interface Command<P extends Program> {
  program: P;
  /** `bun run app.ts [--no-processor]` */
  usage: string;
  about: string;
  options: Record<string, Option>;
  /** How many arguments may follow the options. */
  maxFiles: number;
  exits: Record<number, string>;
  /** What else is wrong with the settings: a line each, as those of `readSettings`. */
  checks?: readonly ((settings: SettingsOf<P>) => string[])[];
}

/** The options of a command line: strings for options with a value. */
export type Options = Record<string, string | boolean | string[] | undefined>;

/**
 * Reads the command line and the settings of a program. Answers `--help` and `--version` itself. Where something is
 * invalid, says so on stderr, a line each, and ends the program with exit code 2.
 */
export function readCommand<P extends Program>(command: Command<P>) {
  const { settings, invalid } = readSettings(settingsOf(command), process.env);
  exemptThisMachine(settings);
  for (const check of command.checks ?? []) invalid.push(...check(settings as SettingsOf<P>));
  const { options, files, misuse } = readArguments(command);
  if (options["help"]) {
    process.stdout.write(help(command));
    process.exit(0);
  }
  if (options["version"]) {
    process.stdout.write(`daybook ${version}\n`);
    process.exit(0);
  }
  if (misuse || invalid.length > 0) {
    const usage = misuse ? [misuse, `usage: ${command.usage}`] : [];
    for (const line of [...invalid, ...usage]) say(line);
    process.exit(2);
  }
  return { settings: settings as SettingsOf<P>, options, files };
}

/**
 * Requires that DATA_DIR is a folder or can be created; with "write", also that files can be created in it. Throws
 * InvalidSetting.
 */
export function requireDataDir(dataDir: string, access: "read" | "write"): void {
  const path = resolve(dataDir);
  let nearest = path;
  while (!existsSync(nearest)) nearest = dirname(nearest);
  const why = whyUnusable(nearest, access === "write" || nearest !== path);
  if (why)
    throw new InvalidSetting(
      `DATA_DIR is "${dataDir}": use a folder that this user can write to; ${nearest}: ${why}`,
    );
}

function whyUnusable(folder: string, isWritten: boolean): string | null {
  try {
    if (!statSync(folder).isDirectory()) return "not a folder";
    if (isWritten) accessSync(folder, constants.W_OK | constants.X_OK);
    return null;
  } catch (error) {
    return reasonOf(error);
  }
}

/**
 * Which proxy of the environment Bun uses for a URL, for messages: ` (through the proxy HOST:PORT of
 * http_proxy)`, or nothing.
 */
export function describeProxy(url: string): string {
  const { protocol, hostname, host } = new URL(url);
  const { env } = process;
  const names = [`${protocol.slice(0, -1)}_proxy`];
  names.push((names[0] as string).toUpperCase());
  const name = names.find((each) => env[each]);
  const exempt = (env["no_proxy"] || env["NO_PROXY"] || "").split(",").map((each) => each.trim());
  const isExempt = (each: string) =>
    ["*", hostname, host].includes(each) ||
    (each && hostname.endsWith(`.${each.replace(/^\./, "")}`));
  if (!name || exempt.some(isExempt)) return "";
  const proxy = env[name] as string;
  // It may hold a password.
  const shown = URL.canParse(proxy) ? new URL(proxy).host : proxy.replace(/^.*@/, "");
  return ` (through the proxy ${shown} of ${name})`;
}

/** A proxy of the environment cannot reach this machine's own addresses. Bun asks these variables at each request. */
function exemptThisMachine({ SERVER_URL, JWKS_URL }: Partial<Settings<SettingName>>): void {
  const hosts = [SERVER_URL, JWKS_URL].flatMap((url) => (url ? new URL(url).hostname : []));
  const local = ["localhost", "127.0.0.1", "::1", "[::1]", ...hosts.filter(isLoopback)];
  for (const name of ["no_proxy", "NO_PROXY"])
    process.env[name] = [process.env[name] || [], local].flat().join(",");
}

function readArguments({ options, maxFiles }: Command<Program>) {
  const args = process.argv.slice(2).map((arg) => {
    const { bare } = options[arg.slice(2)] ?? {};
    return bare && arg.startsWith("--") ? `${arg}=${bare}` : arg;
  });
  const known = {
    ...options,
    help: { type: "boolean", short: "h" },
    version: { type: "boolean" },
  } as const;
  try {
    const found = parseArgs({ args, options: known, allowPositionals: true });
    const { values, positionals: files } = found;
    if (files.length > maxFiles)
      throw new Error(`too many arguments: found ${files.length}, at most ${maxFiles} allowed`);
    return { options: values as Options, files, misuse: "" };
  } catch (error) {
    const [misuse = ""] = (error as Error).message.split(/\.\s/);
    return { options: {} as Options, files: [], misuse };
  }
}

function settingsOf({ program }: Command<Program>): SettingName[] {
  const names = Object.keys(SETTINGS) as SettingName[];
  return names.filter((name) => (SETTINGS[name].programs as readonly Program[]).includes(program));
}

function help(command: Command<Program>): string {
  const options = {
    ...command.options,
    help: { meaning: "this text; so does -h" },
    version: { meaning: "the version of this program" },
  };
  return [
    `usage: ${command.usage}`,
    "",
    command.about,
    "",
    "options:",
    ...Object.entries(options).map(([name, { meaning }]) => `  --${name.padEnd(14)} ${meaning}`),
    "",
    "settings (environment, or a .env file):",
    ...settingsOf(command).map((name) => {
      const { default: fallback, meaning }: Setting = SETTINGS[name];
      return `  ${name.padEnd(22)} ${meaning} (default: ${fallback ?? "unset"})`;
    }),
    FILES_NOTE,
    "",
    "exit codes:",
    ...Object.entries(command.exits).map(([code, meaning]) => `  ${code}  ${meaning}`),
    "",
  ].join("\n");
}

export function isLoopback(host: string): boolean {
  return /^(localhost|::1|\[::1\])$/i.test(host) || (isIPv4(host) && host.startsWith("127."));
}

function whole(min: number, max: number, requires: string): Kind<number> {
  const parse = (text: string) => {
    const value = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN;
    return value >= min && value <= max ? value : undefined;
  };
  return { requires, parse };
}

function textLike(pattern: RegExp, requires: string): Kind<string> {
  return { requires, parse: (text) => (pattern.test(text) ? text : undefined) };
}

function url(requires: string): Kind<string> {
  const isValid = (text: string) =>
    URL.canParse(text) && ["http:", "https:"].includes(new URL(text).protocol);
  return { requires, parse: (text) => (isValid(text) ? text : undefined) };
}

function secret<T>(kind: Kind<T>): Kind<T> & { isSecret: true } {
  return { ...kind, isSecret: true };
}
