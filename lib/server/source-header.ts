/** A source in HTTP: its name in the path, `Upload-Offset` and `Source-Digest` in the headers. */
import { MAX_SOURCE_BYTES } from "../event/event.ts";
import { Problem } from "./problem.ts";
import { isSourceName, type Taken } from "./sources.ts";

/** The name as it stands in the path, decoded; throws the 422. */
export function sourceName(name: string): string {
  if (isSourceName(name)) return name;
  throw new Problem(422, `a source has a name of 1 to ${MAX_SOURCE_BYTES} UTF-8 bytes`);
}

/** Where the sender thinks that the source stands, and its digest with this body; throws the 422. */
export function sourceOf(headers: Headers): Taken {
  const offset = headers.get("upload-offset") ?? "";
  const digest = headers.get("source-digest") ?? "";
  const errors = [];
  if (!/^\d{1,15}$/.test(offset))
    errors.push({ path: "Upload-Offset", message: "must be a number of bytes" });
  if (!/^[0-9a-f]{64}$/i.test(digest))
    errors.push({ path: "Source-Digest", message: "must be a SHA-256 in hexadecimal" });
  if (errors.length > 0) throw new Problem(422, "the headers do not describe a source", { errors });
  return { offset: Number(offset), digest: digest.toLowerCase() };
}

export function sourceHeaders({ offset, digest }: Taken): Record<string, string> {
  return { "upload-offset": `${offset}`, "source-digest": digest };
}
