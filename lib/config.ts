/**
 * The one table of settings, and the only reader of the environment and of the command line.
 * A setting is checked once, at start, and never changes.
 */
import { parseArgs } from "node:util";

interface Setting<T, Default extends string | undefined> {
  default: Default;
  meaning: string;
  /** What a good value looks like, for the line about a wrong one. */
  wanted: string;
  /** The value for what was found, or `undefined` when that is wrong. */
  read(found: string): T | undefined;
  /** Never show what was found. */
  secret?: true;
}

const DEFAULT_SECRET = "secret";
/** On an address that others can reach: 16 characters at random are out of reach of guessing. */
const MIN_SECRET_LENGTH = 16;
const SECRETS = ["AUTH_SECRET", "READ_SECRET", "JWT_SECRET"] as const;
const LOG_LEVELS = ["debug", "info", "warn", "error", "fatal", "silent"] as const;

const SETTINGS = {
  PORT: setting({
    default: "8000",
    meaning: "port of the server; 0 picks a free one",
    wanted: "a whole number from 0 to 65535",
    read: (found) =>
      /^\d{1,5}$/.test(found) && Number(found) <= 65535 ? Number(found) : undefined,
  }),
  HOST: setting({
    default: "127.0.0.1",
    meaning: "address to bind; other than loopback wants an AUTH_SECRET",
    wanted: "an address or a host name",
    read: (found) => (/^[\w.:%-]+$/.test(found) ? found : undefined),
  }),
  AUTH_SECRET: setting({
    default: DEFAULT_SECRET,
    meaning: "what writers must present; several are separated by commas",
    wanted: "one or more secrets of printable ASCII without spaces",
    read: readSecrets,
    secret: true,
  }),
  READ_SECRET: setting({
    default: undefined,
    meaning: "protects balances and metrics, which it lets read; several as above",
    wanted: "one or more secrets of printable ASCII without spaces",
    read: readSecrets,
    secret: true,
  }),
  JWT_SECRET: setting({
    default: undefined,
    meaning: "takes tokens (JWT) that are signed with it, HS256",
    wanted: "a secret of printable ASCII",
    read: (found) => (/^[ -~]+$/.test(found) ? found : undefined),
    secret: true,
  }),
  JWKS_URL: setting({
    default: undefined,
    meaning: "takes tokens that are signed with a key found there, RS256, ES256 or EdDSA",
    wanted: "http://… or https://…, and no JWT_SECRET beside it",
    read: (found) => (hasProtocol(found, "http:", "https:") ? found : undefined),
    secret: true, // a user or a query in it may be one
  }),
  JWT_ISSUER: setting({
    default: undefined,
    meaning: "what a token must have as iss",
    wanted: "text",
    read: (found) => found,
  }),
  JWT_AUDIENCE: setting({
    default: undefined,
    meaning: "what a token must have as, or among, aud",
    wanted: "text",
    read: (found) => found,
  }),
  TLS_CERT: setting({
    default: undefined,
    meaning: "PEM file of the certificate, and those above it: HTTPS; read again on SIGHUP",
    wanted: "the path of a file, and TLS_KEY beside it",
    read: readPath,
  }),
  TLS_KEY: setting({
    default: undefined,
    meaning: "PEM file of its key",
    wanted: "the path of a file, and TLS_CERT beside it",
    read: readPath,
  }),
  DATA_DIR: setting({
    default: "./data",
    meaning: "everything this program keeps on disk",
    wanted: "a path",
    read: readPath,
  }),
  DATABASE_URL: setting({
    default: undefined,
    meaning: "a Postgres to use; unset: a private one under DATA_DIR/postgres",
    wanted: "postgres://USER:PASSWORD@HOST:PORT/DATABASE",
    read: (found) => (hasProtocol(found, "postgres:", "postgresql:") ? found : undefined),
    secret: true,
  }),
  ID_DAYS: setting({
    default: "30",
    meaning: "for how many days the ids of events are remembered",
    wanted: "a whole number from 1 to 36500",
    read: (found) =>
      /^\d{1,5}$/.test(found) && +found >= 1 && +found <= 36_500 ? Number(found) : undefined,
  }),
  JOURNAL_SEGMENT_BYTES: setting({
    default: `${256 * 1024 * 1024}`,
    meaning: "a file of the journal this large is full, and the next one begins",
    wanted: "a whole number of bytes, 1 or more",
    read: (found) => (/^[1-9]\d{0,14}$/.test(found) ? Number(found) : undefined),
  }),
  JOURNAL_KEEP_DAYS: setting({
    default: undefined,
    meaning: "full files that are older and wholly posted are removed; unset: never",
    wanted: "a number of days, 0 or more",
    read: (found) => (/^\d{1,5}(\.\d{1,6})?$/.test(found) ? Number(found) : undefined),
  }),
  LOG_LEVEL: setting({
    default: "info",
    meaning: `how much is said on stderr: ${LOG_LEVELS.join(", ")}`,
    wanted: `one of ${LOG_LEVELS.join(", ")}`,
    read: (found) => LOG_LEVELS.find((level) => level === found),
  }),
  AUTH_TOKEN: setting({
    default: undefined,
    meaning: "a token to present instead of AUTH_SECRET",
    wanted: "printable ASCII without spaces",
    read: (found) => (/^[!-~]+$/.test(found) ? found : undefined),
    secret: true,
  }),
  EVENT_TYPES: setting({
    default: "add_revenue:+,subtract_revenue:-",
    meaning: "names that events may have, and whether they count: + adds, - subtracts, 0 does not",
    wanted: "NAME:+, NAME:- or NAME:0, separated by commas, each name once",
    read: (found) => {
      const names = found.split(",").map((part) => /^([\w.-]{1,64}):[+0-]$/.exec(part.trim())?.[1]);
      return names.includes(undefined) || new Set(names).size < names.length ? undefined : found;
    },
  }),
  EVENT_SCHEMA: setting({
    default: undefined,
    meaning: "a JSON Schema (2020-12) file that each event must satisfy besides",
    wanted: "a path",
    read: readPath,
  }),
  SERVER_URL: setting({
    default: "http://127.0.0.1:8000",
    meaning: "where the client sends",
    wanted: "http://HOST:PORT or https://HOST:PORT",
    read: (found) =>
      hasProtocol(found, "http:", "https:") ? found.replace(/\/+$/, "") : undefined,
  }),
};

