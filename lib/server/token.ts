/**
 * Tokens: JWT, signed with one secret (HS256) or with the keys of a team's own issuer (JWKS).
 *
 * The settings decide which algorithms are accepted, never the token. So nobody can sign with the
 * public key as if it were a secret, and `none` is as invalid as any other.
 */
import {
  createLocalJWKSet,
  createRemoteJWKSet,
  customFetch,
  errors,
  type FetchImplementation,
  type JWTPayload,
  type JWTVerifyGetKey,
  jwtVerify,
  SignJWT,
} from "jose";

import { describeProxy, parseDuration, type SettingsOf } from "../config.ts";
import type { Health } from "../log.ts";
import { print, say } from "../progress.ts";

const TOLERANCE_S = 30;
const MAX_KEYS_BYTES = 1024 * 1024;
const KEY_ALGORITHMS = ["RS256", "ES256", "EdDSA"];

/**
 * What is wrong with a token, by the code of jose's error or else by the claim that it names. The caller
 * gets these words, or `malformed`, and no others.
 */
const FAULTS: Record<string, string> = {
  [errors.JWTExpired.code]: "expired",
  [errors.JOSEAlgNotAllowed.code]: "wrong_algorithm",
  [errors.JWSSignatureVerificationFailed.code]: "wrong_signature",
  [errors.JWKSNoMatchingKey.code]: "unknown_key",
  [errors.JWKSMultipleMatchingKeys.code]: "unknown_key",
  exp: "no_expiry",
  nbf: "not_yet_valid",
  iss: "wrong_issuer",
  aud: "wrong_audience",
};

export class InvalidToken extends Error {
  constructor(readonly fault: string) {
    super(fault);
  }
}

export type Scope = "events:write" | "balances:read";
export const SCOPES: readonly string[] = ["events:write", "balances:read"] satisfies Scope[];

/** The issuer's keys are unavailable, so the token can be neither accepted nor rejected. */
export class KeysUnavailable extends Error {}

type SettingName = "JWT_SECRET" | "JWKS_URL" | "JWT_ISSUER" | "JWT_AUDIENCE";
type TokenSettings = Partial<Pick<SettingsOf<"app">, SettingName>>;

/** Verifies a token. Throws InvalidToken or KeysUnavailable. */
export type Verify = NonNullable<ReturnType<typeof openTokens>>;

/** Whether the text has the form of a token; a secret hardly has. */
export function isToken(text: string): boolean {
  return /^[\w-]+\.[\w-]+\.[\w-]*$/.test(text);
}

/**
 * The verifier that the settings ask for, or `null` where they accept no tokens. `health` learns
 * whether the issuer's keys are available.
 */
export function openTokens(
  { JWT_SECRET, JWKS_URL, JWT_ISSUER, JWT_AUDIENCE }: TokenSettings,
  health: Health,
  fetchKeys: FetchImplementation = fetch,
) {
  if (!JWT_SECRET && !JWKS_URL) return null;
  const secret = JWT_SECRET ? new TextEncoder().encode(JWT_SECRET) : null;
  const key = secret ? () => secret : remoteKeys(JWKS_URL as string, health, fetchKeys);
  const options = {
    algorithms: secret ? ["HS256"] : KEY_ALGORITHMS,
    clockTolerance: TOLERANCE_S,
    requiredClaims: ["exp"],
    ...(JWT_ISSUER ? { issuer: JWT_ISSUER } : {}),
    ...(JWT_AUDIENCE ? { audience: JWT_AUDIENCE } : {}),
  };
  return async (token: string) => {
    const verified = await jwtVerify(token, key as JWTVerifyGetKey, options).catch(toInvalidToken);
    const { sub, exp, nbf = 0, iat = 0 } = verified.payload;
    // 1e999 is Infinity: it would never expire.
    if (![exp, nbf, iat].every(Number.isFinite)) throw new InvalidToken("malformed");
    return { scopes: scopesOf(verified.payload), sub };
  };
}

/**
 * `app.ts --token`: prints a token that a server with these settings accepts. Returns the exit code; 2
 * where an option or setting is missing or invalid, after a line for each.
 */
