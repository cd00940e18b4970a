/**
 * The program with some of its lines altered, in a folder of its own. A test can make it die at a chosen
 * point, and the suite can be tested by breaking what it should notice, while the program itself has no
 * hook for either.
 *
 * A place is given by a few tokens of code. White space, comments and trailing commas do not count, so
 * that a place is found again after its code was formatted, commented or moved to another file. The
 * tokens must occur once in the whole program.
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
  /** The tokens that are replaced. They occur once in the program. */
  find: string;
  put: string;
  /** Only where the tokens occur in several files: the file that is meant, or the beginning of its path. */
  file?: string | undefined;
}

/** What runs: the files in which a place is looked for. */
const PROGRAM = ["app.ts", "client.ts", "processor.ts", "schema.sql", "lib"];
/** What its tests need besides. */
const AROUND = [
  ...[
    "README.md",
    "ARCHITECTURE.md",
    "deploy",
    "package.json",
    "tsconfig.json",
    "bunfig.toml",
    "bun.lock",
  ],
  ...["patches", "tests"],
];

/** A copy of the program, removed when disposed. Throws where a place is not found exactly once. */
export function alteredCopy(alterations: readonly Alteration[]) {
  const path = mkdtempSync(join(tmpdir(), "daybook-test-"));
  const remove = () => removeFolder(path);
  try {
    for (const name of [...PROGRAM, ...AROUND])
      cpSync(join(root, name), join(path, name), { recursive: true });
    symlinkSync(join(root, "node_modules"), join(path, "node_modules"));
    for (const { put, ...place } of alterations) {
      const [found, ...others] = findPlaces(place, path);
      if (!found || others.length > 0)
        throw new Error(`found in ${found ? others.length + 1 : 0} places: ${place.find}`);
      const { file, from, to } = found;
      const text = readFileSync(join(path, file), "utf8");
      writeFileSync(join(path, file), text.slice(0, from) + put + text.slice(to));
    }
    return { path, [Symbol.dispose]: remove };
  } catch (error) {
    remove();
    throw error;
  }
}

/** Where the tokens occur in the program below `folder`: the file, and the range that is replaced. */
export function findPlaces({ find, file: beginning = "" }: Omit<Alteration, "put">, folder = root) {
  const pattern = patternOf(find);
  return programFiles(folder)
    .filter((file) => file.startsWith(beginning))
    .flatMap((file) =>
      [...readFileSync(join(folder, file), "utf8").matchAll(pattern)].map((match) => ({
        file,
        from: match.index,
        to: match.index + match[0].length,
      })),
    );
}

function programFiles(folder: string): string[] {
  return PROGRAM.flatMap((name) =>
    /\./.test(name)
      ? [name]
      : readdirSync(join(folder, name), { recursive: true, encoding: "utf8" })
          .filter((file) => /\.(ts|sql)$/.test(file))
          .map((file) => `${name}/${file}`),
  );
}

/** What may stand between two tokens: white space and comments. */
const GAP = String.raw`(?:\s|(?<=\s)(?://|--).*$|/\*[^]*?\*/)*`;

/** Matches the tokens of `code`, however they are laid out. */
export function patternOf(code: string): RegExp {
  const tokens = code.match(/[\w$]+|\S/g) ?? [];
  // The formatter adds a comma after the last of several lines and removes it from a single line.
  const isClosing = (token: string | undefined) => /^[)\]}]$/.test(token ?? ")");
  const parts = tokens
    .filter((token, index) => !(token === "," && isClosing(tokens[index + 1])))
    .map((token, index) => {
      if (/[\w$]/.test(token)) return `(?<![\\w$])${RegExp.escape(token)}(?![\\w$])`;
      return index > 0 && isClosing(token) ? `(?:,${GAP})?\\${token}` : RegExp.escape(token);
    });
  return new RegExp(parts.join(GAP) + (tokens.at(-1) === "," ? ",?" : ""), "gm");
}

/** Removes a folder for temporary files, and what a test that died has left mounted there. */
export function removeTemporary(path: string): void {
  for (const name of existsSync(path) ? readdirSync(path) : [])
    Bun.spawnSync(["umount", "-l", join(path, name, "small")], { stderr: "ignore" });
  removeFolder(path);
}

/**
 * Removes a folder into which a process that was just killed may still write. With `force`, `rmSync` does
 * not report what such a write leaves behind: 14 of 23 runs left a folder.
 */
export function removeFolder(path: string): void {
  for (let tries = 100; tries > 0 && existsSync(path); tries--) {
    rmSync(path, { recursive: true, force: true });
    if (existsSync(path)) Bun.sleepSync(50);
  }
}
