/**
 * The stream that holds journals instead of files: a NATS JetStream stream, replicated on several servers.
 *
 *     STREAM.<journal id>        one subject for each journal, one message for each frame
 *     STREAM-live.wake           after each commit, the id of its journal: a hint that may be lost
 *     STREAM-live.<journal id>   answered by the server that writes this journal
 *
 * A message is what a file of a journal with a single frame would be: the journal's header, whose `base`
 * is the position of the message, and a frame with its own checksum. So each can be read alone, and each
 * begins where the one before it on its subject ends. The header `Daybook-Writer` names the process that
 * published it.
 *
 * A publish names the sequence of the message before it on its subject (`Nats-Expected-Last-Subject-Sequence`).
 * The stream refuses it if that is no longer the last one. So a publish that is repeated, or arrives late,
 * never adds a frame twice or out of order, however much time has passed; `Nats-Msg-Id` protects for two
 * minutes only. Whether a publish without an answer was stored is asked through the stream's leader: any
 * other replica may be behind.
 */
import { readFileSync } from "node:fs";

import {
  AuthorizationError,
  connect,
  type ConnectionOptions,
  credsAuthenticator,
  headers,
  type Msg,
  type NatsConnection,
  NoRespondersError,
  PermissionViolationError,
  UserAuthenticationExpiredError,
} from "@nats-io/transport-node";

import { InvalidSetting } from "../config.ts";
import {
  encodeFrame,
  encodeJournalHeader,
  JournalUnavailable,
  type ParsedFrame,
  parseFrames,
  parseJournalHeader,
} from "./format.ts";
import { type JournalUrl, parseJournalUrl } from "./url.ts";

const MIN_VERSION = "2.11.0";
/** The version that the tests run with. */
const TESTED_VERSION = "2.15.1";
const MIN_MESSAGE_BYTES = 128 * 1024;
/** Commits of 1 MiB reach 1.6 million events/s; larger ones only delay those that wait. */
const MAX_MESSAGE_BYTES = 1024 * 1024;
/** The journal's header, the frame's, and those of NATS. */
const OVERHEAD_BYTES = 2048;

/** A start waits this long for the stream. */
const START_MS = 30_000;
const START_PAUSE_MS = 500;
/** A node tells the others every 10 s that it has JetStream: those of a cluster that starts may not know yet. */
const PEERS_MS = 15_000;
const CONNECT_MS = 2_000;
/** A server that answers no two pings in a row is given up. */
const PING_MS = 2_000;
export const REQUEST_MS = 2_000;
/** A busy server answers late. Of one that has ended, NATS says at once that nobody answers. */
const ALIVE_MS = 3_000;
/** Without an answer for this long, another server is tried: this one may be cut off from the others. */
export const RECONNECT_MS = 3_000;
const BATCH = { batch: 1000, max_bytes: 4 * 1024 * 1024 };

const WRITER = "Daybook-Writer";
const NO_MESSAGE = 10037;
const NO_STREAM = 10059;
const NO_PEERS = 10005;
const WRONG_SEQUENCE = new Set([10071, 10164]);
/** Limits of the account, the server, its storage, the stream. */
const NO_ROOM = new Set([10002, 10023, 10047, 10077]);
const NO_ROOM_TEXT = /maximum bytes|resource|no space/i;

/** A message of the stream, as stored. `data` is not checked yet. */
export interface StoredMessage {
  seq: number;
  journalId: string;
  data: Buffer;
  /** Which process published it. */
  writer: string;
}

/** What became of a publish. `unknown`: it may have been stored, or be stored later. */
export type Published =
  | { state: "stored"; seq: number }
  | { state: "refused" }
  | { state: "full"; why: string }
  | { state: "unknown"; why: string };

export type Stream = Awaited<ReturnType<typeof openStream>>;

/** A message that holds one frame of `payloads` at `base` of the journal. */
export function encodeMessage(id: string, base: number, payloads: Uint8Array[], atMs: number) {
  const bytes = payloads.reduce((sum, { length }) => sum + length, 0);
  return Buffer.concat([encodeJournalHeader(id, base), encodeFrame(payloads, bytes, atMs)]);
}

