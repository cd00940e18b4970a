/**
 * The one table of settings, and the only reader of the environment and the command line. Settings are
 * checked once, when a program starts, and never change.
 */
import { parseArgs } from "node:util";

type Program = "app" | "processor" | "client";

interface Setting<T, Default extends string | undefined, P extends Program> {
  /** The programs that read it. */
  programs: readonly P[];
  default: Default;
  /** What README and `--help` say of it. */
  meaning: string;
  /** What a valid value is, for the error message. */
  requires: string;
  /** The value, or `undefined` when the text is invalid. */
  parse(text: string): T | undefined;
  /** Never show the text. */
  secret?: true;
}

const DEFAULT_SECRET = "secret";
/** On a non-loopback address: 16 random characters are beyond guessing. */
const MIN_SECRET_LENGTH = 16;
const SECRETS = ["AUTH_SECRET", "READ_SECRET", "JWT_SECRET"] as const;
const LOG_LEVELS = ["debug", "info", "warn", "error", "fatal", "silent"] as const;

export const SETTINGS = {
  PORT: setting({
    programs: ["app"],
    default: "8000",
    meaning: "port of the server; `0` picks a free one",
    requires: "a whole number from 0 to 65535",
    parse: (text) => parseWhole(text, 0, 65_535),
  }),
  HOST: setting({
    programs: ["app"],
    default: "127.0.0.1",
    meaning: "address to bind; a non-loopback address requires your own AUTH_SECRET",
    requires: "an address or a host name",
    parse: (text) => (/^[\w.:%-]+$/.test(text) ? text : undefined),
  }),
  AUTH_SECRET: setting({
    programs: ["app", "client"],
    default: DEFAULT_SECRET,
    meaning: "one or several, comma-separated; each grants write and read access",
    requires: "one or more secrets of printable ASCII without spaces",
    parse: parseSecrets,
    secret: true,
  }),
  READ_SECRET: setting({
    programs: ["app"],
    default: undefined,
    meaning: "one or several; each grants read access to balances and metrics",
    requires: "one or more secrets of printable ASCII without spaces",
    parse: parseSecrets,
    secret: true,
  }),
  JWT_SECRET: setting({
    programs: ["app"],
    default: undefined,
    meaning: "accept tokens (JWT) signed with this secret, HS256",
    requires: "a secret of printable ASCII",
    parse: (text) => (/^[ -~]+$/.test(text) ? text : undefined),
    secret: true,
  }),
  JWKS_URL: setting({
    programs: ["app"],
    default: undefined,
    meaning: "accept tokens signed with one of the keys at this URL: RS256, ES256 or EdDSA",
    requires: "http://… or https://…",
    parse: (text) => (hasProtocol(text, "http:", "https:") ? text : undefined),
    secret: true, // its user or query may be one
  }),
  JWT_ISSUER: setting({
    programs: ["app"],
    default: undefined,
    meaning: "required `iss` of tokens",
    requires: "text",
    parse: (text) => text,
  }),
  JWT_AUDIENCE: setting({
    programs: ["app"],
    default: undefined,
    meaning: "required `aud` of tokens",
    requires: "text",
    parse: (text) => text,
  }),
  TLS_CERT: setting({
    programs: ["app"],
    default: undefined,
    meaning: "PEM file of the certificate and its chain, for HTTPS; reloaded on SIGHUP",
    requires: "the path of a file",
    parse: parsePath,
  }),
  TLS_KEY: setting({
    programs: ["app"],
    default: undefined,
    meaning: "PEM file of its key",
    requires: "the path of a file",
    parse: parsePath,
  }),
  DATA_DIR: setting({
    programs: ["app", "processor"],
    default: "./data",
    meaning: "everything this program keeps on disk",
    requires: "a path",
    parse: parsePath,
  }),
  DATABASE_URL: setting({
    programs: ["app", "processor"],
    default: undefined,
    meaning: "a Postgres 13 or later; unset: an embedded Postgres under `DATA_DIR/postgres`",
    requires: "postgres://USER:PASSWORD@HOST:PORT/DATABASE",
    parse: (text) => (hasProtocol(text, "postgres:", "postgresql:") ? text : undefined),
    secret: true,
  }),
  JOURNAL_SEGMENT_BYTES: setting({
    programs: ["app"],
    default: `${256 * 1024 * 1024}`,
    meaning: "size at which a journal file is full and the next one begins",
    requires: "a whole number of bytes, 1 or more",
    parse: (text) => parseWhole(text, 1, 10 ** 15 - 1),
  }),
  JOURNAL_KEEP_DAYS: setting({
    programs: ["app", "processor"],
    default: undefined,
    meaning: "delete full journal files that are older and fully posted; unset: never",
    requires: "a number of days, 0 or more",
    parse: (text) => (/^\d{1,5}(\.\d{1,6})?$/.test(text) ? Number(text) : undefined),
  }),
  ID_DAYS: setting({
    programs: ["app", "processor"],
    default: "30",
    meaning: "how many days event ids are remembered",
    requires: "a whole number from 1 to 36500",
    parse: (text) => parseWhole(text, 1, 36_500),
  }),
  EVENT_TYPES: setting({
    programs: ["app", "processor", "client"],
    default: "add_revenue:+,subtract_revenue:-",
    meaning:
      "event names, and whether they add (`+`), subtract (`-`) or do not count (`0`); a change holds for events posted from then on",
    requires: "NAME:+, NAME:- or NAME:0, comma-separated, each name once",
    parse(text) {
      const names = text.split(",").map((part) => /^([\w.-]{1,64}):[+0-]$/.exec(part.trim())?.[1]);
      return names.includes(undefined) || new Set(names).size < names.length ? undefined : text;
    },
  }),
  EVENT_SCHEMA: setting({
    programs: ["app"],
    default: undefined,
    meaning: "a JSON Schema (2020-12) file that every event must also satisfy",
    requires: "the path of a file",
    parse: parsePath,
  }),
  LOG_LEVEL: setting({
    programs: ["app", "processor"],
    default: "info",
    meaning: LOG_LEVELS.map((level) => `\`${level}\``).join(", "),
    requires: `one of ${LOG_LEVELS.join(", ")}`,
    parse: (text) => LOG_LEVELS.find((level) => level === text),
  }),
  SERVER_URL: setting({
    programs: ["client"],
    default: "http://127.0.0.1:8000",
    meaning: "where the client sends",
    requires: "http://HOST:PORT or https://HOST:PORT",
    parse: (text) => (hasProtocol(text, "http:", "https:") ? text.replace(/\/+$/, "") : undefined),
  }),
  AUTH_TOKEN: setting({
    programs: ["client"],
    default: undefined,
    meaning: "a token that the client presents instead of AUTH_SECRET",
    requires: "printable ASCII without spaces",
    parse: (text) => (/^[!-~]+$/.test(text) ? text : undefined),
    secret: true,
  }),
};

