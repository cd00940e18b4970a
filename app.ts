/**
 * The server: takes events over HTTP, answers 201 once they are on the disk, and reads balances.
 * With it run the processor (a Worker) and, without DATABASE_URL, a private Postgres: one command.
 */
import "./lib/install.ts";

import { join } from "node:path";

import { createApi } from "./lib/server/api.ts";
import { type Access, SCOPES } from "./lib/server/auth.ts";
import { ledgerUrl, openCluster } from "./lib/postgres/cluster.ts";
import {
  isLoopback,
  maskSettings,
  parseDuration,
  readCommand,
  InvalidSetting,
} from "./lib/config.ts";
import { openDatabase } from "./lib/ledger/database.ts";
import { setEventTypes } from "./lib/event/event.ts";
import { disk, leavingRoom } from "./lib/journal/disk.ts";
import { compareWithLedger } from "./lib/processor/batches.ts";
import { type Commit, JOURNAL_FILE, openJournal } from "./lib/journal/writer.ts";
import { watchLag } from "./lib/server/lag.ts";
import { type Listener, listen, readPair, type Seen } from "./lib/server/listener.ts";
import { waitForLock } from "./lib/lock.ts";
import { type Log, openLog, watchState } from "./lib/log.ts";
import { type Metrics, openMetrics } from "./lib/server/metrics.ts";
import { routeFinder } from "./lib/server/problem.ts";
import { openSources } from "./lib/server/sources.ts";
import { type Job, supervise } from "./lib/processor/supervisor.ts";
import { openTokens, signToken, type TokenSettings } from "./lib/server/token.ts";

export type { App } from "./lib/server/api.ts";

/** A start waits this long for the ledger to say how far the journal is posted: it takes some 50. */
const COMPARE_MS = 500;
/** Who waits for another processor to end says so after this long. */
const STAND_BY_MS = 500;
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
  const schema = settings.EVENT_SCHEMA
    ? (await import("./lib/server/event-schema.ts")).openEventSchema(settings.EVENT_SCHEMA)
    : null;
  const tls = cert && key ? { cert, key } : null;
  if (tls) readPair(tls); // before anything is made
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort());

  let watch: (commit: Commit) => void = () => {};
  const segmentBytes = settings.JOURNAL_SEGMENT_BYTES;
  const room = databaseUrl ? disk : leavingRoom(disk);
  const journal = await openJournal(dataDir, say, room, segmentBytes, (commit) => watch(commit));
  const path = join(dataDir, JOURNAL_FILE);
  const cluster = databaseUrl
    ? null
    : await Promise.race([openCluster(join(dataDir, "postgres"), say), aborted(stop.signal)]);
  try {
    if (stop.signal.aborted) return 0;
    const database = openDatabase(ledgerUrl(dataDir, databaseUrl), "server", 4);
    const { asked, compared } = compareWithLedger(path, database, stop.signal);
    compared.catch(() => stop.abort());
    // Before anything is taken on top of it, if the database can be asked at all.
    await Promise.race([asked, Bun.sleep(COMPARE_MS)]);
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
    const api = createApi({ ...parts, isHttps: tls !== null });
    const routeOf = routeFinder(api.routes);
    const isLogged = log.isLevelEnabled("debug");
    const seen: Seen = (method, path, status, id, fromMs) => {
      const route = routeOf(path);
      metrics.answered(method, route, status);
      if (!isLogged) return;
      const ms = Math.round((performance.now() - fromMs) * 1000) / 1000;
      log.debug({ id, method, route, status, ms }, "request");
    };
    const server = listen(api.compile(), { hostname: HOST, port: PORT, tls }, seen);
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
      throw new Reported();
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
  const processor = supervise(job, (report) => {
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
class Reported extends Error {}

if (import.meta.main) {
  process.exitCode = await main().catch((error) => {
    if (!(error instanceof Reported)) complain((error as Error).message);
    return error instanceof InvalidSetting ? 2 : 1;
  });
  process.exit();
}
