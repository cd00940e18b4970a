/**
 * The API's description as a page: every route with its parameters, answers and an example for curl. It is
 * made from the OpenAPI document on the server and runs no script. Scalar, the usual reader of such a
 * document, takes 3 MB and `style-src 'unsafe-inline'` on the origin that serves balances.
 */
interface Schema {
  type?: string | string[];
  const?: unknown;
  enum?: unknown[];
  minimum?: number;
  maximum?: number;
  minLength?: number;
  description?: string;
  required?: string[];
  properties?: Record<string, Schema>;
  items?: Schema;
  anyOf?: Schema[];
  allOf?: Schema[];
}

interface Operation {
  summary?: string;
  description?: string;
  security?: unknown[];
  parameters?: { name: string; in: string; required?: boolean; schema?: Schema }[];
  requestBody?: { content: Record<string, { schema?: Schema }> };
  responses?: Record<string, { content?: Record<string, { schema?: Schema }> }>;
}

/** The part of an OpenAPI document that the page shows. */
export interface ApiDocument {
  info: { title: string; version: string; description?: string };
  paths: Record<string, Record<string, Operation>>;
}

const STYLE = `
:root { color-scheme: light dark; --line: light-dark(#ddd, #444); --code: light-dark(#f4f4f4, #222); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; overflow-wrap: anywhere; }
code, pre { font: 0.9em ui-monospace, monospace; background: var(--code); border-radius: 3px; padding: 0 0.2em; }
pre { padding: 0.7em; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); padding: 0.3em 1em 0.3em 0; }
`;

/** Nothing is loaded and nothing runs; the style is known by its digest. */
const CONTENT_SECURITY_POLICY = [
  "default-src 'none'",
  `style-src 'sha256-${new Bun.CryptoHasher("sha256").update(STYLE).digest("base64")}'`,
  "base-uri 'none'",
  "form-action 'none'",
  "frame-ancestors 'none'",
].join("; ");

/** The page for a server at `origin`. */
export function openApiPage({ info, paths }: ApiDocument, origin: string): Response {
  const operations = Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method, operation })),
  );
  const html = `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${escape(info.title)} API</title>
<style>${STYLE}</style>
<h1>${escape(info.title)} API</h1>
<p>${escape(info.description ?? "")} The same as a document for programs: <a href="/openapi/json">/openapi/json</a>.</p>
<p>A credential is a secret or a token: <code>Authorization: SECRET</code> or <code>Authorization: Bearer SECRET</code>.
Errors are problem documents (RFC 9457) with <code>status</code>, <code>title</code>, <code>detail</code> and, for 422, <code>errors</code>.</p>
<ul>
${operations.map(({ path, method }) => `<li><a href="#${anchor(method, path)}"><code>${title(method, path)}</code></a></li>`).join("\n")}
</ul>
${operations.map((one) => section(one, origin)).join("\n")}
</html>
`;
  return new Response(html, {
    headers: {
      "content-type": "text/html; charset=utf-8",
      "content-security-policy": CONTENT_SECURITY_POLICY,
    },
  });
}

interface Named {
  path: string;
  method: string;
  operation: Operation;
}

function section({ path, method, operation }: Named, origin: string): string {
  const { summary = "", description = "", parameters = [], requestBody, responses } = operation;
  const rows = parameters.map(
    ({ name, in: place, required, schema }) =>
      `<tr><td><code>${escape(name)}</code></td><td>${place}${required ? "" : ", optional"}</td><td>${prose(describe(schema))}</td></tr>`,
  );
  const bodies = Object.entries(requestBody?.content ?? {}).map(
    ([type, { schema }]) => `<p>Body: <code>${type}</code></p>${fields(schema)}`,
  );
  const answers = Object.entries(responses ?? {}).flatMap(([status, { content = {} }]) =>
    Object.entries(content).map(
      ([type, { schema }]) => `<p>${status}: <code>${type}</code></p>${fields(schema)}`,
    ),
  );
  return `<section>
<h2 id="${anchor(method, path)}"><code>${title(method, path)}</code></h2>
<p>${prose(summary)}.${operation.security ? " Requires a credential." : ""}</p>
${description && `<p>${prose(description)}</p>`}
${rows.length > 0 ? `<table><tr><th>parameter</th><th>in</th><th>meaning</th></tr>${rows.join("")}</table>` : ""}
${bodies.join("\n")}
${answers.join("\n")}
<pre>${escape(curl({ path, method, operation }, origin))}</pre>
</section>`;
}

/** The properties of an object, those of its parts included, as a table. */
function fields(schema: Schema = {}): string {
  const parts = [schema, ...(schema.allOf ?? [])];
  const rows = parts.flatMap(({ properties = {}, required = [] }) =>
    Object.entries(properties).map(
      ([name, property]) =>
        `<tr><td><code>${escape(name)}</code>${required.includes(name) ? "" : ", optional"}</td><td>${prose(describe(property))}</td></tr>`,
    ),
  );
  return rows.length > 0
    ? `<table><tr><th>field</th><th>meaning</th></tr>${rows.join("")}</table>`
    : "";
}

/** A schema in words: `integer, 1 to 1000`. */
function describe(schema: Schema = {}): string {
  const own = schema.anyOf?.find(({ type }) => type !== "string") ?? schema;
  const { type, items, minimum, maximum } = own;
  const names = own.enum ?? (own.const === undefined ? [] : [own.const]);
  const inner = items?.properties ? Object.keys(items.properties).join(", ") : "";
  return [
    names.length > 0
      ? names.map((name) => `\`${name}\``).join(" or ")
      : [type ?? []].flat().join(" or "),
    inner && `of objects with ${inner}`,
    minimum !== undefined && maximum !== undefined && `${minimum} to ${maximum}`,
    schema.description ?? own.description,
  ]
    .filter(Boolean)
    .join(", ");
}

/** A command that calls the operation, with the shortest body that it accepts. */
function curl({ path, method, operation }: Named, origin: string): string {
  const [type] = Object.keys(operation.requestBody?.content ?? {});
  const event = '{"userId":"user1","name":"add_revenue","value":98}';
  const url = `'${origin}${path.replace("{source}", "events.jsonl").replace(/\{\w+\}/g, "user1")}'`;
  return [
    `curl ${{ get: "", post: "", head: "-I " }[method] ?? `-X ${method.toUpperCase()} `}${url}`,
    operation.security && "-H 'Authorization: SECRET'",
    type && `-H 'Content-Type: ${type}'`,
    method === "patch" &&
      "-H 'Upload-Offset: 0' -H \"Source-Digest: $(sha256sum < events.jsonl | cut -c 1-64)\"",
    method === "patch" ? "--data-binary @events.jsonl" : type && `-d '${event}'`,
  ]
    .filter(Boolean)
    .join(" \\\n  ");
}

function title(method: string, path: string): string {
  return escape(`${method.toUpperCase()} ${path}`);
}

function anchor(method: string, path: string): string {
  return `${method}${path.replace(/\W+/g, "-").replace(/-$/, "")}`;
}

/** Text in which backquotes mark code. */
function prose(text: string): string {
  return escape(text).replace(/`([^`]+)`/g, "<code>$1</code>");
}

function escape(text: string): string {
  return Bun.escapeHTML(text);
}
