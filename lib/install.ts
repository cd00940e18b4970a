/**
 * Makes `bun run app.ts` enough on a fresh clone: the first import of each program.
 *
 * Bun by itself fetches missing packages only into a global cache, where `patches/` are not
 * applied, and an unpatched driver can take the whole process with it (ARCHITECTURE.md, "The
 * driver"). So a missing `node_modules` is installed as `bun.lock` says, once, and the command
 * starts over.
 */
import { existsSync, rmSync } from "node:fs";
import { dirname } from "node:path";

import { dependencies, engines } from "../package.json";

const root = dirname(import.meta.dir);
/** The one-file program brings its packages, and Bun. */
const isBuilt = Bun.isStandaloneExecutable;

if (!isBuilt && !Bun.semver.satisfies(Bun.version, engines.bun)) {
  process.stderr.write(
    `this is Bun ${Bun.version}, required is ${engines.bun}: run "bun upgrade"\n`,
  );
  process.exit(1);
}

if (!isBuilt && !existsSync(`${root}/node_modules`)) {
  process.stderr.write("first run: installing packages\n");
  const install = Bun.spawnSync(
    [process.execPath, "install", "--frozen-lockfile", "--production", "--no-progress"],
    { cwd: root, stdio: ["ignore", "ignore", "pipe"] },
  );
  if (!install.success) {
    // What is there of them would make the next run fail in another way.
    rmSync(`${root}/node_modules`, { recursive: true, force: true });
    process.stderr.write(
      `${install.stderr.toString()}cannot install packages in ${root}; see above\n`,
    );
    process.exit(1);
  }
  // A process that has started without node_modules keeps looking elsewhere: begin again.
  process.execve?.(
    process.execPath,
    [process.execPath, ...process.execArgv, ...process.argv.slice(1)],
    process.env,
  );
}

// An installation that was interrupted: an import would fail with a stack, and name only the first.
const missing = Object.keys(dependencies).filter(
  (name) => !isBuilt && !existsSync(`${root}/node_modules/${name}/package.json`),
);
if (missing.length > 0) {
  process.stderr.write(`packages are missing (${missing.join(", ")}): run "bun install"\n`);
  process.exit(1);
}
