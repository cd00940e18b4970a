/** Who may write: whoever presents one of the secrets. */
import { timingSafeEqual } from "node:crypto";

import { Problem } from "./problem.ts";

/**
 * Returns a check of the `Authorization` header: `SECRET` or `Bearer SECRET`. It throws the 401.
 * The time that it takes tells nothing: digests of one length are compared, all of them, always.
 */
export function requireSecret(secrets: readonly string[]): (headers: Headers) => void {
  const known = secrets.map(digest);
  return (headers) => {
    const presented = digest(headers.get("authorization")?.replace(/^Bearer +/i, "") ?? "");
    let good = false;
    for (const secret of known) if (timingSafeEqual(secret, presented)) good = true;
    if (!good)
      throw new Problem(401, "the Authorization header must present the secret of this server", {
        headers: { "www-authenticate": 'Bearer realm="daybook"' },
      });
  };
}

function digest(text: string): Buffer {
  return new Bun.CryptoHasher("sha256").update(text).digest();
}
