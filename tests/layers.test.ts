import { expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

const root = join(import.meta.dir, "..");

/** Who may import whom, as ARCHITECTURE.md has it: the last name of a path, and the packages. */
const MAY: Record<string, { ours: string[]; packages?: string[] }> = {
  amount: { ours: [], packages: [] },
  scan: { ours: ["amount"] },
  sums: { ours: ["amount", "scan"] },
  event: { ours: ["amount", "scan"] },
  "event-shape": { ours: ["event"], packages: ["@sinclair/typebox"] },
  "event-schema": { ours: ["config", "event"], packages: ["ajv/dist/2020.js"] },
  lines: { ours: ["event", "scan"] },
  lock: { ours: [], packages: ["bun:sqlite"] },
  "journal-frame": { ours: [] },
  "journal-disk": { ours: ["lock"] },
  "journal-segments": { ours: ["journal-disk", "journal-frame"] },
  "journal-reader": { ours: ["journal-disk", "journal-frame", "journal-segments"] },
  "journal-check": { ours: ["journal-disk", "journal-frame", "journal-segments"] },
  "journal-repair": { ours: ["journal-check", "journal-disk", "journal-frame"] },
  check: {
    ours: [
      "database",
      "event",
      "journal",
      "journal-check",
      "journal-disk",
      "journal-repair",
      "ledger",
      "lines",
      "lock",
    ],
  },
  journal: { ours: ["journal-disk", "journal-frame", "journal-segments", "lock"] },
  binaries: { ours: [] },
  home: { ours: ["binaries"] },
  watcher: { ours: ["binaries", "home"] },
  postmaster: { ours: ["home", "watcher"] },
  cluster: { ours: ["home", "lock", "postmaster", "watcher"] },
  database: { ours: [], packages: ["postgres"] },
  ledger: { ours: ["amount", "database", "sums"] },
  posted: { ours: ["database", "ledger"] },
  effort: { ours: [] },
  "source-mark": { ours: [] },
  fold: { ours: ["amount", "event", "ledger", "lines", "source-mark", "sums"] },
  source: { ours: ["database", "effort", "fold", "ledger", "lines"] },
  "journal-source": {
    ours: ["database", "effort", "fold", "journal-frame", "journal-reader", "ledger", "source"],
  },
  posting: {
    ours: [
      "database",
      "effort",
      "event",
      "journal",
      "journal-reader",
      "journal-source",
      "ledger",
      "source",
      "supervisor",
      "wake",
    ],
  },
  drift: { ours: ["database", "ledger", "sums"] },
  recount: {
    ours: [
      "database",
      "drift",
      "event",
      "journal-frame",
      "journal-reader",
      "ledger",
      "lines",
      "source",
      "source-mark",
      "sums",
    ],
  },
  retention: {
    ours: ["database", "journal-disk", "journal-reader", "journal-segments", "ledger", "recount"],
  },
  worker: {
    ours: ["cluster", "database", "event", "journal", "posting", "retention", "supervisor"],
  },
  tools: {
    ours: ["audit", "check", "cluster", "database", "event", "journal", "quarantine"],
  },
  audit: { ours: ["database", "drift", "event", "progress", "recount"] },
  quarantine: {
    ours: ["amount", "database", "drift", "event", "fold", "journal-reader", "ledger", "lines"],
  },
  sources: { ours: ["database", "event", "journal", "journal-reader", "ledger", "source-mark"] },
  "source-header": { ours: ["event", "problem", "sources"] },
  room: { ours: ["problem"] },
  pieces: { ours: ["event", "lines"] },
  remote: { ours: ["lines", "pieces"] },
  rejected: { ours: ["event", "lines", "pieces", "remote"] },
  wake: { ours: [] },
  config: { ours: [] },
  install: { ours: [] },
  supervisor: { ours: ["worker"] },
  progress: { ours: [], packages: ["cli-progress"] },
  problem: { ours: [], packages: ["elysia"] },
  token: { ours: [], packages: ["jose"] },
  throttle: { ours: [] },
  api: {
    ours: [
      ...["auth", "body", "database", "event", "event-schema", "journal", "lag", "ledger", "lines"],
      ...["log", "metrics", "posted", "problem", "room", "source-header", "sources"],
    ],
    packages: ["@elysiajs/openapi", "elysia"],
  },
  auth: { ours: ["problem", "throttle", "token"] },
  listener: { ours: ["config"] },
  lag: { ours: ["database", "journal", "journal-frame", "journal-reader", "ledger"] },
  metrics: { ours: ["event", "journal", "lag", "supervisor"], packages: ["prom-client"] },
  log: { ours: [], packages: ["pino"] },
  body: {
    ours: ["event", "event-schema", "event-shape", "lines", "problem", "room", "zstd"],
    packages: ["@sinclair/typebox"],
  },
  zstd: { ours: [] },
};
const FACES = ["app", "client", "processor"];

function importsOf(path: string): string[] {
  const text = readFileSync(path, "utf8");
  return [
    ...text.matchAll(/^(?:import|export)\s[^;]*?from "([^"]+)"|(?:import|new URL)\("([^"]+)"/gm),
  ].map((match) => (match[1] ?? match[2]) as string);
}

test.each(readdirSync(join(root, "lib")).filter((name) => name.endsWith(".ts")))(
  "lib/%s imports only what its layer may",
  (file) => {
    const may = MAY[basename(file, ".ts")];
    expect(may, `${file} has no row in the table of layers`).toBeDefined();
    for (const name of importsOf(join(root, "lib", file))) {
      if (name.startsWith("node:")) continue;
      if (name.startsWith(".")) expect(may?.ours).toContain(basename(name, ".ts"));
      else expect(may?.packages ?? []).toContain(name);
    }
  },
);

test.each(FACES)("%s.ts imports from lib and from no other face", (face) => {
  for (const name of importsOf(join(root, `${face}.ts`)))
    if (name.startsWith(".")) expect(name).toStartWith("./lib/");
});

test("the environment and the command line are read in lib/config.ts alone", () => {
  const readers = [
    ...FACES.map((face) => `${face}.ts`),
    ...readdirSync(join(root, "lib")).map((name) => `lib/${name}`),
  ].filter((file) =>
    /process\.(env|argv)|Bun\.(env|argv)/.test(readFileSync(join(root, file), "utf8")),
  );
  // install.ts runs before there is anything to import, and hands both on as they are.
  expect(readers.filter((file) => !["lib/config.ts", "lib/install.ts"].includes(file))).toEqual([]);
});