/** The position of a message, and its frame; `null` if it is not whole. */
export function parseMessage({ journalId, data }: Pick<StoredMessage, "journalId" | "data">): {
  base: number;
  to: number;
  frame: ParsedFrame;
} | null {
  const header = parseJournalHeader(data);
  if (header?.id !== journalId) return null;
  const { frames, rest } = parseFrames(data.subarray(header.bytes));
  const [frame, more] = frames;
  if (!frame || more || rest !== "nothing") return null;
  return { base: header.base, to: header.base + data.length, frame };
}

/**
 * Connects to the servers of JOURNAL_URL, and creates the stream if it is missing. Waits up to 30 s for
 * servers that do not answer. Throws InvalidSetting if credentials, servers or stream are not what is
 * required, and JournalUnavailable.
 */
export async function openStream(journalUrl: string, say: (line: string) => void = () => {}) {
  const url = parseJournalUrl(journalUrl);
  const { stream: name } = url;
  const live = `${name}-live`;
  const nc = await open(url, say);
  let isConnected = true;
  /** Since when the leader has not answered. */
  let silentMs: number | null = null;
  watchConnection();

  return {
    /** For messages. */
    name: `stream ${name}`,
    /** The command with which an operator removes a journal. */
    purgeCommand: (id: string) => `nats stream purge ${name} --subject=${name}.${id}`,
    /** The longest payload of a frame. */
    maxFrameBytes: await frameBytesOf(nc, name),
    isConnected: () => isConnected,
    /** Connects to another server: this one may be cut off from the others. */
    reconnect: () => void nc.reconnect().catch(() => {}),
    publish,
    /** The last message of a journal, through the leader; `null` if there is none. Throws JournalUnavailable. */
    last: (id: string) => ask(id, { last_by_subj: `${name}.${id}` }),
    /** The first message of a journal from `seq` on, through the leader; `null` if there is none. */
    next: (id: string, seq: number) => ask(id, { seq, next_by_subj: `${name}.${id}` }),
    /** The messages of a journal from `seq` on, some of them, from any replica, which may be behind. */
    read: (id: string, seq: number) => readFrom(nc, id, { ...BATCH, seq }),
    readElsewhere,
    /** How many messages each journal has, and the last sequence of the stream. Throws JournalUnavailable. */
    async list() {
      const { state } = await heard(info(nc, name));
      const subjects = Object.entries(state.subjects ?? {});
      const counts = new Map(subjects.map(([subject, n]) => [subject.slice(name.length + 1), n]));
      return { counts, lastSeq: state.last_seq };
    },
    /** Removes the messages of a journal before `seq`. Throws JournalUnavailable. */
    async purge(id: string, seq: number): Promise<void> {
      await api(nc, `STREAM.PURGE.${name}`, { filter: `${name}.${id}`, seq });
    },
    /** Tells readers that a journal has a new frame. */
    wake: (id: string) => nc.publish(`${live}.wake`, id),
    /** Calls `listener` with the id of a journal that has a new frame. */
    onWake(listener: (journalId: string) => void) {
      const subscription = nc.subscribe(`${live}.wake`, {
        callback: (error, message) => void (error ?? listener(message.string())),
      });
      return () => subscription.unsubscribe();
    },
    /** Answers, from now on, that this process writes a journal. Returns what ends that. */
    live(id: string): () => void {
      const subscription = nc.subscribe(`${live}.${id}`, {
        callback: (error, message) => void (error ?? message.respond()),
      });
      return () => subscription.unsubscribe();
    },
    /** Whether a process answers that it writes the journal. */
    isLive: (id: string) =>
      nc.request(`${live}.${id}`, "", { timeout: ALIVE_MS }).then(
        () => true,
        () => false,
      ),
    close: () => nc.close(),
  };

  /** Publishes a message that follows the one with sequence `expected` on its subject. */
  async function publish(
    id: string,
    data: Uint8Array,
    { expected, writer }: { expected: number; writer: string },
    timeout = REQUEST_MS,
  ): Promise<Published> {
    // The client would keep it, and each repetition of it, until it is connected again.
    if (!isConnected) return { state: "unknown", why: "no server can be reached" };
    const sent = headers();
    sent.set("Nats-Expected-Last-Subject-Sequence", `${expected}`);
    sent.set(WRITER, writer);
    try {
      const message = await nc.request(`${name}.${id}`, data, { timeout, headers: sent });
      const ack = message.json<{ seq?: number; error?: ApiError }>();
      if (ack.error) return publishError(ack.error);
      return ack.seq ? { state: "stored", seq: ack.seq } : { state: "unknown", why: "no ack" };
    } catch (error) {
      return { state: "unknown", why: explain(error) };
    }
  }

  function ask(id: string, request: object): Promise<StoredMessage | null> {
    return heard(getMessage(nc, name, id, request));
  }

  /** What the leader answers. After a while without an answer, another server is tried. */
  async function heard<T>(asking: Promise<T>): Promise<T> {
    try {
      const answer = await asking;
      silentMs = null;
      return answer;
    } catch (error) {
      const now = performance.now();
      silentMs = isConnected && !(error instanceof JetStreamError) ? (silentMs ?? now) : null;
      if (silentMs !== null && now - silentMs > RECONNECT_MS) {
        silentMs = null;
        nc.reconnect().catch(() => {});
      }
      throw error;
    }
  }

  /** The first message of a journal from `seq` on, as the leader and then each server has it. */
  async function* readElsewhere(id: string, seq: number): AsyncGenerator<StoredMessage> {
    const fromLeader = await ask(id, { seq, next_by_subj: `${name}.${id}` }).catch(() => null);
    if (fromLeader) yield fromLeader;
    for (const server of new Set([...url.servers, ...(nc.info?.connect_urls ?? [])])) {
      const options = { ...optionsOf(url), servers: [server], ignoreClusterUpdates: true };
      const one = await connect({ ...options, reconnect: false }).catch(() => null);
      if (!one) continue;
      try {
        const [message] = await readFrom(one, id, { seq, batch: 1 }).catch(() => []);
        if (message) yield message;
      } finally {
        await one.close().catch(() => {});
      }
    }
  }

  /** A direct get: messages in order, until a status says that there are no more for now. */
  function readFrom(
    nc: NatsConnection,
    id: string,
    request: { seq: number; batch: number; max_bytes?: number },
  ): Promise<StoredMessage[]> {
    const { promise, resolve, reject } = Promise.withResolvers<StoredMessage[]>();
    const found: StoredMessage[] = [];
    if (nc === connection() && !isConnected)
      return Promise.reject(new JournalUnavailable("no server can be reached"));
    const inbox = `_INBOX.${crypto.randomUUID().replaceAll("-", "")}`;
    const subscription = nc.subscribe(inbox, {
      callback(error, message) {
        if (error) return end(error);
        const { headers } = message;
        if (headers?.code === 503) return end(new NoRespondersError(name));
        if (!headers || headers.code !== 0) return end();
        found.push({
          seq: Number(headers.get("Nats-Sequence")),
          journalId: id,
          data: Buffer.from(message.data),
          writer: headers.get(WRITER),
        });
        timer.refresh();
      },
    });
    const timer = setTimeout(end, REQUEST_MS, new Error("timeout"));
    nc.publish(
      `$JS.API.DIRECT.GET.${name}`,
      JSON.stringify({ ...request, next_by_subj: `${name}.${id}` }),
      {
        reply: inbox,
      },
    );
    return promise;

    function end(error?: unknown): void {
      clearTimeout(timer);
      subscription.unsubscribe();
      // What came before is in order and without a gap that the replica knows of.
      if (error && found.length === 0) reject(new JournalUnavailable(explain(error)));
      else resolve(found);
    }
  }

  function connection(): NatsConnection {
    return nc;
  }

  async function watchConnection(): Promise<void> {
    let trouble = "";
    for await (const status of nc.status()) {
      if (status.type === "disconnect") isConnected = false;
      if (status.type === "reconnect") {
        isConnected = true;
        if (trouble) say(`${name}: connected again`);
        trouble = "";
      }
      if (status.type !== "error") continue;
      const message = explain(status.error, url);
      if (message !== trouble) say(`stream ${name}: ${message}`);
      trouble = message;
    }
    isConnected = false;
  }
}

