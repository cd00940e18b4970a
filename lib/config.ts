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
    read: (found) => (/^[!-+\--~]+(,[!-+\--~]+)*$/.test(found) ? found.split(",") : undefined),
    secret: true,
  }),
  DATA_DIR: setting({
    default: "./data",
    meaning: "everything this program keeps on disk",
    wanted: "a path",
    read: (found) => (found.includes("\0") ? undefined : found),
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
  const { HOST, AUTH_SECRET } = settings as { HOST?: string; AUTH_SECRET?: string[] };
  if (HOST && !isLoopback(HOST) && AUTH_SECRET?.includes(DEFAULT_SECRET))
    wrong.push(
      `AUTH_SECRET: found the default, wanted a secret of your own, because HOST ${HOST} can be reached from outside`,
    );
  return { settings: Object.freeze(settings) as Settings<Name>, wrong };
}

/** `90`, `90s`, `5m` or `2h` in milliseconds, or `undefined`. */
export function parseDuration(text: string): number | undefined {
  const [, amount, unit = "s"] = /^(\d{1,7})(s|m|h)?$/.exec(text) ?? [];
  const seconds = { s: 1, m: 60, h: 3600 }[unit];
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

function hasProtocol(found: string, ...protocols: string[]): boolean {
  return URL.canParse(found) && protocols.includes(new URL(found).protocol);
}

function setting<T, Default extends string | undefined>(
  setting: Setting<T, Default>,
): Setting<T, Default> {
  return setting;
}
