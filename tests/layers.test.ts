/** Who may import whom, by folder, and which file owns which dependency. A new file needs no new row. */
import { expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";

const lib = join(import.meta.dir, "..", "lib");

/** What the files of a folder may import besides each other and the files at the top of lib/. */
const MAY_IMPORT: Record<string, string[]> = {
  server: ["event", "journal", "ledger"],
  client: ["event"],
  processor: ["event", "journal", "ledger", "postgres"],
  event: [],
  journal: [],
  ledger: ["event"],
  postgres: [],
  "": [],
};

/** The files that may use a dependency. All others reach it through them. */
const OWNERS: Record<string, string[]> = {
  "@elysiajs/openapi": ["server/api.ts"],
  "@nats-io/transport-node": ["journal/stream.ts"],
  "@sinclair/typebox": ["server/openapi.ts"],
  ajv: ["server/validator.ts"],
  "bun:sqlite": ["lock.ts"],
  elysia: ["server/api.ts", "server/listener.ts", "server/problem.ts"],
  jose: ["server/token.ts"],
  pino: ["log.ts"],
  postgres: ["ledger/database.ts"],
  "prom-client": ["metrics.ts"],
  uplot: ["server/page/plots.ts"],
  // install.ts runs before anything can be imported, and passes both on as they are; TERM is no setting.
  "the environment and the command line": ["config.ts", "install.ts", "progress.ts"],
};

const FILES = readdirSync(lib, { recursive: true, encoding: "utf8" })
  .filter((path) => path.endsWith(".ts"))
  .toSorted();

test.each(Object.keys(MAY_IMPORT))("lib/%s imports only folders that it may import", (folder) => {
  const may = ["", folder, ...(MAY_IMPORT[folder] as string[])];
  const wrong = FILES.filter((file) => folderOf(file) === folder)
    .flatMap((file) => importsOf(file).ours.map((path) => ({ file, path })))
    .filter(({ path }) => !["../package.json", "../schema.sql"].includes(path)) // version, engines; the tables
    .filter(({ path }) => path.startsWith("../") || !may.includes(folderOf(path)));
  expect(wrong).toEqual([]);
});

test("every folder of lib has a row in the matrix", () => {
  expect([...new Set(FILES.map(folderOf))].toSorted()).toEqual(Object.keys(MAY_IMPORT).toSorted());
});

test("every dependency is used by its owners alone", () => {
  const users: Record<string, string[]> = {};
  for (const file of FILES)
    for (const name of new Set(importsOf(file).others)) (users[name] ??= []).push(file);
  expect(users).toEqual(OWNERS);
});

test.each(["app.ts", "client.ts", "processor.ts"])(
  "%s imports nothing but files of lib",
  (program) => {
    const { ours, others } = importsOf(`../${program}`);
    expect([...ours.filter((path) => path.startsWith("../")), ...others]).toEqual([]);
  },
);

/** The folder of a path in lib/; empty at its top. */
function folderOf(path: string): string {
  return path.includes("/") ? (path.split("/")[0] as string) : "";
}

/** What a file uses: files by their paths in lib/, and whatever else has an owner. Workers count as imports. */
function importsOf(file: string): { ours: string[]; others: string[] } {
  const text = readFileSync(join(lib, file), "utf8");
  const names = [
    ...text.matchAll(/^(?:import|(?:import|export)\s[^;="()]*?\sfrom)\s+"([^"]+)"/gm),
    ...text.matchAll(/\b(?:import|new URL)\(\s*"([^"]+)"/g),
  ].map((match) => match[1] as string);
  const packages = names.filter((name) => !/^(\.|node:)/.test(name));
  return {
    ours: names
      .filter((name) => name.startsWith("."))
      .map((name) => relative(lib, join(lib, dirname(file), name))),
    others: [
      ...packages.map((name) => /^(@[^/]+\/)?[^/]+/.exec(name)?.[0] as string),
      ...(/\b(process|Bun|import\.meta)\.(env|argv)\b/.test(text)
        ? ["the environment and the command line"]
        : []),
    ],
  };
}