interface ApiError {
  code: number;
  err_code?: number;
  description?: string;
}

interface StreamInfo {
  config: Record<string, unknown>;
  state: { last_seq: number; subjects?: Record<string, number> };
  cluster?: { leader?: string };
}

function optionsOf({
  servers,
  user,
  password,
  requiresTls,
  creds,
  ca,
}: JournalUrl): ConnectionOptions {
  return {
    servers,
    name: "daybook",
    timeout: CONNECT_MS,
    pingInterval: PING_MS,
    maxPingOut: 2,
    maxReconnectAttempts: -1,
    reconnectTimeWait: 200,
    reconnectJitter: 200,
    // Expired credentials may be replaced while this runs: the file is read at each connection.
    ignoreAuthErrorAbort: true,
    noAsyncTraces: true,
    ...(user === undefined ? {} : { user, pass: password ?? "" }),
    ...(creds === undefined
      ? {}
      : { authenticator: credsAuthenticator(() => readFileSync(creds)) }),
    ...(requiresTls || ca ? { tls: ca ? { caFile: ca } : {} } : {}),
  };
}

async function open(url: JournalUrl, say: (line: string) => void): Promise<NatsConnection> {
  const startedMs = performance.now();
  const hasWaited = (ms: number) => performance.now() > startedMs + ms;
  let nc: NatsConnection | null = null;
  for (let waits = 0; ; waits++) {
    try {
      if (url.creds) requireCredentials(url.creds);
      nc ??= await connect(optionsOf(url));
      await requireStream(nc, url, say);
      return nc;
    } catch (error) {
      const mayStart = error instanceof TooFewPeers && !hasWaited(PEERS_MS);
      const isFinal = (error instanceof InvalidSetting && !mayStart) || isAuthError(error);
      if (isFinal || hasWaited(START_MS)) {
        await nc?.close().catch(() => {});
        if (error instanceof InvalidSetting) throw error;
        const why = `cannot open stream ${url.stream} of JOURNAL_URL: ${explain(error, url)}`;
        throw isFinal
          ? new InvalidSetting(why)
          : new JournalUnavailable(`${why}; start again once it answers`);
      }
      if (waits === 0)
        say(
          `waiting for stream ${url.stream} at ${url.servers.join(", ")}: ${explain(error, url)}`,
        );
      await Bun.sleep(START_PAUSE_MS);
    }
  }
}

