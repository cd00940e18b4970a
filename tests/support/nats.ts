/** A NATS cluster of real servers, each with a store of its own, on free ports of loopback. */
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";

import { connect as connectNats } from "@nats-io/transport-node";

import { closedPort, isInstalled, tempDir, until } from "./programs.ts";

export const hasNats = isInstalled("nats-server");

interface Options {
  nodes?: number;
  /** How many of them are started; the others are left to the test. */
  started?: number;
  /** What is acknowledged is on the disk: "always"; the default of nats-server is "2m". */
  sync?: string;
  hasJetStream?: boolean;
  /** More lines of the configuration. */
  more?: string;
  /** The folder of a node's store. */
  storeOf?(node: number): string;
  /** The port at which one node reaches another, whose own is `port`: that of a proxy. */
  routeOf?(from: number, to: number, port: number): number;
}

/** Starts a cluster of three, or one server without a cluster. All are stopped when the test ends. */
export async function openNats(options: Options = {}): ReturnType<typeof openOnce> {
  for (let tries = 5; ; tries--)
    try {
      return await openOnce(options);
    } catch (error) {
      // A port that was free a moment ago may have become that of another test's connection.
      if (tries === 0 || !(error instanceof NodeEnded)) throw error;
    }
}

class NodeEnded extends Error {}

async function openOnce({
  nodes: count = 3,
  started: startedCount = count,
  sync = "always",
  hasJetStream = true,
  more = "",
  storeOf,
  routeOf,
}: Options) {
  const folder = tempDir();
  const numbers = Array.from({ length: count }, (_, i) => i);
  const ports = await Promise.all(numbers.map(() => closedPort()));
  const routes = await Promise.all(numbers.map(() => closedPort()));
  const monitors = await Promise.all(numbers.map(() => closedPort()));
  const nodes = numbers.map((n) => {
    const store = storeOf?.(n) ?? folder.file(`store${n}`);
    mkdirSync(store, { recursive: true });
    const others = numbers
      .filter((other) => other !== n)
      .map((other) => `nats://127.0.0.1:${routeOf?.(n, other, routes[other]!) ?? routes[other]}`);
    const cluster =
      count === 1
        ? ""
        : `cluster { name: test, listen: "127.0.0.1:${routes[n]}", routes: [${others.join()}], no_advertise: ${routeOf !== undefined} }`;
    const path = folder.file(`node${n}.conf`);
    writeFileSync(
      path,
      `server_name: node${n}
       listen: "127.0.0.1:${ports[n]}"
       http: "127.0.0.1:${monitors[n]}"
       ${hasJetStream ? `jetstream { store_dir: "${store}", sync_interval: ${sync}, max_mem: 64MB, max_file: 4GB }` : ""}
       ${cluster}
       ${more}`,
    );
    let child: Bun.Subprocess | null = null;
    const log = folder.file(`node${n}.log`);
    /** A signal is delivered a moment after it was sent; without /proc, that moment is not waited for. */
    const isStopped = () => {
      const stat = `/proc/${child?.pid}/stat`;
      return !existsSync(stat) || /\) T /.test(readFileSync(stat, "utf8"));
    };
    const node = {
      port: ports[n] as number,
      store,
      log,
      start() {
        child = Bun.spawn(["nats-server", "-c", path, "-l", log], {
          stdio: ["ignore", "ignore", "ignore"],
        });
      },
      hasEnded: () => child !== null && (child.exitCode ?? child.signalCode) !== null,
      async kill(signal: NodeJS.Signals = "SIGKILL") {
        child?.kill(signal);
        if (signal === "SIGSTOP") await until(isStopped);
        if (signal === "SIGSTOP" || signal === "SIGCONT") return;
        await child?.exited;
      },
      /** Whether it serves, and its JetStream knows a leader. */
      isReady: () =>
        fetch(`http://127.0.0.1:${monitors[n]}/healthz?js-enabled-only=true`).then(
          ({ ok }) => ok,
          () => false,
        ),
      monitor: `http://127.0.0.1:${monitors[n]}`,
    };
    return node;
  });
  const started = nodes.slice(0, startedCount);
  for (const node of started) node.start();
  const isListening = (port: number) =>
    new Promise<boolean>((resolve) => {
      const socket = connect(port, "127.0.0.1", () => (socket.destroy(), resolve(true)));
      socket.on("error", () => resolve(false));
    });
  const isUp = async ({ port, hasEnded, log }: (typeof nodes)[number]) => {
    if (!hasEnded()) return isListening(port);
    for (const node of nodes) await node.kill();
    const said = await Bun.file(log).text();
    folder[Symbol.dispose]();
    throw new NodeEnded(said.slice(-1_000));
  };
  for (const node of started) await until(() => isUp(node), 30_000);
  const ready = async (waited = nodes) => {
    for (const node of waited) await until(node.isReady, 30_000);
  };
  if (hasJetStream && count > 1) await ready(started);
  interface Answer {
    config?: object;
    state?: object;
    cluster?: { leader?: string };
    deliver_subject?: string;
  }
  const connectAny = () => connectNats({ servers: ports.map((port) => `127.0.0.1:${port}`) });
  type Connection = Awaited<ReturnType<typeof connectAny>>;
  const call = async (nc: Connection, subject: string, request: object): Promise<Answer> => {
    const body = JSON.stringify(request);
    const answer = await nc.request(`$JS.API.STREAM.${subject}`, body, { timeout: 5_000 });
    const found = answer.json<Answer & { error?: { description: string } }>();
    if (found.error) throw new Error(found.error.description);
    return found;
  };
  const ask = async (subject: string, request: object): Promise<Answer> => {
    const nc = await connectAny();
    const answer = await call(nc, subject, request);
    await nc.close();
    return answer;
  };
  return {
    nodes,
    ready,
    /** JOURNAL_URL of a stream. */
    url: (stream = "daybook", login = "", scheme = "nats") =>
      `${scheme}://${login}${ports.map((port) => `127.0.0.1:${port}`).join()}/${stream}`,
    file: folder.file,
    /** Changes the configuration of a stream, as an operator does. */
    async edit(stream: string, changes: object): Promise<void> {
      const { config } = await ask(`INFO.${stream}`, {});
      await ask(`UPDATE.${stream}`, { ...config, ...changes });
    },
    /** The number of the node that leads the stream; -1 if there is none at the moment. */
    async leader(stream: string): Promise<number> {
      const { cluster } = await ask(`INFO.${stream}`, {});
      return numbers.findIndex((n) => cluster?.leader === `node${n}`);
    },
    /** What `nats stream backup` writes: the stream's configuration, and its messages as one archive. */
    async backUp(stream: string): Promise<StreamBackup> {
      const nc = await connectAny();
      const archive: Uint8Array[] = [];
      const inbox = `backup.${crypto.randomUUID()}`;
      const chunks = nc.subscribe(inbox);
      const request = { deliver_subject: inbox, no_consumers: true, chunk_size: 65_536 };
      const { config, state } = await call(nc, `SNAPSHOT.${stream}`, request);
      for await (const chunk of chunks) {
        if (chunk.data.length === 0) break;
        archive.push(chunk.data.slice());
        chunk.respond();
      }
      await nc.close();
      return { config, state, archive };
    },
    /** What `nats stream restore` does, where the stream does not exist. */
    async restore(stream: string, { config, state, archive }: StreamBackup): Promise<void> {
      const nc = await connectAny();
      const { deliver_subject: to } = await call(nc, `RESTORE.${stream}`, { config, state });
      for (const chunk of [...archive, new Uint8Array()])
        await nc.request(to as string, chunk, { timeout: 30_000 });
      await nc.close();
    },
    /** Removes all messages of a journal. */
    purge: (stream: string, id: string) => ask(`PURGE.${stream}`, { filter: `${stream}.${id}` }),
    async [Symbol.asyncDispose]() {
      for (const node of nodes) await node.kill();
      folder[Symbol.dispose]();
    },
  };
}

