/** The programs where paths, users and environments are unusual: a copy of them, run by another user where root can. */
import { afterAll, expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, chownSync, copyFileSync, cpSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { line } from "./support/events.ts";
import { testDatabase } from "./support/postgres.ts";
import { root, tempDir, until } from "./support/programs.ts";

setDefaultTimeout(60_000);

/** Has no line in /etc/passwd. */
const STRANGER = { uid: 42_421, gid: 42_421 };
const isRoot = process.getuid?.() === 0;
const user = isRoot ? STRANGER : {};
const shownUser = isRoot ? "uid 42421" : `uid ${process.getuid?.()}`;

const folder = tempDir();
chmodSync(folder.path, 0o755);
const home = folder.file(`it's "my" $HOME and \`more\` ü`);
mkdirSync(home);
if (isRoot) chownSync(home, STRANGER.uid, STRANGER.gid);
const PROGRAM = ["app.ts", "client.ts", "processor.ts", "lib", "package.json", "schema.sql"];
for (const name of [...PROGRAM, "node_modules"])
  cpSync(join(root, name), join(home, name), { recursive: true });
/** For a copy of Postgres' programs: initdb cannot be in a folder with such a name. */
const TMPDIR = folder.file("tmp");
mkdirSync(TMPDIR);
chmodSync(TMPDIR, 0o1777);
const bun = join(home, "bun");
copyFileSync(process.execPath, bun); // the one in use may be in a folder of root's
afterAll(() => folder[Symbol.dispose]());

/** Runs a program in that folder, with next to no environment but `env`. */
function start(program: string, args: string[], env: Record<string, string> = {}, runAs = user) {
  const stdio = ["ignore", "pipe", "pipe"] as const;
  const child = Bun.spawn([bun, "run", program, ...args], {
    ...runAs,
    cwd: home,
    env: { TMPDIR, ...env },
    stdio: [...stdio],
  });
  const texts = { stdout: "", stderr: "" };
  const reading = (["stdout", "stderr"] as const).map(async (name) => {
    const decoder = new TextDecoder();
    for await (const bytes of child[name]) texts[name] += decoder.decode(bytes, { stream: true });
  });
  const end = async () => {
    await Promise.all([child.exited, ...reading]);
    return { code: child.exitCode, ...texts };
  };
  const stop = () => {
    child.kill("SIGTERM");
    return end();
  };
  return { texts, end, stop, [Symbol.asyncDispose]: async () => void (await stop()) };
}

test("all programs work in a folder with quotes and a $ in its name, for a user without a name, with an empty environment and a dumb terminal", async () => {
  await using database = await testDatabase();
  const settings = [`DATABASE_URL=${database.url}`, "PORT=0", "TERM=dumb", "DATA_DIR=./da ta"];
  writeFileSync(join(home, ".env"), `${settings.join("\n")}\n`, { mode: 0o644 });
  await using app = start("app.ts", []);
  const url = await until(
    () =>
      /^listening on (\S+)$/m.exec(app.texts.stdout)?.[1] ??
      (app.texts.stderr.includes("cannot") && "x"),
  );
  writeFileSync(join(home, "events.jsonl"), line("ann", 1) + line("ann", 2));
  const sent = await start("client.ts", ["--wait"], { SERVER_URL: url }).end();
  expect(sent).toMatchObject({
    code: 0,
    stderr: "waiting until all of it is posted to the ledger\n",
  });
  expect(sent.stdout).toStartWith("sent 2 events (0 rejected) from events.jsonl: ");
  expect(await (await fetch(`${url}/userEvents/ann`)).json()).toEqual({
    user_id: "ann",
    revenue: "3",
  });
  expect((await fetch(url)).status).toBe(200); // the page is bundled
  for (const args of [["--verify"], ["--check"], ["--quarantine"], ["--history", "ann"]])
    expect(await start("processor.ts", args).end(), args[0]).toMatchObject({ code: 0, stderr: "" });
  expect(await app.stop()).toMatchObject({ code: 0 });
});

test("the embedded Postgres runs where its programs have a path that initdb cannot quote", async () => {
  writeFileSync(join(home, ".env"), "PORT=0\n", { mode: 0o644 });
  const DATA_DIR = folder.file(`"$USER's"`);
  await using app = start("app.ts", [], { DATA_DIR }, {});
  await until(
    () => app.texts.stdout.startsWith("listening on ") || app.texts.stderr.includes("cannot"),
  );
  expect(await app.stop()).toMatchObject({ code: 0 });
});

test.if(isRoot)("a user without a name is told in one line that initdb requires one", async () => {
  await using app = start("app.ts", [], { DATA_DIR: "./embedded" });
  const { code, stderr } = await app.end();
  expect(code).toBe(1);
  expect(stderr.trim().split("\n").at(-1)).toMatch(
    /^cannot run the embedded Postgres in .*42421.*set DATABASE_URL to another Postgres$/,
  );
});

test("an error of the disk names the operation, the folder and the user", async () => {
  writeFileSync(join(home, ".env"), "PORT=0\n", { mode: 0o644 });
  const closed = folder.file("closed");
  mkdirSync(closed);
  writeFileSync(join(closed, "events.jsonl"), line("ann"), { mode: isRoot ? 0o600 : 0o000 });
  writeFileSync(folder.file("file"), "");
  chmodSync(closed, 0o555);
  const denied = `permission denied for ${shownUser}`;
  const ran = async (program: string, DATA_DIR: string, ...args: string[]) => {
    const { code, stderr } = await start(program, args, {
      DATA_DIR,
      DATABASE_URL: "postgres://127.0.0.1:1/x",
    }).end();
    return `${code} ${stderr.trim()}`;
  };
  const data = join(closed, "data");
  const invalid = (path: string) =>
    `2 DATA_DIR is "${path}": use a folder that this user can write to; `;
  expect(await ran("app.ts", data)).toBe(`${invalid(data)}${closed}: ${denied}`);
  expect(await ran("processor.ts", data)).toBe(`${invalid(data)}${closed}: ${denied}`);
  expect(await ran("app.ts", closed)).toBe(`${invalid(closed)}${closed}: ${denied}`);
  const inFile = folder.file("file/data");
  expect(await ran("app.ts", inFile)).toBe(
    `${invalid(inFile)}${folder.file("file")}: not a folder`,
  );
  const events = join(closed, "events.jsonl");
  for (const [program, code] of [
    ["client.ts", 2],
    ["processor.ts", 3],
  ] as const)
    expect(await ran(program, folder.path, events)).toContain(`${code} `);
  expect(await ran("client.ts", folder.path, events)).toContain(
    isRoot ? `${events}: ${denied}` : events,
  );
});
