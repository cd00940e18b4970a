/**
 * The server: takes events over HTTP, answers 201 once they are on the disk, and reads balances.
 * With it run the processor (a Worker) and, without DATABASE_URL, a private Postgres: one command.
 */
import "./lib/install.ts";

import { join } from "node:path";

import { openapi } from "@elysiajs/openapi";
import { Elysia, t } from "elysia";

import { type Access, type Asking, openAuth, SCOPES } from "./lib/auth.ts";
import {
  describeBody,
  describeEvent,
  EventBody,
  EventsBody,
  readEvent,
  readEvents,
} from "./lib/body.ts";
import { clusterUrl, openCluster } from "./lib/cluster.ts";
import {
  isLoopback,
  maskSettings,
  parseDuration,
  readCommand,
  WrongSetting,
} from "./lib/config.ts";
import { type Database, openDatabase, Unavailable } from "./lib/database.ts";
import { isUserId, setEventTypes } from "./lib/event.ts";
import { type EventSchema, openEventSchema } from "./lib/event-schema.ts";
import { disk } from "./lib/journal-disk.ts";
import { refuseOlderCopy } from "./lib/journal-source.ts";
import {
  type Commit,
  type Journal,
  JOURNAL_FILE,
  JournalFull,
  openJournal,
} from "./lib/journal.ts";
import { type LagWatch, watchLag } from "./lib/lag.ts";
import { checkLedger, readBalance } from "./lib/ledger.ts";
import { MAX_LISTED_ERRORS } from "./lib/lines.ts";
import { type Listener, listen, readPair, type Seen } from "./lib/listener.ts";
import { waitForLock } from "./lib/lock.ts";
import { type Log, openLog, watchState } from "./lib/log.ts";
import { type Metrics, openMetrics } from "./lib/metrics.ts";
import { watchPosted } from "./lib/posted.ts";
import { allowedMethods, Problem, problems, routeFinder, unavailable } from "./lib/problem.ts";
import { openRoom } from "./lib/room.ts";
import { sourceHeaders, sourceName, sourceOf } from "./lib/source-header.ts";
import { openSources, type Sources } from "./lib/sources.ts";
import { type Job, supervise } from "./lib/supervisor.ts";
import { openTokens, signToken, type TokenSettings } from "./lib/token.ts";

/** A start waits this long for the ledger to say how far the journal is posted: it takes some 50. */
const COMPARE_MS = 500;
/** Who waits for another processor to end says so after this long. */
const STAND_BY_MS = 500;
/** `?after=` waits this long. */
const AFTER_MS = 5_000;

/** So many bad lines are listed for who does not say how many. */
const LISTED = 100;
const LISTING = t.Object(
  { errors: t.Optional(t.Integer({ default: LISTED, minimum: 0, maximum: MAX_LISTED_ERRORS })) },
  { additionalProperties: true },
);
const SOURCE = t.Object({ source: t.String() });
const COUNTS = t.Object({
  accepted: t.Integer(),
  rejected: t.Integer(),
  errors: t.Array(t.Object({ line: t.Integer(), message: t.String() })),
  position: t.String(),
});

