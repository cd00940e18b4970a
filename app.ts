/**
 * The server: accepts events over HTTP, answers 201 once they are synced to disk, and serves balances.
 * The processor (a Worker) and, without DATABASE_URL, an embedded Postgres run with it: one command.
 */
import "./lib/install.ts";

import { join } from "node:path";

import { InvalidSetting, readCommand, type SettingsOf } from "./lib/config.ts";
import { explain } from "./lib/errors.ts";
import { setEventTypes } from "./lib/event/event.ts";
import { checkJournalUrl } from "./lib/journal/url.ts";
import { LedgerRefused, openDatabase, requireLedger } from "./lib/ledger/database.ts";
import { checkDatabaseUrl, parseDatabaseUrl } from "./lib/ledger/url.ts";
import { type Log, openLog } from "./lib/log.ts";
import { ledgerUrl, openCluster } from "./lib/postgres/cluster.ts";
import { acquireProcessorLock, supervise } from "./lib/processor/supervisor.ts";
import { sayLines } from "./lib/progress.ts";
import { announce } from "./lib/server/announce.ts";
import { createApi, type Parts } from "./lib/server/api.ts";
import { readAccess } from "./lib/server/auth.ts";
import { watchDescriptors } from "./lib/server/descriptors.ts";
import { openServerJournal } from "./lib/server/journal.ts";
import { listen, readCertificate } from "./lib/server/listener.ts";
import { openLive } from "./lib/server/live.ts";
import { openMetrics } from "./lib/server/metrics.ts";
import { watchPosted } from "./lib/server/posted.ts";
import { printToken, SCOPES } from "./lib/server/token.ts";

export type { App } from "./lib/server/api.ts";

/**
 * Before anything is stored on top of the journal, a start waits this long for the ledger to say how far
 * it is posted. That takes some 50 ms. A database that cannot be reached is not waited for.
 */
const COMPARE_MS = 3_000;
/** Before that, a start waits this long for the ledger to say whether it can be used. */
const REQUIRE_MS = 3_000;
/** What asks for a token instead of a server. */
const TOKEN_OPTIONS = ["token", "scope", "expires", "sub"];

async function main(): Promise<number> {
  process.umask(0o077); // what is in DATA_DIR is for its owner
  const { settings, options } = readCommand(COMMAND);
  if (TOKEN_OPTIONS.some((name) => options[name])) return printToken(settings, options);
  const { DATABASE_URL: databaseUrl } = settings;
  const log = openLog(settings.LOG_LEVEL);
  const logLine = (line: string) => log.info(line);
  const access = readAccess(settings, log);
  const schema = await openSchema(settings, log);
  const isHttps = readCertificate(settings) !== null; // throws before anything is created
  const { note = null } = databaseUrl ? parseDatabaseUrl(databaseUrl) : {};
  if (note) log.info(note);
  const { stop, onReload } = handleSignals(log);

  await using stack = new AsyncDisposableStack(); // closes in reverse order
  const opening = openServerJournal(settings, logLine); // a stream that does not answer is waited for
  const journal = await Promise.race([opening, aborted(stop.signal)]);
  if (!journal) return 0;
  stack.defer(() => journal.close());
  if (!databaseUrl) stack.use(await openEmbedded(settings, stop.signal, logLine));
  if (stop.signal.aborted) return 0;
  const database = openDatabase(ledgerUrl(settings), "server", 4);
  stack.defer(() => database.close());
  await Promise.race([requireLedger(database, REQUIRE_MS), aborted(stop.signal)]);
  const posted = watchPosted(journal, database);
  stack.defer(() => posted.close());
  posted.compared.catch((error) => stop.abort(error));
  await Promise.race([posted.asked, Bun.sleep(COMPARE_MS), aborted(stop.signal)]);
  if (stop.signal.aborted) return exitCode(stop.signal, log);
  const metrics = openMetrics({ journal, database, posted, settings });
  const live = openLive({ journal, database, posted, metrics });
  const parts = { journal, database, access, schema, log, posted, metrics, live, isHttps };
  const server = listen(createApi(parts), settings);
  stack.use(watchDescriptors(server, log));
  if (isHttps) onReload(() => server.renewCertificate(log));
  announce(server.origin, settings, log);
  const run = options["no-processor"] ? null : runProcessor(settings, stop.signal, parts);
  run?.catch((error) => stop.abort(error));
  await aborted(stop.signal);
  log.info("stopping");
  live.close();
  await server.finish();
  posted.close();
  await run?.catch(() => {}); // it is the reason of `stop`
  await stack.disposeAsync();
  return exitCode(stop.signal, log);
}

