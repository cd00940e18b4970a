/** Postgres servers of a test's own, from the system's packages: for replication, and for TLS. */
import { chownSync, globSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";

import { freePort } from "./pgbouncer.ts";
import { until } from "./programs.ts";

const BIN = dirname(globSync("/usr/lib/postgresql/*/bin/pg_basebackup").at(-1) ?? "");

/** For `test.if`: whether they are installed. With CI=true this throws if not. */
export function hasServers(): boolean {
  if (BIN !== ".") return true;
  if (process.env["CI"] === "true")
    throw new Error("install Debian's postgresql: with CI=true no test is skipped");
  console.warn("skipping tests that need Debian's postgresql, which is not installed");
  return false;
}

export type Server = Awaited<ReturnType<typeof createServer>>;

/** Creates a server, or a standby of `primary`. */
export async function createServer(primary?: { url: string }) {
  const folder = mkdtempSync("/tmp/daybook-postgres-"); // Postgres runs as another user than root
  const user = process.getuid?.() === 0 ? postgresUser() : null;
  if (user) chownSync(folder, user.uid, user.gid);
  const data = join(folder, "data");
  const port = await freePort();
  const run = async (program: string, ...args: string[]) => {
    const child = Bun.spawn([join(BIN, program), ...args], { ...user, cwd: "/", stderr: "pipe" });
    if ((await child.exited) !== 0)
      throw new Error(`${program}: ${await new Response(child.stderr).text()}`);
  };
  if (primary) await run("pg_basebackup", "-D", data, "-R", "-c", "fast", "-d", primary.url);
  else await run("initdb", "-D", data, "-U", "daybook", "-A", "trust", "-E", "UTF8", "--no-sync");
  let child: Bun.Subprocess | null = null;
  return {
    data,
    port,
    user,
    url: `postgres://daybook@127.0.0.1:${port}/postgres`,
    async start(...settings: string[]) {
      const common = ["fsync=off", "unix_socket_directories=", "listen_addresses=127.0.0.1"];
      const args = [...common, ...settings].flatMap((setting) => ["-c", setting]);
      const command = [join(BIN, "postgres"), "-D", data, "-p", `${port}`, ...args];
      child = Bun.spawn(command, { ...user, cwd: "/", stdout: "ignore", stderr: "ignore" });
      const ready = () => run("pg_isready", "-q", "-h", "127.0.0.1", "-p", `${port}`);
      await until(() => ready().then(isDone, isNotYet), 30_000);
    },
    async stop(signal: NodeJS.Signals = "SIGINT") {
      child?.kill(signal);
      await child?.exited;
    },
    promote: () => run("pg_ctl", "promote", "-D", data),
    /** Starts it as a standby of `primary`. */
    async startBehind(primary: { port: number }) {
      writeFileSync(join(data, "standby.signal"), "");
      await this.start(`primary_conninfo=host=127.0.0.1 port=${primary.port} user=daybook`);
    },
    async close() {
      await this.stop("SIGQUIT");
      rmSync(folder, { recursive: true, force: true });
    },
    async [Symbol.asyncDispose]() {
      await this.close();
    },
  };
}

export const isDone = () => true;
export const isNotYet = () => false;

function postgresUser() {
  const id = (option: string) =>
    Number(Bun.spawnSync(["id", option, "postgres"]).stdout.toString());
  return { uid: id("-u"), gid: id("-g") };
}