async function main(): Promise<number> {
  const { settings, options } = readCommand({
    usage: "bun run app.ts [--no-processor | --token --scope SCOPE --expires TIME [--sub NAME]]",
    about:
      "Takes events over HTTP into the journal in DATA_DIR, posts them to the ledger in Postgres,\n" +
      "and serves the balances. With --token, prints a token for JWT_SECRET instead.",
    options: {
      "no-processor": { type: "boolean", meaning: "the server alone; run processor.ts beside it" },
      token: { type: "boolean", meaning: "prints a token that this server takes" },
      scope: { type: "string", meaning: `with --token: ${SCOPES.join(", ")}, or both in quotes` },
      expires: { type: "string", meaning: "with --token: how long it is good, like 12h or 30d" },
      sub: { type: "string", meaning: "with --token: whose it is; may read its own balance" },
    },
    files: { atMost: 0 },
    settings: [
      "PORT",
      "HOST",
      "AUTH_SECRET",
      "READ_SECRET",
      "JWT_SECRET",
      "JWKS_URL",
      "JWT_ISSUER",
      "JWT_AUDIENCE",
      "TLS_CERT",
      "TLS_KEY",
      "LOG_LEVEL",
      "DATA_DIR",
      "DATABASE_URL",
      "ID_DAYS",
      "JOURNAL_SEGMENT_BYTES",
      "JOURNAL_KEEP_DAYS",
      "EVENT_TYPES",
      "EVENT_SCHEMA",
    ],
    exits: {
      0: "told to stop (SIGTERM, SIGINT); everything acknowledged is on the disk",
      1: "cannot start: the port, the journal or the private Postgres is not to be had",
      2: "wrong use, or a wrong setting",
    },
  });
  if (options["token"]) return printToken(settings, options);
  const { HOST, PORT, DATA_DIR: dataDir, DATABASE_URL: databaseUrl = null } = settings;
  const {
    AUTH_SECRET: writers,
    READ_SECRET: readers = [],
    TLS_CERT: cert,
    TLS_KEY: key,
  } = settings;
  const log = openLog(settings.LOG_LEVEL);
  const say = (line: string) => log.info(line);
  const access: Access = {
    writers,
    readers,
    readingIsOpen: readers.length === 0 && isLoopback(HOST),
    tokens: openTokens(settings, watchState(log, "error", "tokens: the keys are there again")),
  };
  setEventTypes(settings.EVENT_TYPES);
  const schema = settings.EVENT_SCHEMA ? openEventSchema(settings.EVENT_SCHEMA) : null;
  const tls = cert && key ? { cert, key } : null;
  if (tls) readPair(tls); // before anything is made
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort());

  let watch: (commit: Commit) => void = () => {};
  const segmentBytes = settings.JOURNAL_SEGMENT_BYTES;
  const journal = await openJournal(dataDir, say, disk, segmentBytes, (commit) => watch(commit));
  const path = join(dataDir, JOURNAL_FILE);
  const cluster = databaseUrl
    ? null
    : await Promise.race([openCluster(join(dataDir, "postgres"), say), aborted(stop.signal)]);
  try {
    if (stop.signal.aborted) return 0;
    const url = () => databaseUrl ?? clusterUrl(join(dataDir, "postgres"));
    const database = openDatabase(url, "server", 4);
    const compared = refuseOlderCopy(path, database, stop.signal);
    compared.catch(() => stop.abort());
    // Before anything is taken on top of it, if the database can be asked at all.
    await Promise.race([compared, Bun.sleep(COMPARE_MS)]);
    const lag = watchLag(path, journal, database);
    const metrics = openMetrics({
      journalBytes: journal.end,
      isWritable: () => journal.trouble() === null,
      lag,
    });
    watch = (commit) => {
      lag.committed(commit);
      metrics.committed(commit);
    };
    const sources = openSources(path, journal, database);
    const parts = { journal, database, sources, access, schema, log, lag, metrics };
    const app = createApp({ ...parts, isHttps: tls !== null });
    const routeOf = routeFinder(app.routes);
    const isLogged = log.isLevelEnabled("debug");
    const seen: Seen = (method, path, status, id, fromMs) => {
      const route = routeOf(path);
      metrics.answered(method, route, status);
      if (!isLogged) return;
      const ms = Math.round((performance.now() - fromMs) * 1000) / 1000;
      log.debug({ id, method, route, status, ms }, "request");
    };
    const server = listen(app.compile(), { hostname: HOST, port: PORT, tls }, seen);
    if (tls) process.on("SIGHUP", () => renewCertificate(server, log));
    process.stdout.write(`listening on ${server.origin}\n`);
    log.info({ settings: maskSettings(settings) }, `listening on ${server.origin}`);
    const processor = options["no-processor"]
      ? Promise.resolve()
      : runProcessor(
          {
            ...{ dataDir, databaseUrl, idDays: settings.ID_DAYS, files: [] },
            keepDays: settings.JOURNAL_KEEP_DAYS ?? null,
            eventTypes: settings.EVENT_TYPES,
          },
          stop.signal,
          log,
          metrics,
        );
    processor.catch(() => stop.abort()); // its lock is not to be had: said below, with exit code 1
    await aborted(stop.signal);
    log.info("stopping");
    await server.finish();
    await journal.close();
    lag.close();
    await Promise.all([processor, compared, database.close()]).catch((error: Error) => {
      log.fatal(error.message);
      throw new Told();
    });
    log.info("stopped");
    return 0;
  } finally {
    await cluster?.close();
  }
}

