/**
 * Who may do what. A writer's secret lets write and read, a reader's lets read, a token what its
 * scopes say; without `balances:read` it still lets read the balance of its own `sub`.
 *
 * The time that a check takes tells nothing of secrets: digests of one length are compared, all of
 * them, always.
 */
import { timingSafeEqual } from "node:crypto";

import { Problem, unavailable } from "./problem.ts";
import { openThrottle, type Throttle } from "./throttle.ts";
import {
  InvalidToken,
  type Claims,
  isToken,
  KeysUnavailable,
  type TokenFault,
  type Verify,
} from "./token.ts";

export type Scope = "events:write" | "balances:read";
export const SCOPES: readonly string[] = ["events:write", "balances:read"] satisfies Scope[];

export interface Access {
  /** What lets write and read. */
  writers: readonly string[];
  /** What lets read. */
  readers: readonly string[];
  /** Whether nothing at all is asked of who reads. */
  readingIsOpen: boolean;
  tokens: Verify | null;
}

/** Who asks. */
export interface Asking {
  request: Request;
  /** Knows where the request comes from. */
  server: Pick<Bun.Server<unknown>, "requestIP"> | null;
}

interface Wish extends Asking {
  scope: Scope;
  /** Whose balance is read, where it is that. */
  user?: string;
}

/** Returns a check of who asks; it throws the 401, the 403, or whatever must be answered instead. */
export function openAuth(
  { writers, readers, readingIsOpen, tokens }: Access,
  throttle: Throttle = openThrottle(),
): (wish: Wish) => Promise<void> {
  const writing = writers.map(digest);
  const reading = readers.map(digest);
  return async ({ request, server, scope, user }) => {
    if (readingIsOpen && scope === "balances:read") return;
    const presented = request.headers.get("authorization")?.replace(/^Bearer +/i, "") ?? "";
    const digested = digest(presented);
    const mayWrite = isAmong(writing, digested);
    const mayRead = isAmong(reading, digested);
    if (mayWrite || (mayRead && scope === "balances:read")) return;
    if (mayRead) throw forbidden(scope, "this secret lets read, not write");
    if (!tokens || !isToken(presented)) return refuse({ request, server });
    const claims = await judge(tokens, presented, { request, server });
    const isOwn = user !== undefined && user === claims.sub;
    if (!claims.scopes.includes(scope) && !isOwn)
      throw forbidden(scope, `this token lacks the scope ${scope}`);
  };

  async function judge(verify: Verify, token: string, asking: Asking): Promise<Claims> {
    try {
      return await verify(token);
    } catch (error) {
      if (error instanceof InvalidToken) return refuse(asking, error.fault);
      if (error instanceof KeysUnavailable) throw unavailable("tokens cannot be checked now");
      throw error;
    }
  }

  async function refuse({ request, server }: Asking, fault?: TokenFault): Promise<never> {
    const address = server?.requestIP(request)?.address ?? "";
    if (!(await throttle.failed(address)))
      throw new Problem(429, "too many wrong secrets and tokens", {
        headers: { "retry-after": "5" },
      });
    throw fault
      ? new Problem(401, `the token is not good: ${fault}`, {
          headers: challenge(`error="invalid_token", error_description="${fault}"`),
        })
      : new Problem(401, "the Authorization header must present the secret of this server", {
          headers: challenge(),
        });
  }
}

function forbidden(scope: Scope, detail: string): Problem {
  return new Problem(403, detail, {
    headers: challenge(`error="insufficient_scope", scope="${scope}"`),
  });
}

function challenge(more = ""): Record<string, string> {
  return { "www-authenticate": `Bearer realm="daybook"${more && `, ${more}`}` };
}

function isAmong(known: readonly Buffer[], presented: Buffer): boolean {
  let found = false;
  for (const secret of known) if (timingSafeEqual(secret, presented)) found = true;
  return found;
}

function digest(text: string): Buffer {
  return new Bun.CryptoHasher("sha256").update(text).digest();
}
