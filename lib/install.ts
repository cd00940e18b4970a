/**
 * Makes `bun run app.ts` enough on a fresh clone: the first import of each program.
 *
 * Bun by itself fetches missing packages only into a global cache, where `patches/` are not
 * applied, and an unpatched driver can take the whole process with it (ARCHITECTURE.md, "The
 * driver"). So a missing `node_modules` is installed as `bun.lock` says, once, and the command
 * starts over.
 */
import { existsSync } from "node:fs";
import { dirname } from "node:path";

const root = dirname(import.meta.dir);

if (!existsSync(`${root}/node_modules`)) {
  process.stderr.write("first run: installing packages\n");
  const install = Bun.spawnSync(
    [process.execPath, "install", "--frozen-lockfile", "--production", "--silent"],
    { cwd: root, stdio: ["ignore", "ignore", "inherit"] },
  );
  if (!install.success) {
    process.stderr.write(`cannot install packages in ${root}: run "bun install" there\n`);
    process.exit(1);
  }
  // A process that has started without node_modules keeps looking elsewhere: begin again.
  process.execve?.(
    process.execPath,
    [process.execPath, ...process.execArgv, ...process.argv.slice(1)],
    process.env,
  );
}