const COMMAND = {
  program: "app",
  usage: "bun run app.ts [--no-processor | --token --scope SCOPE --expires TIME [--sub NAME]]",
  about:
    "Accepts events over HTTP into the journal in DATA_DIR, posts them to the ledger in Postgres,\n" +
    "and serves the balances. With --token, prints a token signed with JWT_SECRET instead.",
  options: {
    "no-processor": { type: "boolean", meaning: "the server alone; run processor.ts beside it" },
    token: { type: "boolean", meaning: "print a token that this server accepts" },
    scope: { type: "string", meaning: `with --token: ${SCOPES.join(", ")}, or both in quotes` },
    expires: { type: "string", meaning: "with --token: how long it is valid, like 12h or 30d" },
    sub: { type: "string", meaning: "with --token: the user whose own balance it may read" },
  },
  checks: [checkDatabaseUrl, checkJournalUrl],
  maxFiles: 0,
  exits: {
    0: "stopped by SIGTERM or SIGINT; everything acknowledged is on disk",
    1: "failed to start: port, journal or embedded Postgres unavailable",
    2: "invalid use or setting, or a ledger that cannot be used as it is; the message says how to change it",
  },
} as const;

type AppSettings = SettingsOf<"app">;

/** SIGTERM and SIGINT abort `stop`. SIGHUP reloads, once there is something to reload. */
function handleSignals(log: Log) {
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.on(signal, () => stop.abort(signal));
  let reload = () => log.info("SIGHUP: there is nothing to reload");
  process.on("SIGHUP", () => reload()); // without a handler it ends the process
  return { stop, onReload: (work: () => void) => (reload = work) };
}

/** 0 after a signal; 1 after a failure, which is logged. */
function exitCode({ reason }: AbortSignal, log: Log): number {
  if (reason instanceof Error) log.fatal(reason.message);
  else log.info("stopped");
  return reason instanceof Error ? 1 : 0;
}

/** Sets the event types. Starts what validates events only where a schema is set. */
async function openSchema({ EVENT_TYPES, EVENT_SCHEMA: path }: AppSettings, log: Log) {
  setEventTypes(EVENT_TYPES);
  return path ? (await import("./lib/server/event-schema.ts")).openEventSchema(path, log) : null;
}

/** The embedded Postgres; `null` if the start is stopped before it runs. */
async function openEmbedded(settings: AppSettings, stop: AbortSignal, say: (line: string) => void) {
  const { DATA_DIR, DAYBOOK_POSTGRES: programs } = settings;
  const opening = openCluster(join(DATA_DIR, "postgres"), say, { programs });
  const cluster = await Promise.race([opening, aborted(stop)]);
  return cluster && { [Symbol.asyncDispose]: () => cluster.close() };
}

/** Runs the processor beside the server, once no other one follows this journal. */
async function runProcessor(settings: AppSettings, stop: AbortSignal, parts: Parts) {
  const { journal, log, metrics, posted } = parts;
  const tell = (line: string) => log.info(`processor: ${line}`);
  const isStream = settings.JOURNAL_URL !== undefined; // any number of processors follows it
  const lock = isStream ? null : await acquireProcessorLock(settings.DATA_DIR, stop, tell);
  if (!lock && !isStream) return;
  const own = isStream ? { own: journal.id } : {};
  const job = { settings, files: [], waitsForLedger: true, ...own };
  const processor = supervise(job, (report) => {
    if (report.type === "say") log[report.level ?? "info"](report.line);
    if (report.type === "failed") log.fatal(report.line);
    if (report.type === "posted") metrics.posted(report);
    if (report.type === "waiting") posted.pause(report.isPaused ? report.why : null);
  });
  await aborted(stop);
  await processor.stop();
  lock?.release();
}

function aborted(signal: AbortSignal): Promise<null> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve(null);
    signal.addEventListener("abort", () => resolve(null));
  });
}

/** Runs the program, and ends the process with its exit code. */
export async function run(): Promise<never> {
  process.exitCode = await main().catch((error) => {
    sayLines(explain(error));
    return error instanceof InvalidSetting || error instanceof LedgerRefused ? 2 : 1;
  });
  process.exit();
}

if (import.meta.main) await run();