export type SettingName = keyof typeof SETTINGS;
export type Settings<Name extends SettingName> = {
  readonly [N in Name]: Value<(typeof SETTINGS)[N]>;
};
type Value<S> =
  S extends Setting<infer T, infer Default> ? (Default extends string ? T : T | undefined) : never;

/**
 * Reads the settings `names` from `env`. `wrong` has one line for each that cannot be used: name,
 * what was found, what is wanted. An empty setting counts as unset.
 */
export function readSettings<Name extends SettingName>(
  names: readonly Name[],
  env: Record<string, string | undefined>,
): { settings: Settings<Name>; wrong: string[] } {
  const wrong: string[] = [];
  const settings: Record<string, unknown> = {};
  for (const name of names) {
    const {
      default: fallback,
      wanted,
      read,
      secret,
    } = SETTINGS[name] as Setting<unknown, string | undefined>;
    const found = env[name] || fallback;
    settings[name] = found === undefined ? undefined : read(found);
    if (found !== undefined && settings[name] === undefined)
      wrong.push(`${name}: found ${secret ? "something else" : `"${found}"`}, wanted ${wanted}`);
  }
  const { HOST, JWT_SECRET, JWKS_URL, TLS_CERT, TLS_KEY } = settings as Record<string, string>;
  if (HOST && !isLoopback(HOST))
    for (const name of SECRETS) {
      const secrets = [settings[name] ?? []].flat() as string[];
      const because = `because HOST ${HOST} can be reached from outside`;
      if (secrets.includes(DEFAULT_SECRET))
        wrong.push(`${name}: found the default, wanted a secret of your own, ${because}`);
      else if (secrets.some(({ length }) => length < MIN_SECRET_LENGTH))
        wrong.push(
          `${name}: found too short a one, wanted ${MIN_SECRET_LENGTH} characters, ${because}`,
        );
    }
  if (JWT_SECRET && JWKS_URL) wrong.push("JWKS_URL: found beside JWT_SECRET, wanted one of both");
  if (!TLS_CERT !== !TLS_KEY)
    wrong.push(`TLS_${TLS_CERT ? "KEY" : "CERT"}: found none, wanted one, as the other is set`);
  return { settings: Object.freeze(settings) as Settings<Name>, wrong };
}

