/**
 * The port: serves the app over HTTP or HTTPS, gives each request an id, and tells who counts what
 * was answered. Around the app and not in it: so whatever is answered, by a route or by a failure,
 * comes by here.
 */
import { readFileSync } from "node:fs";
import { createSecureContext } from "node:tls";

import { InvalidSetting } from "../config.ts";

/** What is under way at SIGTERM may take this long; with all the rest the stop takes under 5 s. */
const FINISH_MS = 1_500;
const IDLE_S = 30;
/** An id that a sender gives its request is kept if it can stand in a log. */
const REQUEST_ID = /^[\w.:+/=-]{1,128}$/;

export interface Address {
  hostname: string;
  port: number;
  /** Paths of PEM files, for HTTPS. */
  tls: { cert: string; key: string } | null;
}

interface Served {
  /** Is given the server, as Elysia's own `listen` would. */
  server: Bun.Server<unknown> | null;
  readonly fetch: (request: Request) => Response | Promise<Response>;
}

/** Hears of each answer; `fromMs` is when its request came (performance.now). */
export type Seen = (
  method: string,
  path: string,
  status: number,
  id: string,
  fromMs: number,
) => void;

export interface Listener {
  /** `http://HOST:PORT` */
  readonly origin: string;
  /** Reads the certificate again. Throws, and goes on with the old one, if the new one is not good. */
  renew(): void;
  /** Stops accepting and lets what is under way finish. */
  finish(): Promise<void>;
}

/** Serves `app` at `address`. Throws in one line what is wrong with the address or the files. */
export function listen(app: Served, address: Address, seen: Seen): Listener {
  const { hostname, port: wanted, tls } = address;
  const { fetch } = app;
  /** Ids of requests that bring none: of this start, and counted. A UUID for each took 2 %. */
  const begin = crypto.randomUUID().slice(0, 8);
  let requests = 0;
  const draining = new Set<Bun.Server<unknown>>();
  const first = tls && readPair(tls);
  if (first) refuseToShare(address);
  let server = serve(wanted, first);
  const { port } = server;
  const host = hostname.includes(":") ? `[${hostname}]` : hostname;

  return {
    origin: `${tls ? "https" : "http"}://${host}:${port}`,
    renew() {
      // Bun takes no other certificate for a server that runs (`reload` passes over it). So another one
      // listens beside it before it stops to. It answers what it has begun, and closes connections
      // that are idle: whoever sends on one of these at that moment has to try again.
      const old = server;
      server = serve(port as number, tls && readPair(tls));
      draining.add(old);
      old.stop().then(() => draining.delete(old));
    },
    async finish() {
      const all = [server, ...draining];
      await Promise.race([Promise.all(all.map((one) => one.stop())), Bun.sleep(FINISH_MS)]);
      await Promise.all(all.map((one) => one.stop(true)));
    },
  };

  function serve(port: number, pair: Pair | null): Bun.Server<unknown> {
    try {
      return (app.server = Bun.serve({
        hostname,
        port,
        ...(pair ? { tls: pair } : {}),
        // For `renew` alone: a second server on this port would silently take half of the requests.
        reusePort: pair !== null,
        idleTimeout: IDLE_S,
        development: false,
        // The bodies' own limits answer with a problem document; Bun's would cut the connection.
        maxRequestBodySize: Number.MAX_SAFE_INTEGER,
        fetch: answer,
      }));
    } catch (error) {
      throw cannotListen(address, error as Error);
    }
  }

  async function answer(request: Request): Promise<Response> {
    const fromMs = performance.now();
    const given = request.headers.get("x-request-id");
    const id =
      given !== null && REQUEST_ID.test(given) ? given : `${begin}-${(requests++).toString(36)}`;
    const response = await fetch(request);
    response.headers.set("x-request-id", id);
    seen(request.method, pathOf(request.url), response.status, id, fromMs);
    return response;
  }
}

/** Reads the files of a certificate and its key. Throws InvalidSetting when they cannot be used. */
export function readPair(tls: { cert: string; key: string }): Pair {
  const pair = { cert: readPem("TLS_CERT", tls.cert), key: readPem("TLS_KEY", tls.key) };
  try {
    createSecureContext(pair); // says what is wrong with them, while the old ones still serve
  } catch (error) {
    throw new InvalidSetting(`TLS_CERT and TLS_KEY cannot be used: ${(error as Error).message}`);
  }
  return pair;
}

/** Without the origin and the query. */
function pathOf(url: string): string {
  const from = url.indexOf("/", 8);
  const query = url.indexOf("?", from);
  return query < 0 ? url.slice(from) : url.slice(from, query);
}

interface Pair {
  cert: string;
  key: string;
}

function readPem(name: string, path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    throw new InvalidSetting(`${name}: cannot read ${path} (${(error as { code?: string }).code})`);
  }
}

/** Throws where somebody listens already. */
function refuseToShare(address: Address): void {
  const { hostname, port } = address;
  try {
    Bun.listen({ hostname, port, socket: { data() {} } }).stop(true);
  } catch (error) {
    throw cannotListen(address, error as Error);
  }
}

function cannotListen({ hostname, port }: Address, { message }: Error): Error {
  const [why] = message.split("\n");
  return new Error(`cannot listen on ${hostname}:${port}: ${why}; set HOST or PORT`);
}
