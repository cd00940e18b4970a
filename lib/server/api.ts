/**
 * The HTTP API: every route with its types, over a journal and a database that are open. The handlers
 * stand below the routes. What a route promises is in its `detail`; failures leave as a Problem.
 */
import { openapi } from "@elysiajs/openapi";
import { Elysia, status, t } from "elysia";

import { version } from "../../package.json";
import { isUserId } from "../event/event.ts";
import { MAX_LISTED_ERRORS } from "../event/lines.ts";
import { type Journal, JournalFull } from "../journal/writer.ts";
import { type Database, RowRefused, Unavailable } from "../ledger/database.ts";
import { readBalance } from "../ledger/balances.ts";
import { checkLedger } from "../ledger/ledger.ts";
import { type Log, watchHealth } from "../log.ts";
import { type Access, openAuth } from "./auth.ts";
import { MAX_LISTED_USERS, openBalances, streamedFormat } from "./balances.ts";
import { announcedBytes, freeLines, type Lines, readEvent, readLines, sortLines } from "./body.ts";
import type { EventSchema } from "./event-schema.ts";
import { openAnswers } from "./held-answer.ts";
import { observe } from "./listener.ts";
import type { Live } from "./live.ts";
import { MAX_REQUESTS_BYTES, openMemoryBudget } from "./memory.ts";
import type { Metrics } from "./metrics.ts";
import { describeBody, describeEvent, EventBody, EventsBody } from "./openapi.ts";
import { type ApiDocument, openApiPage } from "./openapi-page.ts";
import { openPage, PAGE_PATHS } from "./page.ts";
import type { PostedWatch } from "./posted.ts";
import {
  allowedMethods,
  invalidQuery,
  Problem,
  problems,
  routeOf,
  unavailable,
} from "./problem.ts";
import { checkQuery, type QuerySchema } from "./query.ts";
import { listQuarantined, MAX_LISTED_LINES } from "./quarantined.ts";
import {
  type NotStored,
  openSources,
  readSourceHeaders,
  requireSourceName,
  sourceHeaders,
} from "./sources.ts";
import { readRevenue } from "./revenue.ts";
import type { Scope } from "./token.ts";
import { nextTurn } from "./turns.ts";

/** A probe about writes waits this long for the database: probes usually give up after 1 s. */
const PROBE_MS = 500;
/** `?after=` waits this long. */
const AFTER_MS = 5_000;
const USERS_PATH = "/userEvents";
/** Bad lines listed unless `?errors=` says otherwise. */
const DEFAULT_LISTED_ERRORS = 100;

const listed = { default: DEFAULT_LISTED_ERRORS, minimum: 0, maximum: MAX_LISTED_ERRORS };
const openObject = { additionalProperties: true };
const SourceParams = t.Object({ source: t.String() });
const Counts = t.Object({
  accepted: t.Integer(),
  rejected: t.Integer(),
  errors: t.Array(t.Object({ line: t.Integer(), message: t.String() })),
  position: t.String(),
});
const Balance = t.Object({ user_id: t.String(), revenue: t.String() });

/** One user, a page in the order of users, or the largest balances; see `listUsers`. */
const UsersQuery = t.Object(
  {
    user_id: t.Optional(t.String({ description: "this user alone" })),
    limit: t.Optional(t.Integer({ minimum: 1, maximum: MAX_LISTED_USERS, description: "100" })),
    cursor: t.Optional(t.String({ description: "the `next` of the page before" })),
    order: t.Optional(t.Literal("revenue", { description: "the largest balances" })),
  },
  openObject,
);
const Users = t.Object({
  users: t.Array(Balance),
  next: t.Union([t.String(), t.Null()]),
  at: t.Optional(t.String({ description: "when the largest balances were read" })),
});
const Readiness = t.Object({
  status: t.String(),
  reads: t.Union([t.Literal("ready"), t.Literal("unavailable")]),
  lagBytes: t.Integer(),
  lagSeconds: t.Number(),
  paused: t.Optional(t.String({ description: "why posting waits for a person" })),
});

/** What the routes that receive lines have in common; `readLines` reads their bodies. */
const receivesLines = {
  grants: "events:write",
  parse: "none",
  body: EventsBody,
  query: t.Object({ errors: t.Optional(t.Integer(listed)) }, openObject),
} as const;