/** The settings as they may be shown: of what is secret, only that it is set. */
export function maskSettings(settings: Partial<Settings<SettingName>>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(settings).map(([name, value]) => [
      name,
      SETTINGS[name as SettingName].secret && value !== undefined ? "(set)" : value,
    ]),
  );
}

/** What a setting names cannot be used. Ends the start with exit code 2, as a wrong setting does. */
export class InvalidSetting extends Error {}

/** `90`, `90s`, `5m`, `2h` or `30d` in milliseconds, or `undefined`. */
export function parseDuration(text: string): number | undefined {
  const [, amount, unit = "s"] = /^(\d{1,7})(s|m|h|d)?$/.exec(text) ?? [];
  const seconds = { s: 1, m: 60, h: 3600, d: 86_400 }[unit];
  return amount === undefined || !seconds ? undefined : Number(amount) * seconds * 1000;
}

/** `alone`: what an option that takes a word means without one. */
interface Option {
  type: "boolean" | "string";
  meaning: string;
  alone?: string;
}

/** What a program says of itself in `--help`, and what it takes. */
export interface Command<Name extends SettingName> {
  /** `bun run app.ts [--no-processor]` */
  usage: string;
  about: string;
  options: Record<string, Option>;
  /** How many arguments may follow the options. */
  files: { atMost: number };
  settings: readonly Name[];
  exits: Record<number, string>;
}

/**
 * Reads the command line and the settings of a program. Answers `--help` itself; what is wrong is
 * said on stderr, a line each, and ends the program with exit code 2.
 */
export function readCommand<Name extends SettingName>(command: Command<Name>) {
  const { settings, wrong } = readSettings(command.settings, process.env);
  let options: Record<string, string | boolean | undefined> = {};
  let files: string[] = [];
  try {
    const parsed = parseArgs({
      args: process.argv.slice(2).map((arg) => {
        const { alone } = command.options[arg.slice(2)] ?? {};
        return alone && arg.startsWith("--") ? `${arg}=${alone}` : arg;
      }),
      options: { ...command.options, help: { type: "boolean" } },
      allowPositionals: true,
    });
    options = parsed.values as typeof options;
    files = parsed.positionals;
    if (files.length > command.files.atMost)
      wrong.push(
        `too many arguments: found ${files.length}, wanted ${command.files.atMost} at most`,
      );
  } catch (error) {
    wrong.push((error as Error).message.split(". ")[0] as string);
  }
  if (options["help"]) {
    process.stdout.write(help(command));
    process.exit(0);
  }
  if (wrong.length > 0) {
    process.stderr.write(`${wrong.join("\n")}\n`);
    if (files.length > command.files.atMost || wrong.some((line) => !/^[A-Z_]+: /.test(line)))
      process.stderr.write(`usage: ${command.usage}\n`);
    process.exit(2);
  }
  return { settings, options, files };
}

function help(command: Command<SettingName>): string {
  const options = { ...command.options, help: { meaning: "this text" } };
  return [
    `usage: ${command.usage}`,
    "",
    command.about,
    "",
    "options:",
    ...Object.entries(options).map(([name, { meaning }]) => `  --${name.padEnd(14)} ${meaning}`),
    "",
    "settings (environment, or a .env file):",
    ...command.settings.map((name) => {
      const { default: fallback, meaning } = SETTINGS[name];
      return `  ${name.padEnd(22)} ${meaning} (default: ${fallback ?? "unset"})`;
    }),
    "",
    "exit codes:",
    ...Object.entries(command.exits).map(([code, meaning]) => `  ${code}  ${meaning}`),
    "",
  ].join("\n");
}

export function isLoopback(host: string): boolean {
  return /^(localhost|127(\.\d{1,3}){3}|::1|\[::1\])$/i.test(host);
}

function readSecrets(found: string): string[] | undefined {
  return /^[!-+\--~]+(,[!-+\--~]+)*$/.test(found) ? found.split(",") : undefined;
}

function readPath(found: string): string | undefined {
  return found.includes("\0") ? undefined : found;
}

function hasProtocol(found: string, ...protocols: string[]): boolean {
  return URL.canParse(found) && protocols.includes(new URL(found).protocol);
}

function setting<T, Default extends string | undefined>(
  setting: Setting<T, Default>,
): Setting<T, Default> {
  return setting;
}
