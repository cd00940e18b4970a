/**
 * Builds the one-file program: `bun run build [--outdir DIR] [PLATFORM…]` writes `dist/daybook-PLATFORM` for each
 * platform (default: all), and what is released beside it. Exits with 1, and names the platforms, if some could not be
 * built: Bun downloads the runtime of other platforms.
 */
import { copyFileSync, mkdirSync, writeFileSync } from "node:fs";
import { join, relative, resolve } from "node:path";
import { parseArgs } from "node:util";

import { bundlePage } from "../lib/server/page-files.ts";
import { licenses } from "./licenses.ts";

const root = join(import.meta.dir, "..");
const PLATFORMS = ["linux-x64", "linux-arm64", "darwin-x64", "darwin-arm64"] as const;
const { values, positionals: given } = readArguments();
const dist = resolve(values.outdir);
type Platform = (typeof PLATFORMS)[number];

/** A Worker starts with a file of its own. If it is not on this list, the program ends silently with code 0. */
const ENTRIES = ["deploy/daybook.ts", "lib/processor/worker.ts"];

const COMMANDS = { app: "serve", client: "send", processor: "process" };

/** In the one-file program, messages name its commands: `bun run app.ts` is `daybook serve`. */
function nameCommands(text: string): string {
  return text.replace(
    /(?<![/\w])(?:bun run )?(app|client|processor)\.ts\b/g,
    (_, name: keyof typeof COMMANDS) => `daybook ${COMMANDS[name]}`,
  );
}

const page = nameCommands(JSON.stringify(await bundlePage()));

const sources: Bun.BunPlugin = {
  name: "sources",
  setup(build) {
    build.onLoad({ filter: /\.ts$/ }, async ({ path }) => {
      const name = relative(root, path);
      if (name.startsWith("node_modules")) return undefined;
      if (name === "lib/server/page-files.ts")
        return { loader: "ts", contents: `export const bundlePage = async () => (${page});` };
      const text = await Bun.file(path).text();
      return { loader: "ts", contents: name.startsWith("deploy/") ? text : nameCommands(text) };
    });
  },
};

function readArguments() {
  const options = { outdir: { type: "string", default: join(root, "dist") } } as const;
  try {
    return parseArgs({ options, allowPositionals: true });
  } catch {
    console.error(`usage: bun run build [--outdir DIR] [PLATFORM…], of ${PLATFORMS.join(", ")}`);
    return process.exit(2);
  }
}

/** Builds `dist/daybook-PLATFORM`. Throws if that fails. */
async function build(platform: Platform): Promise<void> {
  await Bun.build({
    entrypoints: ENTRIES.map((entry) => join(root, entry)),
    root: join(root, "lib/processor"), // so that `./worker.ts` of the supervisor is beside the program
    target: "bun",
    minify: { whitespace: true, syntax: true }, // names stay: messages have them
    bytecode: true,
    format: "esm",
    sourcemap: "none",
    plugins: [sources],
    compile: {
      target: `bun-${platform}`,
      outfile: join(dist, `daybook-${platform}`),
      autoloadBunfig: false,
    },
  });
}

const unknown = given.filter((name) => !PLATFORMS.includes(name as Platform));
if (unknown.length > 0) {
  console.error(`unknown platform: ${unknown.join(", ")}; known: ${PLATFORMS.join(", ")}`);
  process.exit(2);
}
mkdirSync(dist, { recursive: true });
const sums: string[] = [];
for (const platform of given.length > 0 ? (given as Platform[]) : PLATFORMS) {
  const name = `daybook-${platform}`;
  try {
    await build(platform);
  } catch (error) {
    console.error(`cannot build ${name}:`, error);
    process.exitCode = 1;
    continue;
  }
  const bytes = await Bun.file(join(dist, name)).bytes();
  sums.push(`${new Bun.CryptoHasher("sha256").update(bytes).digest("hex")}  ${name}`);
  console.log(`${join(dist, name)}  ${(bytes.length / 1e6).toFixed(1)} MB`);
}
copyFileSync(join(root, "schema.sql"), join(dist, "schema.sql"));
writeFileSync(join(dist, "LICENSES.txt"), licenses());
writeFileSync(join(dist, "SHA256SUMS"), `${sums.join("\n")}\n`);
