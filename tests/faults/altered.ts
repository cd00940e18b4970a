/**
 * The program with some of its lines altered, in a folder of its own. So a test can make it die at a
 * chosen point, and the suite can be tested by breaking what it should notice, while the program
 * itself has no hook for either.
 */
import { cpSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { root, tempDir } from "../support.ts";

export interface Alteration {
  file: string;
  /** Stands in the file exactly once. */
  find: string;
  put: string;
}

/** Vanishes when disposed. Throws when a text is not there, or more than once. */
export function alteredCopy(alterations: Alteration[]) {
  const folder = tempDir();
  try {
    for (const name of [
      ...["app.ts", "client.ts", "processor.ts", "schema.sql", "README.md", "ARCHITECTURE.md"],
      ...["package.json", "tsconfig.json", "bunfig.toml", "bun.lock", "lib", "patches", "tests"],
    ])
      cpSync(join(root, name), folder.file(name), { recursive: true });
    symlinkSync(join(root, "node_modules"), folder.file("node_modules"));
    for (const { file, find, put } of alterations) {
      const text = readFileSync(folder.file(file), "utf8");
      const count = text.split(find).length - 1;
      if (count !== 1) throw new Error(`${file} has ${count} times, wanted once: ${find}`);
      writeFileSync(
        folder.file(file),
        text.replace(find, () => put),
      );
    }
    return folder;
  } catch (error) {
    folder[Symbol.dispose]();
    throw error;
  }
}
