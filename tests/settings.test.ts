/**
 * Settings, the command line and failed starts: the exit code, one line for each problem, and never a
 * secret or a stack.
 */
import { afterAll, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { FILES_NOTE, SETTINGS } from "../lib/config.ts";
import packageJson from "../package.json";
import { event } from "./support/events.ts";
import { messages, run, spawn, startApp, tempDir, until } from "./support/programs.ts";

const SECRET = "quokka-in-a-secret";
const PROGRAMS = ["app.ts", "processor.ts", "client.ts"];
/** Nothing listens there: an app with this URL starts without Postgres. */
const NO_DATABASE = `postgres://daybook:${SECRET}@127.0.0.1:1/daybook`;

setDefaultTimeout(20_000);

const dir = tempDir();
const env = { DATA_DIR: dir.file("data"), DATABASE_URL: NO_DATABASE };
afterAll(() => dir[Symbol.dispose]());

const SHOWN: Record<string, string[]> = {
  "app.ts": ["PORT", "HOST", "AUTH_SECRET", "DATA_DIR", "DATABASE_URL"],
  "processor.ts": ["DATA_DIR", "DATABASE_URL"],
  "client.ts": ["SERVER_URL", "AUTH_SECRET"],
};
/** Documented defaults. */
const DEFAULTS: Record<string, Record<string, string>> = {
  "app.ts": {
    PORT: "8000",
    HOST: "127.0.0.1",
    AUTH_SECRET: "secret",
    DATA_DIR: "./data",
    DATABASE_URL: "unset",
  },
};
const EXIT_CODES: Record<string, number[]> = {
  "app.ts": [0, 2],
  "processor.ts": [0, 2],
  "client.ts": [0, 1, 2, 3],
};

for (const program of PROGRAMS) {
  test(`${program} --help prints usage, settings and exit codes, but no secret that is set`, async () => {
    const set = { ...env, AUTH_SECRET: SECRET };
    const { code, stdout, stderr } = await run(program, { args: ["--help"], env: set });
    expect(stdout).not.toContain(SECRET);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toContain(`bun run ${program}`);
    for (const name of SHOWN[program] ?? []) expect(stdout).toMatch(new RegExp(`\\b${name}\\b`));
    for (const [name, value] of Object.entries(DEFAULTS[program] ?? {}))
      expect(stdout).toMatch(new RegExp(`${name}.*default:? ${value.replaceAll(".", "\\.")}\\b`));
    for (const exit of EXIT_CODES[program] ?? [])
      expect(stdout).toMatch(new RegExp(`^ *${exit}\\b.*[a-z]`, "m"));
  });

  test(`${program} answers -h like --help, and --version with its version`, async () => {
    const [short, long, version] = await Promise.all(
      ["-h", "--help", "--version"].map((arg) => run(program, { args: [arg], env })),
    );
    expect(short).toEqual(long!);
    expect(version).toEqual({ code: 0, stdout: `daybook ${packageJson.version}\n`, stderr: "" });
  });

  test(`${program} exits with 2 for an unknown option`, async () => {
    const { code, stdout, stderr } = await run(program, { args: ["--nonsense"], env });
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expect(stderr).toContain("--nonsense");
    expectNoStack(stderr);
  });
}

test("--quarantine= with an empty value is rejected instead of following the journal", async () => {
  const { code, stderr } = await run("processor.ts", { args: ["--quarantine="], env });
  expect({ code, stderr }).toEqual({
    code: 2,
    stderr:
      "--quarantine= is unknown: use --quarantine, --quarantine=retry or --quarantine=dismiss\n",
  });
});

test("app.ts accepts no files, and client.ts at most one", async () => {
  for (const [program, args] of [
    ["app.ts", ["events.jsonl"]],
    ["client.ts", ["a.jsonl", "b.jsonl"]],
  ] as const) {
    const { code, stdout, stderr } = await run(program, { args: [...args], env });
    expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
    expectNoStack(stderr);
  }
});

test("a server on a non-loopback address refuses to start with the default secret", async () => {
  const set = { ...env, HOST: "0.0.0.0", AUTH_SECRET: "" };
  const { code, stdout, stderr } = await run("app.ts", { env: set });
  expect({ code, stdout }).toEqual({ code: 2, stdout: "" });
  expect(stderr).toMatch(/^AUTH_SECRET\b.*HOST.*\n$/);
});

for (const [program, settings] of [
  ["app.ts", { PORT: "x", HOST: "a b", AUTH_SECRET: `${SECRET} x`, DATABASE_URL: SECRET }],
  ["processor.ts", { DATABASE_URL: SECRET }],
  ["client.ts", { SERVER_URL: "x", AUTH_SECRET: `${SECRET} x` }],
] as const)
  test(`${program} exits with 2 and one line for each invalid setting, and creates nothing`, async () => {
    const set = { ...env, DATA_DIR: dir.file("never"), ...settings };
    const { code, stdout, stderr } = await run(program, { env: set });
    const lines = stderr.trimEnd().split("\n");
    const names = lines.map((line) => line.split(" ")[0] ?? "");
    expect({ code, stdout, names: names.sort() }).toEqual({
      code: 2,
      stdout: "",
      names: Object.keys(settings).sort(),
    });
    expect(stderr).not.toContain(SECRET);
    expectNoStack(stderr);
    expect(existsSync(dir.file("never"))).toBe(false);
  });

test("on HOST 0.0.0.0 each secret grants write access, and none appears on stdout, stderr or in an answer", async () => {
  using dir = tempDir();
  const secrets = [`${SECRET}-1`, `${SECRET}-2`];
  const own = { HOST: "0.0.0.0", AUTH_SECRET: secrets.join() };
  await using app = await startApp({ dataDir: dir.path, databaseUrl: NO_DATABASE, env: own });
  expect(app.url).toMatch(/^http:\/\/0\.0\.0\.0:\d+$/);
  const url = `http://127.0.0.1:${new URL(app.url).port}`;
  const answers: string[] = [];
  const post = async (authorization: string) => {
    const headers = { authorization, "content-type": "application/json" };
    const body = event("u");
    const response = await fetch(`${url}/liveEvent`, { method: "POST", headers, body });
    answers.push(await response.text());
    return response.status;
  };
  for (const secret of secrets) expect(await post(secret)).toBe(201);
  for (const secret of [secrets.join(), SECRET, "secret"]) expect(await post(secret)).toBe(401);
  for (const path of ["/userEvents/u", "/readyz?reads", "/openapi", "/openapi/json"])
    answers.push(
      await (await fetch(url + path, { headers: { authorization: secrets[0]! } })).text(),
    );
  app.kill("SIGTERM");
  expect(await app.exit()).toBe(0);
  expect(app.stdout.text() + app.stderr.text() + answers.join()).not.toContain(SECRET);
  expectNoStack(app.stderr.text());
});

test("a start on a port in use fails with one line that names the port", async () => {
  using dir = tempDir();
  const other = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const PORT = String(other.port);
  const found = await run("app.ts", { env: { ...env, DATA_DIR: dir.path, PORT } });
  other.stop(true);
  expectFailedStart(found, PORT);
});

test("a start on another machine's address fails with one line that names the address", async () => {
  using dir = tempDir();
  for (const HOST of ["192.0.2.1", "nowhere.invalid"]) {
    const own = { ...env, DATA_DIR: dir.path, HOST, AUTH_SECRET: SECRET };
    const reason = "this machine has no such address; set HOST";
    expectFailedStart(await run("app.ts", { env: own }), `cannot listen on ${HOST}:0: ${reason}`);
  }
});

test("a second server on the port or the DATA_DIR of the first fails to start and changes nothing; once the first is killed, the next one starts", async () => {
  using dir = tempDir();
  using other = tempDir();
  // An empty setting counts as unset.
  const empty = { HOST: "", AUTH_SECRET: "" };
  const options = { dataDir: dir.path, databaseUrl: NO_DATABASE, env: empty };
  await using app = await startApp(options);
  expect(app.url).toStartWith("http://127.0.0.1:");
  const journal = () => readFileSync(dir.file("eventsPost.jsonl"), "utf8");
  const post = () => app.post(event("u"));
  expect((await post()).status).toBe(201);
  const before = journal();
  const PORT = new URL(app.url).port;
  for (const [own, named] of [
    [{ DATA_DIR: other.path, PORT }, PORT],
    [{ DATA_DIR: dir.path }, `process ${app.pid} at ${app.url}`],
  ] as const)
    expectFailedStart(await run("app.ts", { env: { ...env, ...own } }), named);
  expect(journal()).toBe(before);
  expect((await post()).status).toBe(201);
  app.kill("SIGKILL");
  await app.exit();
  await using next = await startApp({ ...options, env: { PORT } });
  expect((await fetch(`${next.url}/healthz`)).status).toBe(200);
});

test("a file as DATA_DIR is an invalid setting, except for a token", async () => {
  using dir = tempDir();
  writeFileSync(dir.file("data"), "");
  const own = { ...env, DATA_DIR: dir.file("data") };
  for (const program of ["app.ts", "processor.ts"]) {
    const found = await run(program, { env: own });
    expectFailedStart(found, `DATA_DIR is "${own.DATA_DIR}"`, 2);
  }
  const args = ["--token", "--scope", "events:write", "--expires", "1h"];
  expect(
    await run("app.ts", { args, env: { ...own, JWT_SECRET: SECRET.repeat(3) } }),
  ).toMatchObject({
    code: 0,
    stderr: "",
  });
});

test("a start with a file that is not a journal fails with one line, and leaves the file unchanged", async () => {
  using dir = tempDir();
  writeFileSync(dir.file("eventsPost.jsonl"), `${SECRET}\n`);
  const found = await run("app.ts", { env: { ...env, DATA_DIR: dir.path } });
  expectFailedStart(found, dir.file("eventsPost.jsonl"));
  expect(readFileSync(dir.file("eventsPost.jsonl"), "utf8")).toBe(`${SECRET}\n`);
});

for (const signal of ["SIGTERM", "SIGINT"] as const)
  test(`${signal} ends app.ts --no-processor with 0`, async () => {
    using dir = tempDir();
    const options = { dataDir: dir.path, databaseUrl: NO_DATABASE, args: ["--no-processor"] };
    await using app = await startApp(options);
    app.kill(signal);
    expect(await app.exit()).toBe(0);
    expect(app.stdout.text()).toBe(`listening on ${app.url}\n`);
    expect(messages(app.stderr.text())).toEqual([
      `info: daybook ${packageJson.version} on Bun ${Bun.version}`,
      `info: listening on ${app.url}`,
      expect.stringContaining("bun run client.ts"),
      "info: settings",
      "info: stopping",
      "info: stopped",
    ]);
  });

test("SIGTERM ends processor.ts with 0, even while the database is unavailable", async () => {
  using dir = tempDir();
  await using processor = spawn("processor.ts", { env: { ...env, DATA_DIR: dir.path } });
  await until(() => processor.stderr.text() !== "");
  processor.kill("SIGTERM");
  expect(await processor.exit()).toBe(0);
  expect(processor.stdout.text() + processor.stderr.text()).not.toContain(SECRET);
  expectNoStack(processor.stderr.text());
});

test("secrets are read from files, without their last newline", async () => {
  using dir = tempDir();
  const files = { AUTH_SECRET: `${SECRET}\n`, READ_SECRET: "reader", DATABASE_URL: NO_DATABASE };
  const own: Record<string, string> = { AUTH_SECRET: "" };
  for (const [name, text] of Object.entries(files)) {
    writeFileSync(dir.file(name), text);
    own[`${name}_FILE`] = dir.file(name);
  }
  // An empty setting counts as unset.
  await using app = await startApp({ dataDir: dir.file("data"), databaseUrl: "", env: own });
  const post = (authorization: string) => {
    const headers = { authorization, "content-type": "application/json" };
    return fetch(`${app.url}/liveEvent`, { method: "POST", headers, body: event("u") });
  };
  expect((await post(SECRET)).status).toBe(201);
  expect((await post("secret")).status).toBe(401);
  expect((await post("reader")).status).toBe(403);
  const reading = { headers: { authorization: "reader" } };
  expect((await fetch(`${app.url}/userEvents/u`, reading)).status).toBe(503); // NO_DATABASE
  expect(app.stderr.text()).not.toContain(SECRET);
});

test("a secret may come from a command, which takes its time", async () => {
  using dir = tempDir();
  const child = Bun.spawn(
    ["bash", "-c", 'env JWT_SECRET_FILE=<(sleep 0.3; echo short) "$@"', "bash"].concat(
      process.execPath,
      "run",
      join(import.meta.dir, "..", "app.ts"),
    ),
    {
      env: { ...process.env, PORT: "0", DATABASE_URL: NO_DATABASE, DATA_DIR: dir.file("data") },
      stderr: "pipe",
      stdout: "ignore",
    },
  );
  const stderr = await new Response(child.stderr).text();
  expect([await child.exited, stderr]).toEqual([
    2,
    expect.stringContaining("is invalid: use 32 or more characters"),
  ]);
});

test("a file of a secret that cannot be used, or a value beside it, is an invalid setting", async () => {
  using dir = tempDir();
  const write = (name: string, text: string) => {
    writeFileSync(dir.file(name), text);
    return dir.file(name);
  };
  mkdirSync(dir.file("folder"));
  const good = write("good", SECRET);
  Bun.spawnSync(["mkfifo", dir.file("pipe")]);
  for (const [program, name, path, found, value = ""] of [
    ["app.ts", "AUTH_SECRET", good, "both", SECRET],
    ["app.ts", "READ_SECRET", dir.file("none"), "ENOENT"],
    ["app.ts", "JWT_SECRET", write("empty", "\n"), "empty"],
    ["app.ts", "AUTH_SECRET", dir.file("folder"), "EISDIR"],
    ["app.ts", "AUTH_SECRET", "/dev/zero", "longer than"],
    ["app.ts", "AUTH_SECRET", dir.file("pipe"), "empty"], // nobody writes to it
    ["app.ts", "AUTH_SECRET", write("words", `${SECRET} two\n`), dir.file("words")],
    ["processor.ts", "DATABASE_URL", good, good],
    ["client.ts", "AUTH_TOKEN", write("blank", `${SECRET} x`), dir.file("blank")],
  ] as const) {
    const own = { ...env, DATABASE_URL: "", [name]: value, [`${name}_FILE`]: path };
    const { code, stdout, stderr } = await run(program, { env: own });
    expect({ code, stdout, lines: stderr.trim().split("\n").length }).toEqual({
      code: 2,
      stdout: "",
      lines: 1,
    });
    expect(stderr).toContain(`${name}_FILE`);
    expect(stderr).toContain(found);
    expect(stderr).not.toContain(SECRET);
  }
});

test("README's table of settings has the same words as --help", () => {
  const readme = readFileSync(join(import.meta.dir, "..", "README.md"), "utf8");
  const rows = readme.split("\n").filter((row) => /^\| `[A-Z_]+` \|/.test(row));
  const expected = Object.entries(SETTINGS).map(([name, setting]) => {
    const shown = "default" in setting ? `\`${setting.default}\`` : "unset";
    return `| \`${name}\` | ${shown} | ${setting.meaning} |`;
  });
  expect(rows).toEqual(expected);
  expect(readme).toContain(`\n${FILES_NOTE}\n`);
});

function expectFailedStart(
  found: Awaited<ReturnType<typeof run>>,
  name: string,
  exitCode = 1,
): void {
  const { code, stdout, stderr } = found;
  expect({ code, stdout }).toEqual({ code: exitCode, stdout: "" });
  expect(stderr).toContain(name);
  expect(stderr).toMatch(/^[^\n]+\n$/);
  expect(stderr).not.toContain(SECRET);
  expectNoStack(stderr);
}

function expectNoStack(stderr: string): void {
  expect(stderr).not.toMatch(/^\s+at |^\s*\d+ \| |^Bun v|\.ts:\d/m);
}
