/** A server to attack, with its processor and its embedded Postgres, and the client that watches it. */
import { readFileSync, writeFileSync } from "node:fs";
import { setPriority } from "node:os";
import { join } from "node:path";

import { openConnection } from "../support/network.ts";
import { SECRET, startApp, tempDir, until } from "../support/programs.ts";

export type Target = Awaited<ReturnType<typeof openTarget>>;

export async function openTarget(env: (folder: string) => Record<string, string> = () => ({})) {
  const folder = tempDir();
  const trusting = { tls: { rejectUnauthorized: false } };
  prioritize(0);
  const app = await startApp({ dataDir: folder.file("data"), env: env(folder.path) });
  const prober = await openProber(app.url, app.pid);
  prioritize(10);
  const headers = { authorization: SECRET, "content-type": "application/x-ndjson" };
  return {
    url: app.url,
    folder,
    dataDir: folder.file("data"),
    pid: app.pid,
    log: app.stderr.text,
    isRunning: () => app.child.exitCode === null,
    post: app.post,
    postLines: app.postLines,
    /** Sends a body of lines, compressed or not, and returns the answer. */
    async send(body: Uint8Array, more: Record<string, string> = {}, query = "") {
      const init = { method: "POST", headers: { ...headers, ...more }, body: new Uint8Array(body) };
      const response = await fetch(`${app.url}/liveEvents${query}`, init);
      return { status: response.status, text: await response.text() };
    },
    /** The head of a request for many events, whose body follows. */
    head: (more: string, path = "/liveEvents") =>
      `POST ${path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: ${SECRET}\r\n` +
      `Content-Type: application/x-ndjson\r\n${more}\r\n\r\n`,
    connect: () => openConnection(app.url),
    /** Waits until everything stored so far is posted. */
    async settled() {
      await until(async () => {
        const answer = (await (await fetch(`${app.url}/readyz`, trusting)).json()) as {
          lagBytes: number;
        };
        return answer.lagBytes === 0;
      }, 120_000);
    },
    /** The longest wait for `/healthz` since the last call, in ms. */
    longestMs: prober.longestMs,
    /** The peak of its memory since `forgetPeak`, in MB. */
    peakMb: () => peakMbOf(app.pid),
    forgetPeak: () => writeFileSync(`/proc/${app.pid}/clear_refs`, "5"),
    async [Symbol.asyncDispose]() {
      prober.close();
      await app[Symbol.asyncDispose]();
      folder[Symbol.dispose]();
    },
  };
}

/** The server and the prober come before the attacker, as if that were elsewhere. */
function prioritize(niceness: number, pid = 0): void {
  try {
    setPriority(pid, niceness);
  } catch {} // only root may go below what it has
}

/** The largest memory of a process; 0 if it has ended. */
export function peakMbOf(pid: number): number {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    return Number(/VmHWM:\s+(\d+)/.exec(status)?.[1] ?? 0) / 1024;
  } catch {
    return 0;
  }
}

async function openProber(url: string, pid: number) {
  const child = Bun.spawn([process.execPath, join(import.meta.dir, "prober.ts"), url, `${pid}`], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  prioritize(-10, child.pid);
  const lines = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  return {
    async longestMs(): Promise<number> {
      child.stdin.write("\n");
      child.stdin.flush();
      return Number((await lines.read()).value);
    },
    close: () => child.kill(),
  };
}