/** Creates the stream, or compares it with what is required. Throws InvalidSetting. */
async function requireStream(nc: NatsConnection, url: JournalUrl, say: (line: string) => void) {
  const { stream: name } = url;
  const { version = "0", cluster, max_payload: maxPayload = 0 } = nc.info ?? {};
  const base = version.replace(/-.*/, "");
  if (Bun.semver.order(base, MIN_VERSION) < 0)
    throw new InvalidSetting(
      `JOURNAL_URL: nats-server ${version} is too old: use ${MIN_VERSION} or later (2.10 lost streams after a power cut)`,
    );
  if (maxPayload < MIN_MESSAGE_BYTES)
    throw new InvalidSetting(
      `JOURNAL_URL: max_payload of the nats-server is ${maxPayload}: set at least ${MIN_MESSAGE_BYTES} in its configuration`,
    );
  const replicas = url.replicas ?? (cluster ? 3 : 1);
  const found = await info(nc, name).catch((error) => {
    if (error instanceof JetStreamError && error.code === NO_STREAM) return null;
    throw error;
  });
  const required = configOf(name);
  if (!found) await createStream(nc, { ...required, num_replicas: replicas }, cluster);
  const { config } = found ?? (await info(nc, name));
  compare(name, required, config, replicas);
  if (Bun.semver.order(base, TESTED_VERSION) < 0)
    say(
      `nats-server ${version} is older than ${TESTED_VERSION}, with which this version was tested`,
    );
  const kept = Number(config["num_replicas"]);
  if (kept < 3)
    say(
      `stream ${name} has ${kept} ${kept === 1 ? "replica" : "replicas"}: an event is lost with the disk that holds it; a cluster of three keeps three`,
    );
  say(
    `stream ${name}: an answer 201 relies on "sync_interval: always" of every nats-server; ` +
      "curl -s http://NODE:8222/varz shows it as sync_always",
  );
}

