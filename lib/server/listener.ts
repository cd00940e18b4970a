/** The port: serves the app over HTTP or HTTPS, observes each answer, and stops. */
import { readFileSync } from "node:fs";
import { createSecureContext } from "node:tls";

import type { AnyElysia } from "elysia";

import { InvalidSetting, type SettingsOf } from "../config.ts";
import type { Log } from "../log.ts";
import type { Metrics } from "./metrics.ts";
import { Problem, respond } from "./problem.ts";
import { mustClose } from "./refused-body.ts";

/** Requests in progress at SIGTERM may take this long; with all the rest the stop takes under 5 s. */
const FINISH_MS = 1_500;
/** Bun closes an idle connection up to this much before the time it was given, and accepts 255 at most. */
const EARLY_S = 4;
const MAX_IDLE_S = 255;
/** A sender's own request id is kept if it can stand in a log. */
const REQUEST_ID = /^[\w.:+/=-]{1,128}$/;

/** Of two, a proxy before this server may have decided by the other one. */
const INVALID_HOST = new Problem(400, "send one Host header, which names a host");
/** Elysia looks for the path of an HTTPS URL after this index. */
const PATH_AFTER = 11;

/** Where to listen; with the paths of PEM files, over HTTPS. */
type Address = Pick<SettingsOf<"app">, "HOST" | "PORT" | "IDLE_SECONDS" | "TLS_CERT" | "TLS_KEY">;

/**
 * For Elysia's `wrap`: gives each request an id, counts its answer, and logs it at level `debug`. It is
 * wrapped around the app, not part of it, so every answer passes it, a failure's too.
 */
export function observe(log: Log, metrics: Metrics, routeOf: (path: string) => string) {
  // A prefix for each start and a counter: a UUID for each request took 2 %.
  const prefix = crypto.randomUUID().slice(0, 8);
  let requests = 0;
  const isLogged = log.isLevelEnabled("debug");
  return (handle: (request: Request, ...rest: any[]) => Response | Promise<Response>) =>
    async (request: Request, ...rest: unknown[]): Promise<Response> => {
      const startedMs = performance.now();
      const given = request.headers.get("x-request-id");
      const id =
        given !== null && REQUEST_ID.test(given) ? given : `${prefix}-${(requests++).toString(36)}`;
      completeUrl(request);
      const response = hasHost(request) ? await handle(request, ...rest) : respond(INVALID_HOST);
      response.headers.set("x-request-id", id);
      const { method } = request;
      const { status } = response;
      if (status >= 400 && (await mustClose(request, response)))
        response.headers.set("connection", "close");
      const route = routeOf(pathOf(request.url));
      const ms = performance.now() - startedMs;
      metrics.answered(method, route, status, ms / 1000);
      if (!isLogged) return response;
      log.debug({ id, method, route, status, ms: Math.round(ms * 1000) / 1000 }, "request");
      return response;
    };
}

