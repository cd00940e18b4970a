/** The files in deploy/ name only what exists. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { SETTINGS } from "../lib/config.ts";
import { isInstalled, root, startApp, tempDir } from "./support/programs.ts";
import { testDatabase } from "./support/postgres.ts";

setDefaultTimeout(60_000);

const read = (name: string) => readFileSync(join(root, "deploy", name), "utf8");

interface Compose {
  services: Record<string, { environment?: Record<string, string>; secrets?: string[] }>;
  secrets: Record<string, { file: string }>;
}

test.each(["compose.yaml", "compose-cluster.yaml"])(
  "%s sets only settings of Daybook, and its secrets exist",
  (name) => {
    const { services, secrets } = Bun.YAML.parse(read(name)) as Compose;
    const { environment = {}, secrets: used = [] } = services["daybook"]!;
    for (const [setting, value] of Object.entries(environment)) {
      expect(Object.keys(SETTINGS)).toContain(setting.replace(/_FILE$/, ""));
      const [, secret] = /^\/run\/secrets\/(.*)$/.exec(value) ?? [];
      if (secret) expect(used).toContain(secret);
    }
    for (const secret of used) expect(Object.keys(secrets)).toContain(secret);
  },
);

test("the Dockerfile and the unit set only settings of Daybook", () => {
  const lines = [...read("Dockerfile").matchAll(/^ENV (.*)$/gm)].concat([
    ...read("daybook.service").matchAll(/^Environment=(.*)$/gm),
  ]);
  const names = lines.flatMap(([, line = ""]) =>
    line.split(" ").map((each) => each.split("=")[0]!),
  );
  expect(names.length).toBeGreaterThan(2);
  for (const name of names) expect(Object.keys(SETTINGS)).toContain(name);
});

test("panels and alerts ask for metrics that the server has", async () => {
  using folder = tempDir();
  await using database = await testDatabase();
  await using app = await startApp({ dataDir: folder.path, databaseUrl: database.url });
  const metrics = await (await fetch(`${app.url}/metrics`)).text();
  const types = [...metrics.matchAll(/^# TYPE (\S+)/gm)].map(([, name]) => name);
  const asked = [read("grafana.json"), read("alerts.yml")].join("\n").match(/daybook_\w+/g)!;
  expect(asked.length).toBeGreaterThan(20);
  for (const name of asked) expect(types).toContain(name.replace(/_bucket$/, ""));
});

test.if(isInstalled("nginx"))("nginx reads its example", () => {
  using folder = tempDir();
  const path = folder.file("nginx.conf");
  writeFileSync(
    path,
    `pid ${folder.file("pid")}; error_log stderr; events {} http { access_log off;
     client_body_temp_path ${folder.file("bodies")}; include ${join(root, "deploy/nginx.conf")}; }`,
  );
  const { exitCode, stderr } = Bun.spawnSync(["nginx", "-t", "-c", path, "-p", folder.path]);
  expect(`${exitCode} ${stderr}`).toStartWith("0 ");
});
