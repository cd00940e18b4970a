/**
 * The HTTP side: every route with its types, over a journal and a database that are open. What a route
 * promises is in its `detail`; what goes wrong leaves as a Problem.
 */
import { openapi } from "@elysiajs/openapi";
import { Elysia, t } from "elysia";

import { type Access, type Asking, openAuth } from "./auth.ts";
import {
  describeBody,
  describeEvent,
  EventBody,
  EventsBody,
  readEvent,
  readEvents,
} from "./body.ts";
import { type Database, Unavailable } from "../ledger/database.ts";
import { isUserId } from "../event/event.ts";
import type { EventSchema } from "./event-schema.ts";
import { type Journal, JournalFull } from "../journal/writer.ts";
import type { LagWatch } from "./lag.ts";
import { checkLedger, readBalance } from "../ledger/ledger.ts";
import { MAX_LISTED_ERRORS } from "../event/lines.ts";
import { type Log, watchState } from "../log.ts";
import type { Metrics } from "./metrics.ts";
import { watchPosted } from "./posted.ts";
import { allowedMethods, Problem, problems, unavailable } from "./problem.ts";
import { openRoom } from "./memory.ts";
import { sourceHeaders, sourceName, sourceOf } from "./source-header.ts";
import type { Sources } from "./sources.ts";

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

/** Its type, for clients: `treaty<App>("http://…")` of `@elysiajs/eden`. */
export type App = ReturnType<typeof createApi>;

/** The routes, to be compiled and listened to. */
export function createApi(parts: {
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
  const mustPresent = [{ secret: [] }];
  const toRead = access.readingIsOpen ? {} : { security: mustPresent };
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
          security: mustPresent,
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
          security: mustPresent,
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
        detail: { summary: "How much of a source is taken", security: mustPresent },
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
            // A sender that never got the answer to these bytes learns from this what was rejected.
            lines: { accepted, rejected, errors },
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
          security: mustPresent,
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
        detail: {
          summary: "The balance of a user; with `after`, once that position is posted",
          ...toRead,
        },
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
        detail: { summary: "Figures for Prometheus", ...toRead },
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
      // How far a source is taken only the ledger may know.
      if (error instanceof Unavailable) return answered(Promise.reject(error));
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