/** What a stream of ours is, besides its replicas. What is not named is the operator's. */
function configOf(name: string) {
  return {
    name,
    subjects: [`${name}.*`],
    storage: "file",
    retention: "limits",
    discard: "new",
    max_age: 0,
    max_msgs: -1,
    max_msgs_per_subject: -1,
    deny_delete: true,
    deny_purge: false,
    allow_direct: true,
    allow_rollup_hdrs: false,
  };
}

/** With the flags of `nats stream edit` that change them; those without one need another stream. */
const FLAGS: Record<string, string> = {
  subjects: "--subjects",
  discard: "--discard",
  max_age: "--max-age",
  max_msgs: "--max-msgs",
  max_msgs_per_subject: "--max-msgs-per-subject",
  max_msg_size: "--max-msg-size",
  num_replicas: "--replicas",
};

async function createStream(nc: NatsConnection, config: object, cluster: string | undefined) {
  const { num_replicas: replicas, name } = config as { num_replicas: number; name: string };
  try {
    await api(nc, `STREAM.CREATE.${name}`, config, 10_000);
  } catch (error) {
    if (!(error instanceof JetStreamError)) throw error;
    if (error.isTemporary) throw error;
    const what = cluster ? `cluster ${cluster}` : "a server without a cluster";
    const Kind = error.code === NO_PEERS && cluster ? TooFewPeers : InvalidSetting;
    throw new Kind(
      `JOURNAL_URL: cannot create stream ${name} with ${replicas} replicas in ${what}: ${error.message}; ` +
        `${replicas} nats-servers with JetStream are required; ?replicas=1 does with one, and loses events with its disk`,
    );
  }
}

/** Throws InvalidSetting with each difference, and the command that removes it. */
function compare(
  name: string,
  required: Record<string, unknown>,
  found: Record<string, unknown>,
  replicas: number,
): void {
  const wrong: string[] = [];
  const flags: string[] = [];
  const differs = (key: string, is: unknown, must: unknown, flag = FLAGS[key]) => {
    wrong.push(`${key} is ${JSON.stringify(is)}, required is ${must}`);
    if (flag) flags.push(`${flag}=${must}`);
  };
  for (const [key, must] of Object.entries(required)) {
    const is = found[key] ?? (typeof must === "boolean" ? false : undefined);
    if (JSON.stringify(is) !== JSON.stringify(must))
      differs(key, is, Array.isArray(must) ? must.join() : must);
  }
  const has = Number(found["num_replicas"]);
  if (has < replicas) differs("num_replicas", has, replicas);
  const size = Number(found["max_msg_size"] ?? -1);
  if (size !== -1 && size < MIN_MESSAGE_BYTES) differs("max_msg_size", size, MIN_MESSAGE_BYTES);
  for (const key of ["mirror", "sources", "subject_transform", "republish"])
    if (found[key]) differs(key, "set", "none");
  if (found["sealed"]) differs("sealed", true, false);
  if (wrong.length === 0) return;
  const isFixable = flags.length === wrong.length;
  throw new InvalidSetting(
    `JOURNAL_URL: stream ${name} cannot hold the journal: ${wrong.join("; ")}. ` +
      (isFixable
        ? `Run: nats stream edit ${name} ${flags.join(" ")}`
        : "Name another stream in JOURNAL_URL, which is then created, and let the servers post this one to its end first"),
  );
}

async function frameBytesOf(nc: NatsConnection, name: string): Promise<number> {
  const { config } = await info(nc, name);
  const size = Number(config["max_msg_size"] ?? -1);
  const limits = [MAX_MESSAGE_BYTES, nc.info?.max_payload ?? 0, ...(size > 0 ? [size] : [])];
  return Math.min(...limits) - OVERHEAD_BYTES;
}

function info(nc: NatsConnection, name: string): Promise<StreamInfo> {
  return api(nc, `STREAM.INFO.${name}`, { subjects_filter: `${name}.*` });
}

/** The cluster has too few servers with JetStream for the replicas, or does not know them yet. */
class TooFewPeers extends InvalidSetting {}

