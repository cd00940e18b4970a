/** Runs a command with DATABASE_URL set to a Postgres that is started for it, like a team's own. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { openTestCluster } from "../tests/support/cluster.ts";

const dir = mkdtempSync(join(tmpdir(), "daybook-ci-"));
const cluster = await openTestCluster(join(dir, "postgres"));
const child = Bun.spawn(process.argv.slice(2), {
  env: { ...process.env, DATABASE_URL: cluster.url() },
  stdio: ["ignore", "inherit", "inherit"],
});
process.exitCode = await child.exited;
await cluster.close();
rmSync(dir, { recursive: true, force: true });
process.exit();
