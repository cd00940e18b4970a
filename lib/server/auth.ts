/**
 * Authorization. A write secret grants write and read access, a read secret read access, a token what
 * its scopes say; without `balances:read` a token still reads the balance of its own `sub`.
 *
 * The duration of a check reveals nothing about secrets: all of them are compared, always, as digests
 * of one length.
 */
import { timingSafeEqual } from "node:crypto";

import { DEFAULT_SECRET, isLoopback, type SettingsOf } from "../config.ts";
import { type Log, watchHealth } from "../log.ts";
import { Problem, unavailable } from "./problem.ts";
import { openThrottle } from "./throttle.ts";
import {
  InvalidToken,
  isToken,
  KeysUnavailable,
  openTokens,
  type Scope,
  type Verify,
} from "./token.ts";

export interface Access {
  /** Secrets that grant write and read access. */
  writers: readonly string[];
  /** Secrets that grant read access. */
  readers: readonly string[];
  /** Whether reading requires no credential. */
  readingIsOpen: boolean;
  /** Host names, besides loopback, under which a request is a local one. */
  hosts: readonly string[];
  tokens: Verify | null;
  /** Whether tokens are signed with the default secret: valid for local requests only. */
  tokensAreLocal: boolean;
}

/** The request, and the server, which knows its address. */
export interface Caller {
  request: Request;
  server: Pick<Bun.Server<unknown>, "requestIP"> | null;
}

/** What a caller asks for. */
interface Asked {
  caller: Caller;
  scope: Scope;
  user: string | undefined;
}

export function openAuth(access: Access, log: Log) {
  const { writers, readers, readingIsOpen, hosts, tokens, tokensAreLocal } = access;
  const throttle = openThrottle();
  const writerDigests = writers.map(digest);
  const readerDigests = readers.map(digest);
  const defaultDigest = digest(DEFAULT_SECRET);
  let isRefusalLogged = false;

  /**
   * Returns when the caller may do it; throws the 401, 403, 429 or 503 otherwise. `user` is the one whose
   * balance is read. A secret that grants it returns at once, without a promise.
   */
  return (caller: Caller, scope: Scope, user?: string): Promise<void> | undefined => {
    const { headers } = caller.request;
    if (readingIsOpen && scope === "balances:read" && isLocal(headers, hosts)) return;
    const header = headers.get("authorization") ?? "";
    const credential = header.replace(/^Bearer +/i, "");
    const digested = digest(credential);
    const mayWrite = isAmong(writerDigests, digested);
    const mayRead = isAmong(readerDigests, digested);
    const isDefault =
      timingSafeEqual(defaultDigest, digested) || (tokensAreLocal && isToken(credential));
    if (isDefault && !isLocal(headers, hosts)) return denyDefault(caller);
    if (mayWrite || (mayRead && scope === "balances:read")) return;
    if (mayRead) throw forbidden(scope, "this secret is read-only");
    if (!tokens || !isToken(credential)) return deny(caller);
    return checkToken(tokens, credential, { caller, scope, user });
  };

  async function checkToken(
    tokens: Verify,
    credential: string,
    { caller, scope, user }: Asked,
  ): Promise<void> {
    const claims = await tokens(credential).catch((error) => {
      if (error instanceof InvalidToken) return denyToken(caller, error.fault);
      if (error instanceof KeysUnavailable)
        throw unavailable("tokens cannot be verified now: the issuer's keys are unavailable");
      throw error;
    });
    const isOwn = user !== undefined && user === claims.sub;
    if (!claims.scopes.includes(scope) && !isOwn)
      throw forbidden(scope, `this token lacks the scope ${scope}`);
  }

  /** The default secret is public: it is for this machine's own requests. */
  function denyDefault(caller: Caller): Promise<never> {
    if (!isRefusalLogged)
      log.warn(
        "the default secret was refused: the request came through a proxy or for another Host; " +
          "set a secret of your own",
      );
    isRefusalLogged = true;
    return deny(
      caller,
      "the default secret is valid only for direct requests to this machine; set AUTH_SECRET",
    );
  }

  function denyToken(caller: Caller, fault: string): Promise<never> {
    const parameters = `error="invalid_token", error_description="${fault}"`;
    return deny(caller, `invalid token: ${fault}`, parameters);
  }

  async function deny(
    { request, server }: Caller,
    detail = "the Authorization header must present a secret of this server",
    parameters = "",
  ): Promise<never> {
    const address = server?.requestIP(request)?.address ?? "";
    if (!(await throttle.failed(address)))
      throw new Problem(429, "too many invalid credentials", { headers: { "retry-after": "5" } });
    throw new Problem(401, detail, { headers: challenge(parameters) });
  }
}

/**
 * Whether the request was made to this machine, and through no proxy that says so. A foreign `Host` is
 * also what a page in a browser sends whose name was made to lead here.
 */
function isLocal(headers: Headers, hosts: readonly string[]): boolean {
  const host = (headers.get("host") ?? "").replace(/:\d*$/, "").toLowerCase();
  if (!isLoopback(host) && !hosts.includes(host)) return false;
  for (const name of headers.keys())
    if (name === "forwarded" || name.startsWith("x-forwarded-")) return false;
  return true;
}

function forbidden(scope: Scope, detail: string): Problem {
  const headers = challenge(`error="insufficient_scope", scope="${scope}"`);
  return new Problem(403, detail, { headers });
}

function challenge(parameters = ""): Record<string, string> {
  return { "www-authenticate": `Bearer realm="daybook"${parameters && `, ${parameters}`}` };
}

function isAmong(digests: readonly Uint8Array[], presented: Uint8Array): boolean {
  let isFound = false;
  for (const digest of digests) if (timingSafeEqual(digest, presented)) isFound = true;
  return isFound;
}

function digest(text: string): Uint8Array {
  // A third of the time that a CryptoHasher takes, which was 4 % of a small request.
  return Bun.SHA256.hash(text, new Uint8Array(32)) as Uint8Array;
}

/** Who may do what, by the settings. */
export function readAccess(settings: SettingsOf<"app">, log: Log): Access {
  const { AUTH_SECRET: writers, READ_SECRET: readers = [], HOST, JWT_SECRET } = settings;
  const hosts = [HOST.toLowerCase(), ...(settings.ALLOWED_HOSTS ?? [])];
  const health = watchHealth(log, "error", "tokens: the issuer's keys are available again");
  const readingIsOpen = readers.length === 0 && isLoopback(HOST);
  const tokens = openTokens(settings, health);
  const tokensAreLocal = JWT_SECRET === DEFAULT_SECRET;
  return { writers, readers, readingIsOpen, hosts, tokens, tokensAreLocal };
}
