/** Networks that fail: a proxy to Postgres that can be cut, and one to the server that loses and delays. */
import { createServer as createHttpServer, type IncomingMessage } from "node:http";
import { connect, createServer, type Socket } from "node:net";

/**
 * A proxy to the Postgres at `url`. After `cut` it drops every connection, until `mend`. Once a client
 * has sent the text that `silence` was given, the proxy passes nothing on any more, and closes nothing.
 */
export async function openProxy(url: string) {
  let target = new URL(url);
  const open = new Set<Socket>();
  let isCut = false;
  let silentAfter: string | null = null;
  let isSilent = false;
  let refused = 0;
  const server = createServer((client) => {
    if (isCut) {
      refused++;
      client.destroy();
      return;
    }
    const postgres = connect(Number(target.port || 5432), target.hostname);
    for (const [from, to] of [
      [client, postgres],
      [postgres, client],
    ] as const) {
      open.add(from);
      from.on("error", () => {}).on("close", () => (open.delete(from), isSilent || to.destroy()));
      from.on("data", (bytes) => {
        if (isSilent) return;
        to.write(bytes);
        isSilent = silentAfter !== null && bytes.includes(silentAfter);
      });
    }
  });
  const cut = () => {
    isCut = true;
    for (const socket of open) socket.destroy();
  };
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const via = new URL(url);
  via.host = `127.0.0.1:${(server.address() as { port: number }).port}`;
  return {
    url: via.href,
    cut,
    mend: () => (isCut = false),
    refused: () => refused,
    /** Where new connections lead. */
    lead: (url: string) => (target = new URL(url)),
    silence: (text: string) => (silentAfter = text),
    isSilent: () => isSilent,
    async [Symbol.asyncDispose]() {
      cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** What goes wrong with a request. */
export type Fault =
  | { answer: number; headers?: Record<string, string> } // answered in place of the server
  | "cut" // dropped before it reaches the server
  | "lose" // the server's answer is dropped
  | "tear" // the server's answer is cut off half-way
  | { delayMs: number } // the server's answer is late
  | null;

/** A proxy to the HTTP server at `target`. `choose` decides for each request what goes wrong. */
export async function openMeddler(
  target: string,
  choose: (request: IncomingMessage) => Fault | Promise<Fault>,
) {
  const server = createHttpServer(async (request, response) => {
    try {
      const fault = await choose(request);
      const chunks: Buffer[] = [];
      for await (const chunk of request) chunks.push(chunk as Buffer);
      if (fault === "cut") return void request.socket.destroy();
      if (fault && typeof fault === "object" && "answer" in fault)
        return void response.writeHead(fault.answer, fault.headers).end();
      const { method = "GET", url = "/" } = request;
      const headers = new Headers(request.headers as Record<string, string>);
      for (const name of ["host", "connection", "content-length"]) headers.delete(name);
      const body = chunks.length > 0 ? Buffer.concat(chunks) : null;
      const answer = await fetch(target + url, { method, headers, body });
      const bytes = await answer.bytes();
      if (fault === "lose") return void request.socket.destroy();
      if (fault && typeof fault === "object") await Bun.sleep(fault.delayMs);
      response.writeHead(answer.status, Object.fromEntries(answer.headers));
      if (fault !== "tear") return void response.end(bytes);
      response.write(bytes.subarray(0, bytes.length / 2), () => request.socket.destroy());
    } catch {
      request.socket.destroy(); // client or server has gone
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    url: `http://127.0.0.1:${(server.address() as { port: number }).port}`,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}

/** A connection to the HTTP server at `url` for requests that `fetch` cannot send. */
export function openConnection(url: string) {
  const { hostname, port } = new URL(url);
  let text = "";
  let isClosed = false;
  const socket = connect(Number(port), hostname)
    .on("data", (bytes) => (text += bytes))
    .on("error", () => {})
    .on("close", () => (isClosed = true));
  return {
    send: (part: string) => void socket.write(part),
    /** What it has answered so far. */
    text: () => text,
    isClosed: () => isClosed,
    [Symbol.dispose]: () => void socket.destroy(),
  };
}

/** A POST as it goes over the wire. A header with several values is sent as often. */
export function writtenPost(
  path: string,
  headers: Record<string, string | readonly string[]>,
  body: string,
): string {
  const all = { host: "localhost", "content-length": `${Buffer.byteLength(body)}`, ...headers };
  const lines = Object.entries(all).flatMap(([name, values]) =>
    [values].flat().map((value) => `${name}: ${value}\r\n`),
  );
  return `POST ${path} HTTP/1.1\r\n${lines.join("")}\r\n${body}`;
}