/** An error that JetStream answered with. */
class JetStreamError extends JournalUnavailable {
  readonly code: number;
  readonly isTemporary: boolean;
  constructor({ code, err_code: number = 0, description = "" }: ApiError) {
    super(description);
    this.code = number;
    // Peers that are not there yet while a cluster starts: 10005, 10008, 10009.
    this.isTemporary = code === 503 && !/insufficient|resource/.test(description);
  }
}

async function api<T>(
  nc: NatsConnection,
  subject: string,
  request: object,
  timeout = REQUEST_MS,
): Promise<T> {
  let message: Msg;
  try {
    message = await nc.request(`$JS.API.${subject}`, JSON.stringify(request), { timeout });
  } catch (error) {
    throw new JournalUnavailable(`${subject}: ${explain(error)}`, { cause: error });
  }
  const answer = message.json<T & { error?: ApiError }>();
  if (answer.error) throw new JetStreamError(answer.error);
  return answer;
}

async function getMessage(
  nc: NatsConnection,
  name: string,
  id: string,
  request: object,
): Promise<StoredMessage | null> {
  try {
    const { message } = await api<{ message: { seq: number; hdrs?: string; data?: string } }>(
      nc,
      `STREAM.MSG.GET.${name}`,
      request,
    );
    const lines = Buffer.from(message.hdrs ?? "", "base64").toString();
    const [, writer = ""] = new RegExp(`^${WRITER}: *(.*?)\r?$`, "m").exec(lines) ?? [];
    const data = Buffer.from(message.data ?? "", "base64");
    return { seq: message.seq, journalId: id, data, writer };
  } catch (error) {
    if (error instanceof JetStreamError && error.code === NO_MESSAGE) return null;
    throw error;
  }
}

function publishError({ err_code: code = 0, description = "" }: ApiError): Published {
  if (WRONG_SEQUENCE.has(code)) return { state: "refused" };
  if (NO_ROOM.has(code) && NO_ROOM_TEXT.test(description))
    return { state: "full", why: description };
  return { state: "unknown", why: description };
}

function isAuthError(error: unknown): boolean {
  const kinds = [AuthorizationError, UserAuthenticationExpiredError, PermissionViolationError];
  return kinds.some((kind) => isOf(error, kind));
}

/** Whether an error, or what caused it, is of this kind. */
function isOf(error: unknown, kind: new (...args: never[]) => Error): boolean {
  const { cause } = error as { cause?: unknown };
  return error instanceof kind || (cause instanceof Error && isOf(cause, kind));
}

/** Throws InvalidSetting if the file cannot be used, or what it holds has expired. */
function requireCredentials(path: string): void {
  const expiredMs = readExpiry(path);
  if (expiredMs !== null && expiredMs < Date.now())
    throw new InvalidSetting(
      `JOURNAL_URL: the credentials in ${path} expired at ${new Date(expiredMs).toISOString()}: put new ones there`,
    );
}

function readExpiry(path: string): number | null {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch (error) {
    const { code } = error as { code?: string };
    throw new InvalidSetting(`JOURNAL_URL: cannot read the credentials ${path} (${code})`);
  }
  const [, claims = ""] = /^[\w-]+\.([\w-]+)\.[\w-]+\s*$/m.exec(text) ?? [];
  try {
    const { exp } = JSON.parse(Buffer.from(claims, "base64url").toString()) as { exp?: number };
    return exp ? exp * 1000 : null;
  } catch {
    throw new InvalidSetting(`JOURNAL_URL: ${path} holds no credentials (a JWT and a seed)`);
  }
}

/** One line about a failure, without a secret. */
function explain(error: unknown, url?: JournalUrl): string {
  const { message, name } = error as Error;
  if (isOf(error, UserAuthenticationExpiredError))
    return `the credentials${url?.creds ? ` in ${url.creds}` : ""} have expired`;
  if (isOf(error, AuthorizationError))
    return `the server refuses ${url?.creds ? `the credentials in ${url.creds}` : "the user or password"}`;
  if (isOf(error, NoRespondersError))
    return "nobody answers: JetStream is not enabled for this account, or the stream has no leader now";
  if (name === "TimeoutError" || message === "timeout") return "no answer in time";
  return (message || name).split("\n")[0] as string;
}
