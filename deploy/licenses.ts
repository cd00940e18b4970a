/** The licences of what the one-file program contains, as text: each package, and Bun. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const root = join(import.meta.dir, "..");

interface Manifest {
  name: string;
  version: string;
  license?: string;
  dependencies?: Record<string, string>;
}

/** Throws if a package does not say its licence. */
export function licenses(): string {
  const found = new Map<string, string>();
  const { dependencies = {}, license } = read(root);
  for (const name of Object.keys(dependencies)) collect(name, root, found);
  const bun = readFileSync(join(root, "node_modules/bun-types/docs/project/license.mdx"), "utf8");
  return [
    section("Daybook", license ?? "", readFileSync(join(root, "LICENSE"), "utf8")),
    ...[...found].toSorted().map(([, text]) => text),
    section(`Bun ${Bun.version}`, "MIT, and that of the libraries it links", bun),
  ].join("\n");
}

/** Adds the package `name`, as seen from the folder `from`, and what it depends on. */
function collect(name: string, from: string, found: Map<string, string>): void {
  const nested = join(from, "node_modules", name);
  const folder = existsSync(nested) ? nested : join(root, "node_modules", name);
  const { version, license, dependencies = {} } = read(folder);
  const key = `${name} ${version}`;
  if (found.has(key)) return;
  if (!license) throw new Error(`${key} does not say its licence in ${folder}/package.json`);
  const file = readdirSync(folder).find((each) => /^licen[cs]e(\.|$)/i.test(each));
  found.set(key, section(key, license, file ? readFileSync(join(folder, file), "utf8") : ""));
  for (const next of Object.keys(dependencies)) collect(next, folder, found);
}

function read(folder: string): Manifest {
  return JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as Manifest;
}

function section(title: string, license: string, text: string): string {
  return `${"=".repeat(80)}\n${title}: ${license}\n\n${text.trim()}\n`;
}
