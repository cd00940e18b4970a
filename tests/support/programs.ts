/** The programs as real processes, temporary folders, and waiting for a state. All are disposable (`using`). */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export const root = join(import.meta.dir, "..", "..");
export const SECRET = "secret";

export function tempDir() {
  const path = mkdtempSync(join(tmpdir(), "daybook-test-"));
  const remove = () => rmSync(path, { recursive: true, force: true });
  return { path, file: (name: string) => join(path, name), [Symbol.dispose]: remove };
}

interface Run {
  args?: string[];
  env?: Record<string, string>;
  cwd?: string;
  stdin?: string | Uint8Array;
  /** The folder of the programs, if not this project. */
  home?: string;
}

/** Starts one of the programs. It is stopped when the test ends. */
export function spawn(program: string, options: Run = {}) {
  const { args = [], env = {}, home = root, cwd = home, stdin } = options;
  const child = Bun.spawn([process.execPath, "run", join(home, program), ...args], {
    cwd,
    env: { ...process.env, PORT: "0", DATABASE_URL: "", AUTH_SECRET: SECRET, ...env },
    stdio: [stdin === undefined ? "ignore" : Buffer.from(stdin as string), "pipe", "pipe"],
  });
  const stderr = collect(child.stderr);
  const stdout = collect(child.stdout);
  return {
    pid: child.pid,
    child,
    stdout,
    stderr,
    kill: (signal: NodeJS.Signals = "SIGKILL") => child.kill(signal),
    /** The exit code; `null` if a signal ended it. */
    async exit() {
      await child.exited;
      await Promise.all([stdout.end, stderr.end]);
      return child.exitCode;
    },
    async [Symbol.asyncDispose]() {
      if (child.exitCode === null) child.kill("SIGTERM");
      const timer = setTimeout(() => child.kill("SIGKILL"), 8_000);
      await child.exited;
      clearTimeout(timer);
    },
  };
}

/** Runs one of the programs to its end. */
export async function run(program: string, options: Run = {}) {
  await using process = spawn(program, options);
  const code = await process.exit();
  return { code, stdout: process.stdout.text(), stderr: process.stderr.text() };
}

type AppOptions = Run & { dataDir: string; databaseUrl?: string };

/** Starts `app.ts`, and returns when it listens. */
export async function startApp(options: AppOptions): ReturnType<typeof startOnce> {
  for (let tries = 50; ; tries--) {
    try {
      return await startOnce(options);
    } catch (error) {
      // The port of a server that just ended may have become that of another test's connection.
      if (tries === 0 || !/in use/.test((error as Error).message)) throw error;
      await Bun.sleep(100);
    }
  }
}

async function startOnce(options: AppOptions) {
  const { dataDir, databaseUrl = "", env = {} } = options;
  const process = spawn("app.ts", {
    ...options,
    env: { DATA_DIR: dataDir, DATABASE_URL: databaseUrl, ...env },
  });
  const url = await until(() => {
    const line = /^listening on (.*)$/m.exec(process.stdout.text());
    if (!line && process.child.exitCode !== null)
      throw new Error(`app.ts ended with ${process.child.exitCode}: ${process.stderr.text()}`);
    return line?.[1];
  }, 60_000);
  const send = (path: string, type: string, body: string | Uint8Array<ArrayBuffer>, headers = {}) =>
    fetch(url + path, {
      method: "POST",
      headers: { authorization: SECRET, "content-type": type, ...headers },
      body,
    });
  return {
    ...process,
    url,
    /** POST /liveEvent */
    post: (event: unknown) =>
      send(
        "/liveEvent",
        "application/json",
        typeof event === "string" ? event : JSON.stringify(event),
      ),
    /** POST /liveEvents */
    postLines: (lines: string | Uint8Array<ArrayBuffer>, headers = {}) =>
      send("/liveEvents", "application/x-ndjson", lines, headers),
    /** The balance that GET answers; `null` for 404. */
    async balance(userId: string): Promise<string | null> {
      const response = await fetch(`${url}/userEvents/${encodeURIComponent(userId)}`);
      if (response.status === 404) return null;
      if (response.status !== 200) throw new Error(`GET answered ${response.status}`);
      return ((await response.json()) as { revenue: string }).revenue;
    },
  };
}

/**
 * Waits until GET answers `wanted` as the balance of `userId`. While the database is unavailable GET fails:
 * that is waited for as well. Throws with the last balance or failure.
 */
export async function untilBalance(
  app: { balance(userId: string): Promise<string | null> },
  userId: string,
  wanted: string | null,
  withinMs = 10_000,
): Promise<void> {
  let found: string | null = null;
  const ask = () => app.balance(userId).catch((error: Error) => error.message);
  const isThere = async () => (found = await ask()) === wanted;
  await until(isThere, withinMs).catch((error: Error) => {
    throw new Error(`${userId} has ${found}, expected ${wanted}: ${error.message}`);
  });
}

/** A port that is not in use. */
export async function closedPort(): Promise<number> {
  const server = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const { port } = server;
  server.stop(true);
  return port;
}

/**
 * For `test.if`: whether a program that a test needs is installed. If not, the test is skipped and the
 * program named; with CI=true this throws instead.
 */
export function isInstalled(program: string): boolean {
  if (Bun.which(program)) return true;
  if (process.env["CI"] === "true")
    throw new Error(`install ${program}: with CI=true no test is skipped`);
  console.warn(`skipping tests that need ${program}, which is not installed`);
  return false;
}

/** The messages of a program's log, each after its level. */
export function messages(stderr: string): string[] {
  const lines = stderr.split("\n").filter((line) => line !== "");
  return lines.map((line) => {
    const { level, msg } = JSON.parse(line) as { level: string; msg: string };
    return `${level}: ${msg}`;
  });
}

/**
 * Calls `ask` until it returns something other than `undefined`, `null` and `false`, and returns that;
 * throws after `withinMs`. Without `everyMs` the pauses grow from 5 to 100 ms.
 */
export async function until<T>(
  ask: () => T | Promise<T>,
  withinMs = 10_000,
  everyMs?: number,
): Promise<NonNullable<Exclude<T, false>>> {
  const deadline = performance.now() + withinMs;
  for (let pauseMs = everyMs ?? 5; ; pauseMs = everyMs ?? Math.min(pauseMs * 1.3, 100)) {
    const answer = await ask();
    if (answer !== undefined && answer !== null && answer !== false)
      return answer as NonNullable<Exclude<T, false>>;
    if (performance.now() > deadline) throw new Error(`not within ${withinMs} ms: ${ask}`);
    await Bun.sleep(pauseMs);
  }
}

function collect(stream: ReadableStream<Uint8Array>) {
  let text = "";
  const end = (async () => {
    const decoder = new TextDecoder();
    for await (const chunk of stream) text += decoder.decode(chunk, { stream: true });
  })();
  return { text: () => text, end };
}
