/** A real PgBouncer in transaction mode, with its defaults but for the size of its pool. */
import { closeSync, openSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";

import { tempDir, until } from "./programs.ts";

/** A PgBouncer before the Postgres at `url`. `poolSize` connections lead to each database. */
export async function openPgBouncer(url: string, poolSize: number) {
  const { hostname, port, username, password } = new URL(url);
  const folder = tempDir();
  const listenPort = await freePort();
  writeFileSync(folder.file("users"), `"${username}" "${decodeURIComponent(password)}"\n`);
  writeFileSync(
    folder.file("pgbouncer.ini"),
    [
      "[databases]",
      `* = host=${hostname} port=${port || 5432}`,
      "[pgbouncer]",
      "listen_addr = 127.0.0.1",
      `listen_port = ${listenPort}`,
      "unix_socket_dir =",
      "auth_type = plain",
      "auth_file = /proc/self/fd/3",
      "pool_mode = transaction",
      `default_pool_size = ${poolSize}`,
    ].join("\n"),
  );
  // It refuses to run as root. As another user it may not reach the folder, but what is open already.
  const files = ["pgbouncer.ini", "users"].map((name) => openSync(folder.file(name), "r"));
  const child = Bun.spawn(["pgbouncer", "/proc/self/fd/0"], {
    ...(process.getuid?.() === 0 ? { uid: 65534, gid: 65534 } : {}),
    stdio: [files[0]!, "ignore", "pipe", files[1]!],
  });
  for (const file of files) closeSync(file);
  let log = "";
  (async () => {
    for await (const chunk of child.stderr) log += Buffer.from(chunk).toString();
  })();
  await until(() => {
    if (child.exitCode !== null) throw new Error(`pgbouncer ended: ${log}`);
    return log.includes("process up");
  });
  const through = new URL(url);
  through.host = `127.0.0.1:${listenPort}`;
  return {
    url: through.href,
    async [Symbol.asyncDispose]() {
      child.kill("SIGKILL");
      await child.exited;
      folder[Symbol.dispose]();
    },
  };
}

export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}