type Table = typeof SETTINGS;
export type SettingName = keyof Table;
export type Settings<Name extends SettingName> = { readonly [N in Name]: Value<Table[N]> };
type Value<S> =
  S extends Setting<infer T, infer Default, Program>
    ? Default extends string
      ? T
      : T | undefined
    : never;
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
    const setting: Setting<unknown, string | undefined, Program> = SETTINGS[name];
    const text = env[name] || setting.default;
    settings[name] = text === undefined ? undefined : setting.parse(text);
    if (text !== undefined && settings[name] === undefined)
      invalid.push(
        `${name} is ${setting.secret ? "invalid" : `"${text}"`}: use ${setting.requires}`,
      );
  }
  invalid.push(...checkTogether(settings as Partial<Settings<SettingName>>));
  return { settings: Object.freeze(settings) as Settings<Name>, invalid };
}

/** What is wrong with settings that depend on each other. */
function checkTogether(settings: Partial<Settings<SettingName>>): string[] {
  const { HOST, JWT_SECRET, JWKS_URL, TLS_CERT, TLS_KEY } = settings;
  const invalid: string[] = [];
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
  if (JWT_SECRET && JWKS_URL) invalid.push("set JWT_SECRET or JWKS_URL, not both");
  if (!TLS_CERT !== !TLS_KEY)
    invalid.push(`TLS_${TLS_CERT ? "KEY" : "CERT"} is not set: set both TLS_CERT and TLS_KEY`);
  return invalid;
}

/** The settings for a log: of a secret only whether it is set. */
export function maskSettings(settings: Partial<Settings<SettingName>>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(settings).map(([name, value]) => {
      const isHidden = "secret" in SETTINGS[name as SettingName] && value !== undefined;
      return [name, isHidden ? "(set)" : value];
    }),
  );
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
}

/** The options of a command line: strings for options with a value. */
export type Options = Record<string, string | boolean | undefined>;

/**
 * Reads the command line and the settings of a program. Answers `--help` itself. Where something is
 * invalid, says so on stderr, a line each, and ends the program with exit code 2.
 */
export function readCommand<P extends Program>(command: Command<P>) {
  const { settings, invalid } = readSettings(settingsOf(command), process.env);
  const { options, files, misuse } = readArguments(command);
  if (options["help"]) {
    process.stdout.write(help(command));
    process.exit(0);
  }
  if (misuse || invalid.length > 0) {
    const usage = misuse ? [misuse, `usage: ${command.usage}`] : [];
    process.stderr.write(`${[...invalid, ...usage].join("\n")}\n`);
    process.exit(2);
  }
  return { settings: settings as SettingsOf<P>, options, files };
}

function readArguments({ options, maxFiles }: Command<Program>) {
  const args = process.argv.slice(2).map((arg) => {
    const { bare } = options[arg.slice(2)] ?? {};
    return bare && arg.startsWith("--") ? `${arg}=${bare}` : arg;
  });
  try {
    const { values, positionals: files } = parseArgs({
      args,
      options: { ...options, help: { type: "boolean" } },
      allowPositionals: true,
    });
    const tooMany = `too many arguments: found ${files.length}, at most ${maxFiles} allowed`;
    return {
      options: values as Options,
      files,
      misuse: files.length > maxFiles ? tooMany : null,
    };
  } catch (error) {
    const [misuse = ""] = (error as Error).message.split(". ");
    return { options: {} as Options, files: [], misuse };
  }
}

function settingsOf({ program }: Command<Program>): SettingName[] {
  const names = Object.keys(SETTINGS) as SettingName[];
  return names.filter((name) => (SETTINGS[name].programs as readonly Program[]).includes(program));
}

function help(command: Command<Program>): string {
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
    ...settingsOf(command).map((name) => {
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

function parseWhole(text: string, min: number, max: number): number | undefined {
  const value = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN;
  return value >= min && value <= max ? value : undefined;
}

function parseSecrets(text: string): string[] | undefined {
  return /^[!-+\--~]+(,[!-+\--~]+)*$/.test(text) ? text.split(",") : undefined;
}

function parsePath(text: string): string | undefined {
  return text.includes("\0") ? undefined : text;
}

function hasProtocol(text: string, ...protocols: string[]): boolean {
  return URL.canParse(text) && protocols.includes(new URL(text).protocol);
}

/** Infers the types of a row of the table. */
function setting<T, Default extends string | undefined, const P extends Program>(
  setting: Setting<T, Default, P>,
): Setting<T, Default, P> {
  return setting;
}