/** Prints a token that a server with these settings takes. */
async function printToken(
  settings: TokenSettings,
  options: Record<string, string | boolean | undefined>,
): Promise<number> {
  const { scope = "", expires = "", sub } = options as Record<string, string | undefined>;
  const expiresMs = parseDuration(expires);
  const wrong = [];
  if (!settings.JWT_SECRET) wrong.push("JWT_SECRET: found none, wanted the one of the server");
  if (!scope.split(" ").every((one) => SCOPES.includes(one)))
    wrong.push(`--scope: found "${scope}", wanted ${SCOPES.join(" or ")}, or both in quotes`);
  if (!expiresMs) wrong.push(`--expires: found "${expires}", wanted a time like 12h or 30d`);
  for (const line of wrong) complain(line);
  if (!expiresMs || wrong.length > 0) return 2;
  process.stdout.write(`${await signToken(settings, { scope, expiresMs, sub })}\n`);
  return 0;
}

/** The API's type, for clients: `treaty<App>("http://…")` of `@elysiajs/eden`. */
export type App = ReturnType<typeof createApp>;

/** The HTTP side, over a journal and a database that are open. */
export function createApp(parts: {
  journal: Journal;
  database: Database;
  sources: Sources;
  access: Access;
  schema: EventSchema | null;
  log: Log;
  lag: LagWatch;
  metrics: Metrics;
  isHttps: boolean;
}) {
  const { journal, database, sources, access, schema, log, lag, metrics, isHttps } = parts;
  const authorize = openAuth(access);
  const mayWrite = async ({ request, server }: Asking) =>
    authorize({ request, server, scope: "events:write" });
  const mayRead = async ({ request, server }: Asking) =>
    authorize({ request, server, scope: "balances:read" });
  const taking = watchState(log, "error", "journal: events are taken again");
  const asking = watchState(log, "warn", "database: it answers again");
  const failing = watchState(log, "error", "");
  const posted = watchPosted(database);
  const room = openRoom();
  const routes: { method: string; path: string }[] = [];

  // Elysia looks for the path behind the eleventh character of the URL, where that of `http://x/` has
  // begun already: 404. The other way, the seventh, finds none in HTTPS.
  const handler = { standardHostname: isHttps };
  const app = new Elysia({ normalize: false, strictPath: true, handler })
    .use(problems((path) => allowedMethods(routes, path), failing.bad))
    .use(
      openapi({
        documentation: {
          info: { title: "Daybook", version: "0.1.0", description: "Events in, balances out." },
          components: { securitySchemes: { secret: { type: "http", scheme: "bearer" } } },
        },
      }),
    )
    .post(
      "/liveEvent",
      async ({ request, status }) => {
        using hold = room.enter();
        const line = await readEvent(request, hold, schema, metrics.rejected);
        const position = positionOf(await taken(journal.append(line)));
        metrics.accepted(1);
        return status(201, { message: "Event sent to process", position });
      },
      {
        transform: mayWrite,
        parse: "none",
        body: EventBody,
        response: { 201: t.Object({ message: t.String(), position: t.String() }) },
        detail: {
          summary: "Take one event; `Idempotency-Key` is the same as its `id`",
          security: [{ secret: [] }],
          requestBody: describeBody("application/json", describeEvent(schema)),
        },
      },
    )
    .post(
      "/liveEvents",
      async ({ request, query, status }) => {
        using hold = room.enter();
        const { errors: listed = LISTED } = query;
        const lines = await readEvents(request, hold, listed, schema, metrics.rejected);
        const { good, accepted, rejected, errors } = lines;
        const position = positionOf(await taken(journal.append(good)));
        metrics.accepted(accepted);
        return status(201, { accepted, rejected, errors, position });
      },
      {
        transform: mayWrite,
        parse: "none",
        body: EventsBody,
        query: LISTING,
        response: { 201: COUNTS },
        detail: {
          summary: "Take many events, one a line; the good lines together, the bad ones listed",
          security: [{ secret: [] }],
          requestBody: describeBody("application/x-ndjson", { type: "string" }),
        },
      },
    )
    .head(
      "/sources/:source",
      async ({ params, set }) => {
        const source = await answered(sources.look(sourceName(params.source)));
        if (!source) throw new Problem(404, "nothing of this source has been taken");
        set.status = 204;
        Object.assign(set.headers, sourceHeaders(source));
        set.headers["journal-position"] = here();
      },
      {
        transform: mayWrite,
        params: SOURCE,
        detail: { summary: "How much of a source is taken", security: [{ secret: [] }] },
      },
    )
    .patch(
      "/sources/:source",
      async ({ request, params, query, set }) => {
        const name = sourceName(params.source);
        const { offset: from, digest } = sourceOf(request.headers);
        using hold = room.enter();
        const { errors: listed = LISTED } = query;
        const lines = await readEvents(request, hold, listed, schema, metrics.rejected, from);
        const { accepted, rejected, errors, ends, bytes } = lines;
        const mark = { name, from, to: from + bytes, digest, events: accepted };
        const result = await taken(sources.take(ends ? { ...mark, ends } : mark, lines.good));
        if ("offset" in result)
          throw new Problem(409, `the source stands at ${result.offset}, not at ${from}`, {
            headers: { ...sourceHeaders(result), "journal-position": here() },
          });
        metrics.accepted(accepted);
        Object.assign(set.headers, sourceHeaders({ offset: mark.to, digest }));
        return { accepted, rejected, errors, position: positionOf(result.position) };
      },
      {
        transform: mayWrite,
        parse: "none",
        params: SOURCE,
        body: EventsBody,
        query: LISTING,
        response: { 200: COUNTS },
        detail: {
          summary: "Take the next bytes of a source, from `Upload-Offset` on",
          security: [{ secret: [] }],
          requestBody: describeBody("application/x-ndjson", { type: "string" }),
        },
      },
    )
    .get(
      "/userEvents/:userid",
      async ({ params: { userid }, query: { after } }) => {
        if (after !== undefined) await waitUntilPosted(after);
        const revenue = isUserId(userid) ? await answered(readBalance(database, userid)) : null;
        if (revenue === null) throw new Problem(404, "no event of this user has been posted");
        return { user_id: userid, revenue };
      },
      {
        transform: async ({ request, server, params: { userid: user } }) =>
          authorize({ request, server, scope: "balances:read", user }),
        params: t.Object({ userid: t.String() }),
        query: t.Object({ after: t.Optional(t.String()) }, { additionalProperties: true }),
        response: { 200: t.Object({ user_id: t.String(), revenue: t.String() }) },
        detail: { summary: "The balance of a user; with `after`, once that position is posted" },
      },
    )
    .get("/healthz", () => ({ status: "ok" }), {
      detail: { summary: "200 while the process serves" },
    })
    .get(
      "/readyz",
      async () => {
        if (journal.trouble()) throw unavailable("the journal takes nothing now; the log says why");
        await answered(checkLedger(database));
        const { bytes: lagBytes, seconds: lagSeconds } = await answered(lag.look());
        return { status: "ready", lagBytes, lagSeconds };
      },
      {
        response: {
          200: t.Object({ status: t.String(), lagBytes: t.Integer(), lagSeconds: t.Number() }),
        },
        detail: {
          summary: "200 when events can be taken and balances read; how far posting is behind",
        },
      },
    )
    .get(
      "/metrics",
      async ({ set }) => {
        const { type, text } = await metrics.scrape();
        set.headers["content-type"] = type;
        return text;
      },
      {
        transform: mayRead,
        response: { 200: t.String() },
        detail: { summary: "Figures for Prometheus", security: [{ secret: [] }] },
      },
    );
  routes.push(...app.routes);
  return app;

  /** Before this is whatever has been acknowledged. */
  function here(): string {
    return positionOf(journal.end());
  }

  function positionOf(position: number): string {
    return `${journal.id}:${position}`;
  }

  async function waitUntilPosted(position: string): Promise<void> {
    const [, id = "", offset] = /^([0-9a-f-]{36}):(\d{1,15})$/.exec(position) ?? [];
    if (!offset) throw new Problem(422, "`after` must be a position that an answer has named");
    if (!(await answered(posted.wait(id, Number(offset), AFTER_MS))))
      throw new Problem(504, `not posted within ${AFTER_MS / 1000} s`, {
        headers: { "retry-after": "1" },
      });
  }

  /** What the journal took, or the answer for why it did not. */
  async function taken<T>(appending: Promise<T>): Promise<T> {
    try {
      const result = await appending;
      taking.good();
      return result;
    } catch (error) {
      const { message } = error as Error;
      taking.bad(message);
      metrics.failed();
      if (error instanceof JournalFull) throw new Problem(507, message);
      throw unavailable(message);
    }
  }

  /** What the database answered, or 503. */
  async function answered<T>(reading: Promise<T>): Promise<T> {
    try {
      const result = await reading;
      asking.good();
      return result;
    } catch (error) {
      if (!(error instanceof Unavailable)) throw error;
      // Anybody may ask for a balance: what exactly is wrong is for the log.
      asking.bad(error.message);
      throw unavailable("the database does not answer; this passes, or the log says why");
    }
  }
}

