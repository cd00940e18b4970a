/**
 * JOURNAL_URL: which stream holds the journal, and how its servers are reached. Nothing here loads the
 * client of NATS. No message repeats what may be a piece of the password.
 */
import { InvalidSetting, type Settings } from "../config.ts";

const FORM = "use nats://HOST[,HOST…]/STREAM[?replicas=N], tls:// for TLS";
const URL_PARTS = /^(nats|tls):\/\/(?:(.*)@)?([^/?@]+)\/([^/?]*)(?:\?(.*))?$/s;
const HOST = /^([\w.-]+|\[[\da-f:.]+\])(:\d{1,5})?$/i;
const STREAM = /^[\w-]{1,64}$/;
const PARAMETERS = new Map<string, [values: RegExp, requires: string]>([
  ["replicas", [/^[1-5]$/, "a number from 1 to 5"]],
  ["creds", [/./, "a credentials file"]],
  ["ca", [/./, "a PEM file of the authority that signed the servers' certificates"]],
]);

export interface JournalUrl {
  stream: string;
  /** As the client takes them: `HOST` or `HOST:PORT`. */
  servers: string[];
  user?: string | undefined;
  password?: string | undefined;
  requiresTls: boolean;
  /** `undefined`: 3 in a cluster, else 1. */
  replicas?: number | undefined;
  /** Files. */
  creds?: string | undefined;
  ca?: string | undefined;
}

/** For `readCommand`: what is wrong with JOURNAL_URL, a line or none. */
export function checkJournalUrl({ JOURNAL_URL: url }: Settings<"JOURNAL_URL">): string[] {
  try {
    if (url) parseJournalUrl(url);
    return [];
  } catch (error) {
    return [(error as Error).message];
  }
}

/** Throws InvalidSetting. */
export function parseJournalUrl(url: string): JournalUrl {
  const [, scheme, login, hosts = "", stream = "", query = ""] = URL_PARTS.exec(url) ?? [];
  if (!scheme) throw invalid(FORM);
  const servers = hosts.split(",");
  if (!servers.every((host) => HOST.test(host)))
    throw invalid(`a host is not a name or an address with or without a port: ${FORM}`);
  if (!STREAM.test(stream))
    throw invalid("the name of the stream must have 1 to 64 letters, digits, _ and -");
  const parameters: Record<string, string> = {};
  for (const [name, value] of new URLSearchParams(query)) {
    const [values, requires] = PARAMETERS.get(name) ?? [];
    if (!values) throw invalid(`an unknown parameter: known are ${[...PARAMETERS.keys()].join()}`);
    if (!values.test(value)) throw invalid(`${name} must be ${requires}`);
    parameters[name] = value;
  }
  const { replicas, creds, ca } = parameters;
  const [user, password] = login?.split(/:(.*)/s).map(decode) ?? [];
  if (creds && user) throw invalid("it has both a user and creds: use one of them");
  return {
    stream,
    servers,
    user,
    password,
    requiresTls: scheme === "tls",
    replicas: replicas === undefined ? undefined : Number(replicas),
    creds,
    ca,
  };
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    throw invalid("its user or password has a % that is not an escape: write it as %25");
  }
}

function invalid(why: string): InvalidSetting {
  return new InvalidSetting(`JOURNAL_URL is invalid: ${why}`);
}
