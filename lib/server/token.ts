/**
 * Tokens: JWT, signed with one secret (HS256) or with the keys of a team's own issuer (JWKS).
 *
 * Which algorithms are good follows from the settings, never from the token: so nobody signs with
 * the public key as if it were a secret, and `none` is as wrong as any other.
 */
import {
  createLocalJWKSet,
  errors,
  type JSONWebKeySet,
  type JWTHeaderParameters,
  type JWTPayload,
  type JWTVerifyGetKey,
  jwtVerify,
  SignJWT,
} from "jose";

const TOLERANCE_S = 30;
const KEY_ALGORITHMS = ["RS256", "ES256", "EdDSA"];
/** Keys are asked for again because of a key that is not among them: not more often than this. */
const REFRESH_MS = 30_000;
/** So old, they are asked for again in any case: a key that was taken back is then gone. */
const STALE_MS = 600_000;
/** Keys that could not be had at all are asked for again after so long. */
const AWAY_MS = 1_000;
const FETCH_MS = 5_000;

/** What can be wrong with a token. These words, and no others, reach who presented it. */
export type TokenFault =
  | "malformed"
  | "wrong_algorithm"
  | "unknown_key"
  | "wrong_signature"
  | "no_expiry"
  | "expired"
  | "not_yet_valid"
  | "wrong_issuer"
  | "wrong_audience";

/** The token is not good. */
export class InvalidToken extends Error {
  constructor(readonly fault: TokenFault) {
    super(fault);
  }
}

/** Whether the token is good cannot be said: there are no keys to be had. */
export class KeysUnavailable extends Error {}

export interface Claims {
  scopes: string[];
  sub: string | undefined;
}

export interface TokenSettings {
  JWT_SECRET?: string | undefined;
  JWKS_URL?: string | undefined;
  JWT_ISSUER?: string | undefined;
  JWT_AUDIENCE?: string | undefined;
}

/** Checks a token. Throws InvalidToken or KeysUnavailable. */
export type Verify = (token: string) => Promise<Claims>;

/** What the outside world is, for the keys: a test can be it. */
export interface World {
  fetch(url: string, init: RequestInit): Promise<Response>;
  now(): number;
}

const world: World = { fetch, now: () => performance.now() };

/** Whether it looks like a token at all; a secret hardly does. */
export function isToken(text: string): boolean {
  return /^[\w-]+\.[\w-]+\.[\w-]*$/.test(text);
}

/**
 * The check for tokens as the settings want it, or `null` where they want none. `having` hears whether
 * there are keys to be had.
 */
export function openTokens(
  { JWT_SECRET, JWKS_URL, JWT_ISSUER, JWT_AUDIENCE }: TokenSettings,
  having: { bad(reason: string): void; good(): void },
  { fetch, now }: World = world,
): Verify | null {
  if (!JWT_SECRET && !JWKS_URL) return null;
  const secret = JWT_SECRET ? new TextEncoder().encode(JWT_SECRET) : null;
  const key = secret ? () => secret : openKeys(JWKS_URL as string, having, { fetch, now });
  const options = {
    algorithms: secret ? ["HS256"] : KEY_ALGORITHMS,
    clockTolerance: TOLERANCE_S,
    requiredClaims: ["exp"],
    ...(JWT_ISSUER ? { issuer: JWT_ISSUER } : {}),
    ...(JWT_AUDIENCE ? { audience: JWT_AUDIENCE } : {}),
  };
  return async (token) => {
    let claims: JWTPayload;
    try {
      claims = (await jwtVerify(token, key as JWTVerifyGetKey, options)).payload;
    } catch (error) {
      if (error instanceof KeysUnavailable) throw error;
      throw new InvalidToken(faultOf(error));
    }
    const { scope, sub } = claims;
    return { scopes: typeof scope === "string" ? scope.split(" ") : [], sub };
  };
}

/** A token of `scope` for `expiresMs` from now, signed with JWT_SECRET. */
export function signToken(
  { JWT_SECRET, JWT_ISSUER, JWT_AUDIENCE }: TokenSettings,
  { scope, expiresMs, sub }: { scope: string; expiresMs: number; sub?: string | undefined },
): Promise<string> {
  const nowS = Math.floor(Date.now() / 1000);
  const token = new SignJWT({ scope })
    .setProtectedHeader({ alg: "HS256", typ: "JWT" })
    .setIssuedAt(nowS)
    .setExpirationTime(nowS + Math.floor(expiresMs / 1000));
  if (sub) token.setSubject(sub);
  if (JWT_ISSUER) token.setIssuer(JWT_ISSUER);
  if (JWT_AUDIENCE) token.setAudience(JWT_AUDIENCE);
  return token.sign(new TextEncoder().encode(JWT_SECRET));
}

/**
 * The keys at `url`, asked for when the first token comes. While the issuer is away, those that were
 * good stay good; a key that is not among them cannot be judged then (KeysUnavailable).
 */
function openKeys(
  url: string,
  having: { bad(reason: string): void; good(): void },
  { fetch, now }: World,
): JWTVerifyGetKey {
  let keys: ReturnType<typeof createLocalJWKSet> | null = null;
  let loading: Promise<void> | null = null;
  let loadedMs = Number.NEGATIVE_INFINITY;
  let refreshedMs = Number.NEGATIVE_INFINITY;
  let away: KeysUnavailable | null = null;
  let awayMs = 0;

  return async (header: JWTHeaderParameters, token) => {
    if (!keys) await load();
    else if (now() - loadedMs > STALE_MS) load().catch(() => {}); // with the old ones meanwhile
    const known = keys as unknown as ReturnType<typeof createLocalJWKSet>;
    try {
      return await known(header, token);
    } catch (error) {
      if (!(error instanceof errors.JWKSNoMatchingKey)) throw error;
      if (loading) await loading;
      else if (now() - refreshedMs > REFRESH_MS) {
        refreshedMs = now();
        await load();
      } else if (away) throw away;
      return (keys as unknown as typeof known)(header, token);
    }
  };

  function load(): Promise<void> {
    if (away && now() - awayMs < AWAY_MS) return Promise.reject(away);
    loading ??= read().finally(() => {
      loading = null;
    });
    return loading;
  }

  async function read(): Promise<void> {
    try {
      const response = await fetch(url, { signal: AbortSignal.timeout(FETCH_MS) });
      if (!response.ok) throw new Error(`it answers ${response.status}`);
      keys = createLocalJWKSet((await response.json()) as JSONWebKeySet);
      loadedMs = now();
      away = null;
      having.good();
    } catch (error) {
      awayMs = now();
      const { host, pathname } = new URL(url); // its query and user may be secrets
      away = new KeysUnavailable(`no keys from ${host}${pathname}: ${(error as Error).message}`);
      having.bad(`tokens: ${away.message}`);
      throw away;
    }
  }
}

const CLAIM_FAULTS: Record<string, TokenFault> = {
  exp: "no_expiry",
  nbf: "not_yet_valid",
  iss: "wrong_issuer",
  aud: "wrong_audience",
};

function faultOf(error: unknown): TokenFault {
  if (error instanceof errors.JWTExpired) return "expired";
  if (error instanceof errors.JWTClaimValidationFailed)
    return CLAIM_FAULTS[error.claim] ?? "malformed";
  if (error instanceof errors.JOSEAlgNotAllowed) return "wrong_algorithm";
  if (error instanceof errors.JWSSignatureVerificationFailed) return "wrong_signature";
  if (error instanceof errors.JWKSNoMatchingKey || error instanceof errors.JWKSMultipleMatchingKeys)
    return "unknown_key";
  return "malformed";
}
