/**
 * The program with some of its lines altered, in a folder of its own. So a test can make it die at a
 * chosen point, and the suite can be tested by breaking what it should notice, while the program
 * itself has no hook for either.
 */
import {
  cpSync,
  existsSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

export const root = join(import.meta.dir, "..", "..");

export interface Alteration {
  file: string;
  /** Stands in the file exactly once. */
  find: string;
  put: string;
}

/** Vanishes when disposed. Throws when a text is not there, or more than once. */
export function alteredCopy(alterations: Alteration[]) {
  const path = mkdtempSync(join(tmpdir(), "daybook-test-"));
  const file = (name: string) => join(path, name);
  const remove = () => removeFolder(path);
  try {
    for (const name of [
      ...["app.ts", "client.ts", "processor.ts", "schema.sql", "README.md", "ARCHITECTURE.md"],
      ...["package.json", "tsconfig.json", "bunfig.toml", "bun.lock", "lib", "patches", "tests"],
    ])
      cpSync(join(root, name), file(name), { recursive: true });
    symlinkSync(join(root, "node_modules"), file("node_modules"));
    for (const { file: name, find, put } of alterations) {
      const text = readFileSync(file(name), "utf8");
      const count = text.split(find).length - 1;
      if (count !== 1) throw new Error(`${name} has ${count} times, wanted once: ${find}`);
      writeFileSync(
        file(name),
        text.replace(find, () => put),
      );
    }
    return { path, [Symbol.dispose]: remove };
  } catch (error) {
    remove();
    throw error;
  }
}

/** Removes a folder for temporary files, and what a test that died has left mounted there. */
export function removeTemporary(path: string): void {
  for (const name of existsSync(path) ? readdirSync(path) : [])
    Bun.spawnSync(["umount", "-l", join(path, name, "small")], { stderr: "ignore" });
  removeFolder(path);
}

/**
 * Removes a folder into which what was just killed may still write: `force` says nothing of what it then
 * leaves: 14 of 23 runs left one.
 */
export function removeFolder(path: string): void {
  for (let tries = 100; tries > 0 && existsSync(path); tries--) {
    rmSync(path, { recursive: true, force: true });
    if (existsSync(path)) Bun.sleepSync(50);
  }
}
