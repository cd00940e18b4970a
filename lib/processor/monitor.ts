/**
 * What a standalone processor shows of itself on METRICS_PORT: `/metrics`, `/healthz` and `/readyz`. It holds no
 * balances and no events, so it requires no credential.
 */
import { version } from "../../package.json";
import type { SettingsOf } from "../config.ts";
import { diskSpace } from "../journal/disk.ts";
import { countPostings, openMeters } from "../metrics.ts";
import type { Report } from "./supervisor.ts";

type Settings = Pick<SettingsOf<"processor">, "HOST" | "METRICS_PORT" | "DATA_DIR" | "JOURNAL_URL">;

/** Listens until it is disposed. Throws one line that names what is wrong with the address. */
export function openMonitor(settings: Settings) {
  const { HOST: hostname, METRICS_PORT: port, DATA_DIR, JOURNAL_URL } = settings;
  const meters = openMeters();
  const countPosting = countPostings(meters);
  let waiting: Extract<Report, { type: "waiting" }> | null = null;
  /** `null` while another processor follows the journal. */
  let lag: Extract<Report, { type: "lag" }> | null = null;
  const { gauge } = meters;
  if (!JOURNAL_URL)
    gauge("disk_free_bytes", "Free space on the disk of DATA_DIR.", () => diskSpace(DATA_DIR).free);
  gauge("posting_paused", "1 while posting waits for a person.", () => waiting?.isPaused ?? false);
  gauge("posting_lag_bytes", "Bytes that are not posted.", () => lag?.bytes ?? null);
  const age = "Age of the oldest event that is not posted.";
  gauge("posting_lag_seconds", age, () => lag?.seconds ?? null);
  const server = listen();

  return {
    url: server.url.origin,
    report(report: Report): void {
      if (report.type === "posted") countPosting(report);
      if (report.type === "lag") lag = report;
      if (report.type === "waiting") waiting = report.why === null ? null : report;
    },
    [Symbol.asyncDispose]: () => server.stop(true),
  };

  function listen() {
    try {
      return Bun.serve({
        ...{ hostname, port: port as number, development: false },
        reusePort: false, // else a second processor listens too, and gets half of the requests
        routes: {
          "/healthz": reading(() => Response.json({ status: "ok", version })),
          "/readyz": reading(readiness),
          "/metrics": reading(async () => {
            const headers = { "content-type": meters.contentType };
            return new Response(await meters.scrape(), { headers });
          }),
        },
        fetch: () => problem(404),
      });
    } catch (error) {
      const { code, message } = error as Error & { code?: string };
      const reason = code === "EADDRINUSE" ? "the port is in use" : message.split("\n")[0];
      throw new Error(`cannot listen on ${hostname}:${port}: ${reason}; set HOST or METRICS_PORT`);
    }
  }

  /** 503 while posting waits. */
  function readiness(): Response {
    if (waiting) return problem(503, waiting.why as string);
    return Response.json({ status: lag === null ? "standing by" : "ready" });
  }
}

/** A route that is only read. */
function reading(answer: () => Response | Promise<Response>) {
  return ({ method }: Request) => {
    if (method === "GET" || method === "HEAD") return answer();
    const refused = problem(405);
    refused.headers.set("allow", "GET, HEAD");
    return refused;
  };
}

function problem(status: number, detail?: string): Response {
  const title = { 404: "Not Found", 405: "Method Not Allowed" }[status] ?? "Service Unavailable";
  const headers = { "content-type": "application/problem+json" };
  return Response.json({ type: "about:blank", title, status, detail }, { status, headers });
}