function renewCertificate(server: Listener, log: Log): void {
  try {
    server.renew();
    log.info("the certificate was read again");
  } catch (error) {
    log.error(`the old certificate stays: ${(error as Error).message}`);
  }
}

/** Runs the processor beside the server, once no other one follows this journal. */
async function runProcessor(
  job: Job,
  stop: AbortSignal,
  log: Log,
  metrics: Metrics,
): Promise<void> {
  const standingBy = "processor: standing by: another one follows this journal";
  const said = setTimeout(() => log.info(standingBy), STAND_BY_MS);
  const lock = await waitForLock(join(job.dataDir, "processor.lock"), stop);
  clearTimeout(said);
  if (!lock) return;
  log.info(`processor: following ${join(job.dataDir, JOURNAL_FILE)}`);
  const processor = supervise(new URL("./processor.ts", import.meta.url), job, (report) => {
    if (report.type === "say") log[report.level ?? "info"](report.line);
    if (report.type === "failed") log.fatal(report.line);
    if (report.type === "posted") metrics.posted(report);
  });
  await aborted(stop);
  await processor.stop();
  lock.release();
}

function aborted(signal: AbortSignal): Promise<null> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve(null);
    signal.addEventListener("abort", () => resolve(null));
  });
}

/** A start that fails says why in plain text, for whoever has typed it. */
function complain(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** The log has it already. */
class Told extends Error {}

if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    if (!(error instanceof Told)) complain((error as Error).message);
    return error instanceof WrongSetting ? 2 : 1;
  });
  process.exit();
}
