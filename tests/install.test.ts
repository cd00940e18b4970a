/** The first start on a fresh clone that cannot succeed says why, and the next one says the same. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { copyFileSync, existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { root, run, tempDir } from "./support/programs.ts";

setDefaultTimeout(30_000);

async function start(home: string, project: object) {
  mkdirSync(join(home, "lib"), { recursive: true });
  copyFileSync(join(root, "lib/install.ts"), join(home, "lib/install.ts"));
  writeFileSync(join(home, "app.ts"), 'import "./lib/install.ts";\n');
  writeFileSync(join(home, "package.json"), JSON.stringify(project));
  return run("app.ts", { home });
}

test("a failed installation says why, and leaves nothing that makes the next one fail differently", async () => {
  using folder = tempDir();
  const project = { engines: { bun: ">=1.0.0" }, dependencies: { absent: "file:./absent" } };
  const first = await start(folder.path, project);
  expect(first.code).toBe(1);
  expect(first.stderr).toMatch(/error: .*\n(.*\n)*cannot install packages in /);
  expect(existsSync(folder.file("node_modules"))).toBe(false);
  expect(await start(folder.path, project)).toEqual(first);
});

test("a Bun that is too old gets one line that says so", async () => {
  using folder = tempDir();
  const started = await start(folder.path, { engines: { bun: ">=99.0.0" }, dependencies: {} });
  expect(started).toEqual({
    code: 1,
    stdout: "",
    stderr: `this is Bun ${Bun.version}, required is >=99.0.0: run "bun upgrade"\n`,
  });
});

test("an installation that was interrupted is named in one line", async () => {
  using folder = tempDir();
  mkdirSync(folder.file("node_modules/pino"), { recursive: true });
  writeFileSync(folder.file("node_modules/pino/package.json"), "{}");
  const dependencies = { pino: "1.0.0", postgres: "1.0.0" };
  const started = await start(folder.path, { engines: { bun: ">=1.0.0" }, dependencies });
  const stderr = 'packages are missing (postgres): run "bun install"\n';
  expect(started).toEqual({ code: 1, stdout: "", stderr });
});