/** Its type, for clients: `treaty<App>("http://…")` of `@elysiajs/eden`. */
export type App = ReturnType<typeof createApi>;

export interface Parts {
  journal: Journal;
  database: Database;
  access: Access;
  schema: EventSchema | null;
  log: Log;
  posted: PostedWatch;
  metrics: Metrics;
  live: Live;
  isHttps: boolean;
}

/** The routes, ready to listen. */
export function createApi(parts: Parts) {
  const { journal, database, access, schema, log, posted, metrics, live, isHttps } = parts;
  const authorize = openAuth(access, log);
  const budget = openMemoryBudget();
  const { gauge } = metrics;
  gauge("request_memory_bytes", "Memory that requests have reserved.", budget.usedBytes);
  gauge("request_memory_limit_bytes", "The most that they may.", () => MAX_REQUESTS_BYTES);
  const answers = openAnswers();
  const sources = openSources(journal, database, posted.settle);
  const balances = openBalances(database);
  const journalHealth = watchHealth(log, "error", "journal: events are stored again");
  const databaseHealth = watchHealth(log, "warn", "database: available again");
  const faults = watchHealth(log, "error", "");
  const routes: { method: string; path: string; hooks: { query?: QuerySchema } }[] = [];

  // Elysia looks for the path after the eleventh character of the URL, where that of `http://x/` has
  // begun already: 404. Without it, it looks after the seventh, which finds none in HTTPS.
  const handler = { standardHostname: isHttps };
  const app = new Elysia({ normalize: false, strictPath: true, handler })
    .use(problems((path) => allowedMethods(routes, path), faults.failing))
    .use(
      openapi({
        provider: null, // its pages run a script of another host; ours is below
        documentation: {
          info: { title: "Daybook", version, description: "Events in, balances out." },
          components: { securitySchemes: { secret: { type: "http", scheme: "bearer" } } },
        },
      }),
    )
    .macro({
      /** What a credential must grant; a token may also read the balance of its own user. */
      grants: (scope: Scope) => ({
        detail:
          access.readingIsOpen && scope === "balances:read" ? {} : { security: [{ secret: [] }] },
        transform: async ({ request, path, route, params, query, set }) => {
          // What is read may not be kept by a cache, which asks for no credential; refusals included.
          if (scope === "balances:read") set.headers["cache-control"] = "no-store";
          const { userid } = (params ?? {}) as { userid?: string };
          // Only there does the query name the user; elsewhere it must not grant anything.
          const user = path === USERS_PATH ? (query as { user_id?: string }).user_id : userid;
          // Not the context's `server`, which Elysia defines as a property of each request.
          const denied = authorize({ request, server: serving() }, scope, user);
          if (denied) await denied;
          if (!request.url.includes("?")) return;
          const { hooks } = routes.find((each) => each.path === route && each.hooks.query) ?? {};
          if (hooks?.query) checkQuery(request.url, hooks.query);
        },
      }),
    })
    .post("/liveEvent", ({ request }) => storeEvent(request), {
      grants: "events:write",
      parse: "none",
      body: EventBody,
      response: { 201: t.Object({ message: t.String(), position: t.String() }) },
      detail: {
        summary: "Store one event; `Idempotency-Key`, plain or quoted, is the same as its `id`",
        requestBody: describeBody("application/json", describeEvent(schema)),
      },
    })
    .post(
      "/liveEvents",
      async ({ request, query, status }) => status(201, await storeEvents(request, query.errors)),
      {
        ...receivesLines,
        response: { 201: Counts },
        detail: {
          summary: "Store many events, one a line; the good lines together, the bad ones listed",
          description: "Ids are read from the lines; an `Idempotency-Key` header is ignored.",
          requestBody: describeBody("application/x-ndjson"),
        },
      },
    )
    .head(
      "/sources/:source",
      async ({ params, set }) => {
        set.status = 204;
        Object.assign(set.headers, await readSource(params.source));
      },
      {
        grants: "events:write",
        params: SourceParams,
        detail: { summary: "How much of a source is stored" },
      },
    )
    .patch(
      "/sources/:source",
      async ({ request, params, query, set }) => {
        const { headers, counts } = await storeSource(request, params.source, query.errors);
        Object.assign(set.headers, headers);
        return counts;
      },
      {
        ...receivesLines,
        params: SourceParams,
        response: { 200: Counts },
        detail: {
          summary: "Store the next bytes of a source, from `Upload-Offset` on",
          description:
            "The header `Upload-Offset` says how many bytes of the source are stored, `Source-Digest` is the " +
            "SHA-256 of the source up to the end of this body. 409 says where the source really stands.",
          requestBody: describeBody("application/x-ndjson"),
        },
      },
    )
    .get(USERS_PATH, ({ request, query }) => listUsers(request, query), {
      grants: "balances:read",
      query: UsersQuery,
      response: {
        200: Users,
      },
      detail: {
        summary:
          "Balances, a page at a time; all of them as `text/csv` or `application/x-ndjson`, if `Accept` " +
          "says so; with `user_id`, one, also if its id cannot stand in a path (`..`)",
      },
    })
    .get("/userEvents/:userid", ({ params, query }) => readUser(params.userid, query.after), {
      grants: "balances:read",
      params: t.Object({ userid: t.String() }),
      query: t.Object({ after: t.Optional(t.String()) }, openObject),
      response: { 200: Balance },
      detail: { summary: "The balance of a user; with `after`, once that position is posted" },
    })
    .get("/revenue", ({ request, query }) => listRevenue(request, query), {
      grants: "balances:read",
      query: t.Object(
        {
          step: t.Optional(
            t.Union([t.Literal("minute"), t.Literal("hour"), t.Literal("day")], {
              description:
                "`hour` unless it is given; minutes are kept for a day, hours for 90 days",
            }),
          ),
          from: t.Optional(t.String({ description: "a time of ISO 8601" })),
          to: t.Optional(t.String({ description: "exclusive; now unless it is given" })),
        },
        openObject,
      ),
      response: {
        200: t.Object({
          points: t.Array(
            t.Object({
              at: t.String(),
              step: t.String(),
              name: t.String(),
              events: t.Integer(),
              amount: t.String(),
            }),
          ),
        }),
      },
      detail: {
        summary:
          "Revenue over time: events and amounts by name and the time they were stored (UTC)",
      },
    })
    .get("/quarantine", ({ request, query }) => listQuarantine(request, query), {
      grants: "balances:read",
      query: t.Object(
        {
          limit: t.Optional(
            t.Integer({ minimum: 1, maximum: MAX_LISTED_LINES, description: "100" }),
          ),
          cursor: t.Optional(t.String({ description: "the `next` of the page before" })),
        },
        openObject,
      ),
      response: {
        200: t.Object({
          lines: t.Array(
            t.Object({
              source: t.String(),
              position: t.Integer(),
              reason: t.String(),
              line: t.String(),
              at: t.String(),
            }),
          ),
          next: t.Union([t.String(), t.Null()]),
        }),
      },
      detail: {
        summary: "Lines that were set aside, each with its reason, the newest first",
        description:
          "Of a source, 1,000 lines in an hour. `processor.ts --quarantine` also lists those beyond.",
      },
    })
    .get("/live", ({ request }) => live.view(request), {
      grants: "balances:read",
      detail: {
        summary:
          "Server-Sent Events, one a second: the figures of the last ten minutes, then of each second; " +
          "what this server accepts and rejects, what the ledger posts, the lag, and how it all is",
      },
    })
    .get("/openapi", describeApi, { detail: { hide: true } })
    .get("/healthz", () => ({ status: "ok", version }), {
      detail: { summary: "200 while the process serves, with its version" },
    })
    .get("/readyz", ({ query }) => readReadiness(query.reads !== undefined), {
      query: t.Object({ reads: t.Optional(t.String()) }, openObject),
      response: { 200: Readiness },
      detail: {
        summary:
          "200 when events can be stored, with the lag of posting; with `?reads`, when balances can be " +
          "read too",
      },
    })
    .get(
      "/metrics",
      async ({ set }) => {
        await nextTurn(); // 1.5 ms
        set.headers["content-type"] = metrics.contentType;
        return metrics.scrape();
      },
      {
        grants: "balances:read",
        response: { 200: t.String() },
        detail: { summary: "Prometheus metrics" },
      },
    );
  // Not chained: a typed client has no use for them.
  const page = openPage();
  for (const path of PAGE_PATHS)
    app.get(path, ({ request }) => page(path, request), { detail: { hide: true } });
  routes.push(...app.routes);
  // Its type is wrong: it describes a function that returns functions.
  return app.wrap(observe(log, metrics, (path) => routeOf(routes, path)) as never);

  function serving(): Bun.Server<unknown> | null {
    return app.server;
  }

  async function describeApi({ request }: { request: Request }): Promise<Response> {
    await nextTurn(); // 1 ms
    const { origin } = new URL(request.url);
    const document = await app.handle(new Request(`${origin}/openapi/json`));
    return openApiPage((await document.json()) as ApiDocument, origin);
  }

  async function storeEvent(request: Request) {
    using reservation = budget.admit();
    const line = await readEvent({ request, reservation, schema, onRejected: metrics.rejected });
    const position = formatPosition(await stored(journal.append(line)));
    metrics.accepted(1);
    return status(201, { message: "Event sent to process", position });
  }

  async function storeEvents(request: Request, maxErrors = DEFAULT_LISTED_ERRORS) {
    using reservation = budget.admit();
    const received = { request, reservation, schema, onRejected: metrics.rejected };
    const body = await readLines(received);
    const lines = await sortLines(body, received, maxErrors);
    using held = answers.hold();
    held.reserve(lines.errorBytes);
    const position = formatPosition(await stored(journal.append(lines.good)));
    metrics.accepted(lines.counts.accepted);
    // Not where it failed: the journal may still hold them.
    freeLines(reservation, body, lines);
    return held.answer({ ...lines.counts, position }, 201);
  }

  async function storeSource(request: Request, source: string, maxErrors = DEFAULT_LISTED_ERRORS) {
    const name = requireSourceName(source);
    const { offset: from, digest } = readSourceHeaders(request.headers);
    using reservation = budget.admit();
    const received = { request, reservation, schema, onRejected: metrics.rejected };
    using arriving = sources.expect(name, from, from + announcedBytes(request));
    const body = await readLines(received);
    await arriving.before;
    const to = from + body.length;
    using held = answers.hold();
    let lines: Lines | undefined;
    const sort = async () => {
      lines = await sortLines(body, received, maxErrors, from);
      if (lines.fits !== undefined) throw unlisted(lines.fits);
      held.reserve(lines.errorBytes);
      return lines;
    };
    const storing = sources.store({ name, from, digest }, body, sort);
    arriving.arrived();
    const result = await stored(storing);
    const sorted = lines ?? (await sort());
    const { counts } = sorted;
    if ("state" in result) throw refusal(result, { from, lines: counts });
    metrics.accepted(counts.accepted);
    freeLines(reservation, body, sorted);
    const headers = sourceHeaders({ offset: to, digest });
    const position = formatPosition(result.position);
    return { headers, counts: held.answer({ ...counts, position }, 200) };
  }

  /** The sender of a source asked for errors that no answer holds: of fewer bytes it gets all. */
  function unlisted(bytes: number): Problem {
    const detail = `the answer cannot list all rejected lines; send the first ${bytes} bytes first`;
    return new Problem(413, detail, { bytes });
  }

  /** Why a piece of a source was not stored: for its sender. */
  function refusal(
    { state, why }: NotStored,
    { from, lines }: { from: number; lines: object },
  ): Problem {
    if (why === "digest" && from === 0)
      return new Problem(422, "Source-Digest is not the digest of this body", {
        errors: [{ path: "Source-Digest", message: "must be the SHA-256 of the body" }],
      });
    const detail =
      why === "digest"
        ? `Source-Digest is not the digest of the ${from} stored bytes and this body: these are not ` +
          "the next bytes of this source"
        : `the source is at offset ${state.offset}, not at ${from}`;
    return new Problem(409, detail, {
      headers: { ...sourceHeaders(state), "journal-position": formatPosition(journal.end()) },
      // A sender that never got the answer to these bytes learns from this what was rejected.
      lines,
    });
  }

  async function readSource(source: string): Promise<Record<string, string>> {
    // This may be answered from memory, which says nothing about the database.
    const state = await sources
      .state(requireSourceName(source))
      .catch((error: unknown) => queried<never>(Promise.reject(error)));
    if (!state) throw new Problem(404, "nothing of this source is stored");
    return { ...sourceHeaders(state), "journal-position": formatPosition(journal.end()) };
  }

  async function readUser(userId: string, after: string | undefined) {
    if (after !== undefined) await waitUntilPosted(after);
    const revenue = isUserId(userId) ? await queried(readBalance(database, userId)) : null;
    if (revenue === null) throw new Problem(404, "no event of this user has been posted");
    return { user_id: userId, revenue };
  }

  async function listUsers(request: Request, query: typeof UsersQuery.static) {
    const { headers, method } = request;
    const { user_id: userId, limit = 100, cursor, order } = query;
    if (order && cursor !== undefined)
      throw invalidQuery("cursor", "the largest balances have no second page");
    if (userId !== undefined) {
      const revenue = isUserId(userId) ? await queried(readBalance(database, userId)) : null;
      return { users: revenue === null ? [] : [{ user_id: userId, revenue }], next: null };
    }
    const format = streamedFormat(headers.get("accept"));
    if (!format) {
      // All callers share one scan for the largest, so it holds up nobody who reads a page.
      const largest = order && (await queried(balances.largest(limit)));
      return answers.read<typeof Users.static>(
        request,
        async () => largest ?? queried(balances.list(limit, cursor)),
      );
    }
    if (order ?? cursor ?? query.limit)
      throw invalidQuery(
        "",
        `${format} is the list of all users: it has no limit, cursor or order`,
      );
    // As `never`, it does not change what typed clients expect.
    return queried(balances.stream(format, method === "HEAD") as Promise<never>);
  }

  async function listRevenue(request: Request, query: Parameters<typeof readRevenue>[1]) {
    return answers.read(request, () => queried(readRevenue(database, query)));
  }

  async function listQuarantine(request: Request, query: Parameters<typeof listQuarantined>[1]) {
    return answers.read(request, () => queried(listQuarantined(database, query)));
  }

  async function waitUntilPosted(after: string): Promise<void> {
    const [, journalId = "", position] = /^([0-9a-f-]{36}):(\d{1,15})$/.exec(after) ?? [];
    if (!position)
      throw new Problem(422, "`after` must be a `position` from an answer of this API, whole");
    if (!(await queried(posted.wait(journalId, Number(position), AFTER_MS))))
      throw new Problem(504, `not posted within ${AFTER_MS / 1000} s`, {
        headers: { "retry-after": "1" },
      });
  }

  async function readReadiness(mustRead: boolean) {
    const trouble = journal.trouble();
    if (trouble) throw unavailable(`the journal cannot store events now: ${trouble}`);
    const reading = queried(checkLedger(database).then(posted.refresh)).then(() => true);
    const canRead = mustRead
      ? await reading
      : await Promise.race([reading.catch(isProblem), Bun.sleep(PROBE_MS).then(() => false)]);
    const { bytes: lagBytes, seconds: lagSeconds } = posted.lag();
    const reads = canRead ? ("ready" as const) : ("unavailable" as const);
    const paused = posted.paused();
    return { status: "ready", reads, lagBytes, lagSeconds, ...(paused === null ? {} : { paused }) };
  }

  /** `false` for a 503 of the database; throws whatever else went wrong. */
  function isProblem(error: unknown): false {
    if (error instanceof Problem) return false;
    throw error;
  }

  function formatPosition(position: number): string {
    return `${journal.id}:${position}`;
  }

  /** What the journal stored; a Problem where it did not. */
  async function stored<T>(storing: Promise<T>): Promise<T> {
    try {
      const result = await storing;
      journalHealth.recovered();
      return result;
    } catch (error) {
      if (error instanceof Problem) throw error;
      // Only the ledger may know how much of a source is stored.
      if (error instanceof Unavailable) return queried(Promise.reject(error));
      const { message } = error as Error;
      journalHealth.failing(message);
      metrics.failed();
      if (error instanceof JournalFull) throw new Problem(507, message);
      throw unavailable(message);
    }
  }

  /** What the database answered; a 503 where it did not. Throws RowRefused. */
  async function queried<T>(querying: Promise<T>): Promise<T> {
    try {
      const result = await querying;
      databaseHealth.recovered();
      return result;
    } catch (error) {
      // A value that Postgres does not take is our own fault: the database works.
      if (error instanceof RowRefused || !(error instanceof Unavailable)) throw error;
      // Anybody may read a balance: the exact cause is for the log only.
      databaseHealth.failing(error.message);
      throw unavailable("the database is unavailable; retry shortly");
    }
  }
}
