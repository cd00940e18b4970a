/**
 * A Postgres for tests and measurements, which is reached over TCP as a team's own is, by a superuser:
 * they create databases and roles. It is the embedded one, opened up before its first start.
 */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { waitForLock } from "../../lib/lock.ts";
import { openCluster } from "../../lib/postgres/cluster.ts";
import {
  createCluster,
  inCluster,
  openDataDir,
  ROLE,
  runSingle,
} from "../../lib/postgres/data-dir.ts";

/** Any number of processes may do so at once. */
export async function openTestCluster(path: string) {
  const portFile = join(path, "port-of-tests");
  const dataDir = await openDataDir(path);
  const lock = await waitForLock(join(path, "test.lock"), new AbortController().signal, 20);
  if (!existsSync(portFile)) {
    await createCluster(dataDir, () => {});
    await runSingle(dataDir, `alter role ${ROLE} superuser;\n\n`);
    const hba = "host all all 127.0.0.1/32 scram-sha-256";
    Bun.spawnSync(["sh", "-c", `echo "${hba}" >>pg_hba.conf`], inCluster(dataDir));
    const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
    listener.stop(true);
    writeFileSync(portFile, `${listener.port}`);
  }
  lock?.release();
  const port = readFileSync(portFile, "utf8");
  const password = readFileSync(join(path, "password"), "utf8").trim();
  const cluster = await openCluster(path, () => {}, {
    settings: ["listen_addresses=127.0.0.1", `port=${port}`],
  });
  return {
    url: () => `postgres://${ROLE}:${password}@127.0.0.1:${port}/postgres`,
    close: () => cluster.close(),
  };
}

export type TestCluster = Awaited<ReturnType<typeof openTestCluster>>;
