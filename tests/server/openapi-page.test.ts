/** The page at /openapi: complete, from this server alone, and its examples work. */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";

import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { isInstalled, SECRET } from "../support/programs.ts";

setDefaultTimeout(60_000);

let ledger: Awaited<ReturnType<typeof openLedger>>;
let app: Awaited<ReturnType<typeof ledger.start>>;
let response: Response;
let page: string;

beforeAll(async () => {
  ledger = await openLedger();
  app = await ledger.start();
  response = await fetch(`${app.url}/openapi`);
  page = await response.text();
});
afterAll(async () => {
  await app[Symbol.asyncDispose]();
  await ledger[Symbol.asyncDispose]();
});

test("the page names every operation of the document, loads nothing, and runs nothing", async () => {
  expect(response.headers.get("content-type")).toBe("text/html; charset=utf-8");
  const policy = response.headers.get("content-security-policy") ?? "";
  expect(policy).toStartWith("default-src 'none'; style-src 'sha256-");
  expect(policy).not.toContain("unsafe");
  const style = /<style>([\s\S]*)<\/style>/.exec(page)?.[1] ?? "";
  expect(policy).toContain(new Bun.CryptoHasher("sha256").update(style).digest("base64"));
  expect(page).not.toMatch(/<script|<link|src=|url\(|@import/);
  const document = await (await fetch(`${app.url}/openapi/json`)).json();
  const { paths } = document as { paths: Record<string, Record<string, unknown>> };
  for (const [path, methods] of Object.entries(paths))
    for (const method of Object.keys(methods))
      expect(page).toContain(`<code>${method.toUpperCase()} ${path}</code></h2>`);
});

test.if(isInstalled("curl"))("every example for curl is accepted by the server", async () => {
  ledger.write("events.jsonl", line("user1", 5));
  expect((await app.postLines(line("user1", 1))).status).toBe(201);
  const { position } = (await (await app.postLines(line("user1", 1))).json()) as {
    position: string;
  };
  expect((await fetch(`${app.url}/userEvents/user1?after=${position}`)).status).toBe(200);
  const commands = [...page.matchAll(/<pre>([\s\S]*?)<\/pre>/g)].map(([, html = ""]) =>
    html.replace(/&(quot|#x27|lt|gt|amp);/g, (_, name: string) => ENTITIES[name] ?? ""),
  );
  expect(commands.length).toBeGreaterThanOrEqual(8);
  // HEAD asks about the source that PATCH stores.
  const isHead = (command: string) => Number(command.startsWith("curl -I"));
  // /live does not end by itself.
  const ending = commands.filter((command) => !command.includes("/live'"));
  expect(ending).toHaveLength(commands.length - 1);
  for (const command of ending.toSorted((a, b) => isHead(a) - isHead(b))) {
    const shell = `${command.replace("SECRET", SECRET)} -s -o /dev/null -w '%{http_code}'`;
    const child = Bun.spawn(["sh", "-c", shell], { cwd: ledger.file(".") });
    expect([command, await new Response(child.stdout).text()]).toEqual([
      command,
      expect.stringMatching(/^20[0-4]$/),
    ]);
  }
});

const ENTITIES: Record<string, string> = { quot: '"', "#x27": "'", lt: "<", gt: ">", amp: "&" };
