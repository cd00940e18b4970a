/**
 * The page at `/` and the files it loads, from memory. They are bundled when the first one is asked for:
 * Bun's own HTML imports cannot carry headers, and so no Content-Security-Policy.
 */
import { bundlePage } from "./page-files.ts";

const HEADERS = {
  "cache-control": "no-cache", // asked for again, by its ETag
  "content-security-policy": [
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "require-trusted-types-for 'script'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ].join("; "),
  "referrer-policy": "no-referrer",
  "x-content-type-options": "nosniff",
  vary: "accept-encoding",
};

const TYPES = {
  "/": "text/html; charset=utf-8",
  "/page.js": "text/javascript; charset=utf-8",
  "/page.css": "text/css; charset=utf-8",
  "/page.svg": "image/svg+xml",
};
export type PagePath = keyof typeof TYPES;
export const PAGE_PATHS = Object.keys(TYPES) as PagePath[];

interface File {
  plain: Uint8Array<ArrayBuffer>;
  gzip: Uint8Array<ArrayBuffer>;
  etag: string;
}

export function openPage() {
  let files: Promise<Record<PagePath, File>> | null = null;

  return async (path: PagePath, { headers: asked }: Request): Promise<Response> => {
    files ??= build().catch((error) => {
      files = null; // the next request tries again
      throw error;
    });
    const { plain, gzip, etag } = (await files)[path];
    const headers: Record<string, string> = { ...HEADERS, "content-type": TYPES[path], etag };
    if (asked.get("if-none-match")?.includes(etag))
      return new Response(null, { status: 304, headers });
    const isGzip = /\bgzip\b(?!;q=0(\.0*)?(,|$))/.test(asked.get("accept-encoding") ?? "");
    if (isGzip) headers["content-encoding"] = "gzip";
    return new Response(isGzip ? gzip : plain, { headers });
  };
}

async function build(): Promise<Record<PagePath, File>> {
  const texts = await bundlePage();
  const files = PAGE_PATHS.map((path) => [path, compress(texts[path])] as const);
  return Object.fromEntries(files) as Record<PagePath, File>;
}

function compress(text: string): File {
  const plain = new TextEncoder().encode(text);
  const etag = `W/"${Bun.hash(plain).toString(36)}"`; // the same for both encodings
  return { plain, gzip: Bun.gzipSync(plain), etag };
}
