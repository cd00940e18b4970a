/**
 * Every failure that HTTP shows, as a problem document (RFC 9457), made in one place. A Problem is
 * what we mean to say; anything else that is thrown is a fault of ours, said on stderr and answered
 * with 500 and nothing about it. No document holds the request, a secret or a stack.
 */
import { Elysia } from "elysia";

const TITLES = {
  400: "Bad Request",
  401: "Unauthorized",
  403: "Forbidden",
  404: "Not Found",
  405: "Method Not Allowed",
  408: "Request Timeout",
  409: "Conflict",
  413: "Content Too Large",
  415: "Unsupported Media Type",
  422: "Unprocessable Content",
  429: "Too Many Requests",
  500: "Internal Server Error",
  503: "Service Unavailable",
  504: "Gateway Timeout",
  507: "Insufficient Storage",
} as const;
type Status = keyof typeof TITLES;

/** A failure to be shown. */
export class Problem extends Error {
  constructor(
    readonly status: Status,
    readonly detail: string,
    readonly more: {
      errors?: { path: string; message: string }[];
      headers?: Record<string, string>;
      /** Of a body that was not taken: what its lines are (an extension member). */
      lines?: object;
    } = {},
  ) {
    super(detail);
  }
}

/** What the server cannot do now but may soon: 503 with `Retry-After`. */
export function unavailable(detail: string): Problem {
  return new Problem(503, detail, { headers: { "retry-after": "1" } });
}

/**
 * The plugin. It must be registered before the routes, for Elysia's hooks hold only for what comes
 * after them. `allowed` names the methods that a path does have.
 */
export function problems(allowed: (path: string) => string[], say: (line: string) => void) {
  const plugin = new Elysia({ name: "problems" });
  // Not chained: a typed client would take each answer for one that may be one of these Responses.
  plugin.onError({ as: "global" }, ({ code, error, path }) => {
    if (code === "NOT_FOUND") return respond(notFound(path));
    if (error instanceof Problem) return respond(error);
    // What a parse hook throws arrives wrapped.
    if (error instanceof Error && error.cause instanceof Problem) return respond(error.cause);
    if (code === "VALIDATION" && error.type === "params")
      return respond(new Problem(404, "there is nothing of this name: it is not UTF-8"));
    if (code === "VALIDATION") {
      // Only the path and the rule: the summary that Elysia makes shows what was found.
      const errors = error.all.map((fault) => ({
        path: "path" in fault ? fault.path : "",
        message: "message" in fault ? String(fault.message) : "is not as described",
      }));
      return respond(new Problem(422, `the ${error.type} is not as described`, { errors }));
    }
    if (code === "PARSE") return respond(new Problem(400, "the body cannot be read"));
    say(`fault: ${error instanceof Error ? error.message : code}`);
    return respond(new Problem(500, "the server failed at this; its own log says why"));
  });
  return plugin;

  function notFound(path: string): Problem {
    const methods = allowed(path);
    if (methods.length === 0) return new Problem(404, "there is no such route; see /openapi");
    const allow = methods.join(", ");
    return new Problem(405, `this route takes ${allow}`, { headers: { allow } });
  }
}

interface Route {
  method: string;
  path: string;
}

/** The methods that `routes` take for `path`: `/userEvents/:userid` stands for any one segment. */
export function allowedMethods(routes: readonly Route[], path: string): string[] {
  const methods = routes.filter((route) => fits(route.path, path)).map(({ method }) => method);
  return [...new Set(methods.includes("GET") ? [...methods, "HEAD"] : methods)];
}

/** Finds the path of the route that a path is of: one of few, whatever is asked for. */
export function routeFinder(routes: readonly Route[]): (path: string) => string {
  const plain = new Set(routes.filter(({ path }) => !path.includes(":")).map(({ path }) => path));
  const patterns = routes.filter(({ path }) => path.includes(":"));
  return (path) => {
    if (plain.has(path)) return path;
    return patterns.find((route) => fits(route.path, path))?.path ?? "other";
  };
}

function fits(route: string, path: string): boolean {
  if (!route.includes(":")) return route === path;
  const segments = path.split("/");
  const parts = route.split("/");
  return (
    parts.length === segments.length &&
    parts.every((part, i) => (part.startsWith(":") ? segments[i] !== "" : part === segments[i]))
  );
}

function respond({ status, detail, more: { errors, headers, lines } }: Problem): Response {
  const document = { type: "about:blank", title: TITLES[status], status, detail, errors, lines };
  return new Response(JSON.stringify(document), {
    status,
    headers: { "content-type": "application/problem+json", ...headers },
  });
}
