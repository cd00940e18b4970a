/**
 * The one place that turns failures into problem documents (RFC 9457). A Problem is meant for the
 * caller. Anything else that is thrown is our own fault: it is logged, and answered with a bare 500.
 * No document holds the request, a secret or a stack.
 */
import { STATUS_CODES } from "node:http";

import { Elysia } from "elysia";

/** Node's own are those of the RFCs before RFC 9110. */
const TITLES: Record<number, string | undefined> = {
  ...STATUS_CODES,
  413: "Content Too Large",
  422: "Unprocessable Content",
};

/** A failure that the caller may see. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly detail: string,
    readonly more: {
      errors?: { path: string; message: string }[];
      headers?: Record<string, string>;
      /** What the lines of a body are that was not stored (an extension member). */
      lines?: object;
      /** How many bytes of the body would be stored (an extension member). */
      bytes?: number;
    } = {},
  ) {
    super(detail);
  }
}

/** 422: this parameter of the query is invalid; without a name, their combination is. */
export function invalidQuery(name: string, message: string): Problem {
  const errors = [{ path: name && `/${name}`, message }];
  return new Problem(422, "the query is invalid", { errors });
}

/** 503 with `Retry-After`: the server cannot do this now, but may soon. */
export function unavailable(detail: string): Problem {
  return new Problem(503, detail, { headers: { "retry-after": "1" } });
}

/**
 * The plugin. Register it before the routes: Elysia's hooks hold only for what is registered after
 * them. `allowed` names the methods of a path; `logFault` gets our own faults.
 */
export function problems(allowed: (path: string) => string[], logFault: (line: string) => void) {
  const plugin = new Elysia({ name: "problems" });
  // Not chained: a typed client would then expect one of these Responses from every route.
  plugin.onError({ as: "global" }, ({ code, error, path }) => {
    if (code === "NOT_FOUND") return respond(notFound(path));
    if (error instanceof Problem) return respond(error);
    // Elysia wraps what a parse hook throws.
    if (error instanceof Error && error.cause instanceof Problem) return respond(error.cause);
    if (code === "VALIDATION" && error.type === "params")
      return respond(new Problem(404, "not found: the name is not UTF-8"));
    if (code === "VALIDATION") {
      // Only the path and the rule: Elysia's own summary echoes the value.
      const errors = error.all.map((fault) => ({
        path: "path" in fault ? fault.path : "",
        message: "message" in fault ? String(fault.message) : "is invalid",
      }));
      return respond(new Problem(422, `the ${error.type} is invalid`, { errors }));
    }
    if (code === "PARSE") return respond(new Problem(400, "the body cannot be read"));
    logFault(`internal error: ${error instanceof Error ? error.message : code}`);
    return respond(new Problem(500, "internal error; see the server log"));
  });
  return plugin;

  function notFound(path: string): Problem {
    const methods = allowed(path);
    if (methods.length === 0) return new Problem(404, "no such route; see /openapi");
    const allow = methods.join(", ");
    return new Problem(405, `this route accepts ${allow}`, { headers: { allow } });
  }
}

interface Route {
  method: string;
  path: string;
}

/** The methods that `routes` accept for `path`; a parameter such as `:userid` stands for one segment. */
export function allowedMethods(routes: readonly Route[], path: string): string[] {
  const methods = routes.filter((route) => fits(route.path, path)).map(({ method }) => method);
  return [...new Set(methods.includes("GET") ? [...methods, "HEAD"] : methods)];
}

/** The pattern of the route of `path`, or `other`: few values, whatever is requested. */
export function routeOf(routes: readonly Route[], path: string): string {
  return routes.find((route) => fits(route.path, path))?.path ?? "other";
}

function fits(route: string, path: string): boolean {
  const parameter = route.indexOf(":");
  if (parameter < 0) return route === path;
  // Every parameter is the last segment of its route.
  return path.startsWith(route.slice(0, parameter)) && /^[^/]+$/.test(path.slice(parameter));
}

/** The document of a failure. */
export function respond({
  status,
  detail,
  more: { errors, headers, lines, bytes },
}: Problem): Response {
  const document = {
    type: "about:blank",
    title: TITLES[status],
    status,
    detail,
    errors,
    lines,
    bytes,
  };
  return new Response(JSON.stringify(document), {
    status,
    headers: { "content-type": "application/problem+json", ...headers },
  });
}