export interface StreamBackup {
  config: object | undefined;
  state: object | undefined;
  archive: Uint8Array[];
}

export type Nats = Awaited<ReturnType<typeof openNats>>;

/**
 * A proxy to a port of loopback. Once a client has sent the text given to `muteAfter`, or after `mute`, it
 * passes no answers on; after `cut` it drops every connection and accepts none, until `mend`. `rewrite` alters
 * what the server sends.
 */
export async function openTcpProxy(port: () => number, rewrite?: (text: string) => string) {
  const open = new Set<Socket>();
  let state: "open" | "mute" | "cut" = "open";
  let muteAfter: string | null = null;
  const server = createServer((client) => {
    if (state === "cut") return void client.destroy();
    const node = connect(port(), "127.0.0.1");
    for (const [from, to] of [
      [client, node],
      [node, client],
    ] as const) {
      open.add(from);
      from.on("error", () => {}).on("close", () => (open.delete(from), to.destroy()));
      from.on("data", (bytes) => {
        if (from === node && state === "mute") return;
        to.write(from === node && rewrite ? rewrite(bytes.toString("latin1")) : bytes, "latin1");
        if (from === client && muteAfter && bytes.includes(muteAfter)) {
          state = "mute";
          muteAfter = null;
        }
      });
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const cut = () => {
    state = "cut";
    for (const socket of open) socket.destroy();
  };
  return {
    port: (server.address() as { port: number }).port,
    cut,
    mute: () => void (state = "mute"),
    muteAfter: (text: string) => void (muteAfter = text),
    mend: () => void (state = "open"),
    async [Symbol.asyncDispose]() {
      cut();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