/** Serves `app` at `address`. Throws one line that names what is wrong with the address or the files. */
export function listen(app: AnyElysia, address: Address) {
  const { HOST: hostname } = address;
  const certificate = readCertificate(address);
  const draining = new Set<Bun.Server<unknown>>();
  let server = serve(address.PORT, certificate);
  const { port } = server;
  const host = hostname.includes(":") ? `[${hostname}]` : hostname;

  return {
    /** `http://HOST:PORT` */
    origin: `${certificate ? "https" : "http"}://${host}:${port}`,
    /** Reads the certificate again. Where it is invalid, the old one stays in use, and the log says why. */
    renewCertificate(log: Log): void {
      // Bun's `reload` ignores a new certificate. So a second server listens beside the first, which
      // then stops: it answers what it has begun and closes idle connections. A sender that uses one
      // of these at that moment has to retry.
      const old = server;
      try {
        server = serve(port as number, readCertificate(address));
      } catch (error) {
        return log.error(`the old certificate stays in use: ${(error as Error).message}`);
      }
      log.info("certificate reloaded");
      draining.add(old);
      old.stop().then(() => draining.delete(old));
    },
    /** Closes the connections that wait for their next request. */
    closeIdle(): void {
      for (const each of [server, ...draining]) each.closeIdleConnections();
    },
    /** Stops accepting, and lets requests in progress finish. */
    async finish(): Promise<void> {
      const servers = [server, ...draining];
      const stopped = Promise.all(servers.map((each) => each.stop()));
      await Promise.race([stopped, Bun.sleep(FINISH_MS)]);
      await Promise.all(servers.map((each) => each.stop(true)));
    },
  };

  function serve(port: number, tls: typeof certificate): Bun.Server<unknown> {
    try {
      // The first listener probes the port: with `reusePort` another process on it would go unnoticed.
      if (tls && !app.server) Bun.listen({ hostname, port, socket: { data() {} } }).stop(true);
      app.listen({
        hostname,
        port,
        ...(tls ? { tls } : {}),
        // Only for a new certificate: a second server on this port would silently get half of the requests.
        reusePort: tls !== null,
        // With 6 itself, an answer that takes 5 s (`?after=`) was cut off after 4.7 s.
        idleTimeout: Math.min(address.IDLE_SECONDS + EARLY_S, MAX_IDLE_S),
        development: false,
        // The limits of each body answer with a problem document; Bun's would cut the connection.
        maxRequestBodySize: Number.MAX_SAFE_INTEGER,
      });
      return app.server as Bun.Server<unknown>;
    } catch (error) {
      throw new Error(
        `cannot listen on ${hostname}:${port}: ${whyNotListening(error as Error, hostname)}`,
      );
    }
  }
}

/** Bun reports an unusable address or an unknown host name as a port in use. */
function whyNotListening({ code, message }: Error & { code?: string }, hostname: string): string {
  if (code === "EACCES") return "permission denied; set PORT to 1024 or more";
  try {
    Bun.listen({ hostname, port: 0, socket: { data() {} } }).stop(true);
  } catch {
    return "this machine has no such address; set HOST";
  }
  const reason = code === "EADDRINUSE" ? "the port is in use" : message.split("\n")[0];
  return `${reason}; stop the program that uses it, or set PORT`;
}

/** Reads the certificate and its key, if they are set. Throws InvalidSetting when they cannot be used. */
export function readCertificate({ TLS_CERT, TLS_KEY }: Pick<Address, "TLS_CERT" | "TLS_KEY">) {
  if (!TLS_CERT || !TLS_KEY) return null;
  const pem = { cert: readPem("TLS_CERT", TLS_CERT), key: readPem("TLS_KEY", TLS_KEY) };
  try {
    createSecureContext(pem); // while the old ones are still in use
  } catch (error) {
    throw new InvalidSetting(`TLS_CERT and TLS_KEY cannot be used: ${(error as Error).message}`);
  }
  return pem;
}

function readPem(name: string, path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new InvalidSetting(`${name}: cannot read ${path} (${(error as { code?: string }).code})`);
  }
}

/** Whether there is one valid Host header: Bun joins several with a comma, and makes the URL of any text. */
function hasHost({ url, headers }: Request): boolean {
  return URL.canParse(url) && !headers.get("host")?.includes(",");
}

/**
 * Of `https://x/healthz`, Elysia would not find the path, and of `https://x/q/healthz` another one. Without a Host
 * header (HTTP/1.0, as some load balancers probe), the URL is a path alone.
 */
function completeUrl(request: Request): void {
  const { url, headers } = request;
  if (url.startsWith("/") && !headers.has("host"))
    Object.defineProperty(request, "url", { value: `http://localhost${url}` });
  if (!url.startsWith("https:")) return;
  const path = url.indexOf("/", "https://".length);
  if (path >= PATH_AFTER) return;
  Object.defineProperty(request, "url", { value: `https://localhost${url.slice(path)}` });
}

/** The path without the origin and the query. */
function pathOf(url: string): string {
  const from = url.indexOf("/", 8);
  const query = url.indexOf("?", from);
  return query < 0 ? url.slice(from) : url.slice(from, query);
}
