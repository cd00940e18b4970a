/**
 * What a standalone processor shows of itself on METRICS_PORT: `/metrics`, `/healthz` and `/readyz`. It holds no
 * balances and no events, so it requires no credential.
 */
import { join } from "node:path";

import type { SettingsOf } from "../config.ts";
import { diskSpace } from "../journal/disk.ts";
import { openJournalReader } from "../journal/reader.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { countPostings, openMeters } from "../metrics.ts";
import type { Report } from "./supervisor.ts";

type Settings = Pick<SettingsOf<"processor">, "HOST" | "METRICS_PORT" | "DATA_DIR">;

/** Listens until it is disposed. Throws one line that names what is wrong with the address. */
export function openMonitor({ HOST: hostname, METRICS_PORT: port, DATA_DIR }: Settings) {
  const path = join(DATA_DIR, JOURNAL_FILE);
  const meters = openMeters();
  const countPosting = countPostings(meters);
  /** Up to where the journal is posted; `null` while another processor follows it. */
  let position: number | null = null;
  let waiting: Extract<Report, { type: "waiting" }> | null = null;
  let lag: { bytes: number; seconds: number } | null = null;
  const { gauge } = meters;
  gauge("disk_free_bytes", "Free space on the disk of DATA_DIR.", () => diskSpace(DATA_DIR).free);
  gauge("posting_paused", "1 while posting waits for a person.", () => waiting?.isPaused ?? false);
  const help = "of the journal that this processor follows.";
  gauge("posting_lag_bytes", `Unposted bytes ${help}`, () => lag?.bytes ?? null);
  gauge("posting_lag_seconds", `Age of the oldest unposted event ${help}`, () => {
    return lag?.seconds ?? null;
  });
  const server = listen();

  return {
    url: server.url.origin,
    report(report: Report): void {
      if (report.type === "opened") position = report.from;
      if (report.type === "posted") {
        position = (position ?? 0) + report.bytes;
        countPosting(report);
      }
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
          "/healthz": { GET: () => Response.json({ status: "ok" }) },
          "/readyz": { GET: () => readiness() },
          "/metrics": {
            async GET() {
              lag = await readLag();
              const headers = { "content-type": meters.contentType };
              return new Response(await meters.scrape(), { headers });
            },
          },
        },
        fetch: ({ method }) => problem(method === "GET" ? 404 : 405),
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
    return Response.json({ status: position === null ? "standing by" : "ready" });
  }

  async function readLag() {
    const journal = position === null ? null : await openJournalReader(path).catch(() => null);
    if (journal === null || position === null) return null;
    const bytes = Math.max(0, (await journal.end()) - position);
    if (bytes === 0) return { bytes, seconds: 0 };
    const [frame] = await journal.read(position).catch(() => []);
    const seconds = frame ? Math.max(0, Date.now() - frame.atMs) / 1000 : 0;
    return { bytes, seconds };
  }
}

function problem(status: number, detail?: string): Response {
  const title = { 404: "Not Found", 405: "Method Not Allowed" }[status] ?? "Service Unavailable";
  const headers = { "content-type": "application/problem+json" };
  return Response.json({ type: "about:blank", title, status, detail }, { status, headers });
}