export async function printToken(
  { JWT_SECRET, JWT_ISSUER, JWT_AUDIENCE }: TokenSettings,
  options: { token?: boolean; scope?: string; expires?: string; sub?: string },
): Promise<number> {
  const { scope = "", expires = "", sub } = options;
  if (!options.token) {
    say("--scope, --expires and --sub require --token");
    return 2;
  }
  const expiresMs = parseDuration(expires);
  const invalid = [];
  if (!JWT_SECRET) invalid.push("JWT_SECRET is not set: use the one of the server");
  if (!scope.split(" ").every((each) => SCOPES.includes(each)))
    invalid.push(`--scope is "${scope}": use ${SCOPES.join(" or ")}, or both in quotes`);
  if (!expiresMs) invalid.push(`--expires is "${expires}": use a duration like 12h or 30d`);
  for (const line of invalid) say(line);
  if (!expiresMs || invalid.length > 0) return 2;
  const nowS = Math.floor(Date.now() / 1000);
  const token = new SignJWT({ scope })
    .setProtectedHeader({ alg: "HS256", typ: "JWT" })
    .setIssuedAt(nowS)
    .setExpirationTime(nowS + Math.floor(expiresMs / 1000));
  if (sub) token.setSubject(sub);
  if (JWT_ISSUER) token.setIssuer(JWT_ISSUER);
  if (JWT_AUDIENCE) token.setAudience(JWT_AUDIENCE);
  print(await token.sign(new TextEncoder().encode(JWT_SECRET)));
  return 0;
}

/**
 * The keys at `url`, fetched with the first token and again as jose decides: for an unknown key at most
 * every 30 s, else after 10 minutes. While the issuer is down, the keys that it served last stay valid.
 */
function remoteKeys(url: string, health: Health, fetchKeys: FetchImplementation): JWTVerifyGetKey {
  const bounded: FetchImplementation = async (from, init) => {
    const response = await fetchKeys(from, { ...init, redirect: "manual" });
    return new Response(await readKeys(response), { status: response.status });
  };
  const remote = createRemoteJWKSet(new URL(url), { [customFetch]: bounded });
  return async (header, token) => {
    try {
      const key = await remote(header, token);
      health.recovered();
      return key;
    } catch (error) {
      if (faultOf(error) === "unknown_key") throw error; // the issuer has answered
      const { host, pathname } = new URL(url); // its query and user may be secrets
      const unavailable = new KeysUnavailable(
        `cannot fetch keys from ${host}${pathname}${describeProxy(url)}: ${(error as Error).message}`,
      );
      health.failing(`tokens: ${unavailable.message}`);
      const known = remote.jwks();
      if (!known) throw unavailable;
      return createLocalJWKSet(known)(header, token).catch(() => {
        throw unavailable;
      });
    }
  };
}

/** An issuer's answer, which must be small: it stays in memory. */
async function readKeys(response: Response): Promise<Uint8Array<ArrayBuffer>> {
  const chunks: Uint8Array[] = [];
  let bytes = 0;
  for await (const chunk of response.body ?? []) {
    bytes += chunk.length;
    if (bytes > MAX_KEYS_BYTES)
      throw new Error(`the answer is larger than ${MAX_KEYS_BYTES} bytes`);
    chunks.push(chunk);
  }
  return new Uint8Array(Buffer.concat(chunks));
}

/**
 * What a token grants, as issuers say it: a string with blanks (RFC 8693) or an array, in `scope`, `scp`
 * (Microsoft Entra, Okta) or `permissions` (Auth0).
 */
function scopesOf(payload: JWTPayload): unknown[] {
  const claims = [payload["scope"], payload["scp"], payload["permissions"]];
  return claims.flatMap((claim) => (typeof claim === "string" ? claim.split(" ") : (claim ?? [])));
}

function toInvalidToken(error: Error): never {
  throw error instanceof KeysUnavailable ? error : new InvalidToken(faultOf(error));
}

function faultOf(error: unknown): string {
  const { code = "", claim = "" } = error as { code?: string; claim?: string };
  return FAULTS[code] ?? FAULTS[claim] ?? "malformed";
}
