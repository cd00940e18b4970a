/**
 * The folder of the private Postgres, DATA_DIR/postgres (mode 700, owned by the user that Postgres
 * runs as), and what is made in it once:
 *
 *     cluster/      the data; there only once initdb is through (before that `making-…`)
 *     password      of the user `daybook`, made at random        port   the last one used
 *     start.lock    held while somebody looks, then joins or starts (lib/lock.ts)
 *     users         a FIFO that each user holds open for writing, as long as it lives
 *     postgres.log  what Postgres says of itself; emptied when it grows
 *
 * Postgres refuses to be root; under root it runs as another user, which needs to pass no
 * directory on the way here: the child changes to the cluster's folder while still root, and from
 * then on calls it /proc/self/cwd (measured: no capability needed).
 */
import { randomBytes } from "node:crypto";
import { chmodSync, chownSync, closeSync, existsSync, fsyncSync, mkdirSync } from "node:fs";
import { mkdtempSync, openSync, readdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { statSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { nativeFolder, postgresEnv, type RunAs } from "./binaries.ts";

const INITDB_MS = 120_000;

export interface DataDir {
  dir: string;
  cluster: string;
  users: string;
  log: string;
  /** Where `bin/postgres` is, and whom it runs as. */
  native: string;
  runAs: RunAs;
}

/** Makes the folder `dir` (a whole path) unless it is there. Throws a plain Error. */
export async function openDataDir(dir: string): Promise<DataDir> {
  if (process.platform === "win32") throw new Error("there is none for Windows");
  const runAs = makeFolder(dir);
  const native = await nativeFolder(runAs);
  const [cluster, users, log] = [`${dir}/cluster`, `${dir}/users`, `${dir}/postgres.log`];
  return { dir, cluster, users, log, native, runAs };
}

/** Answers whom the folder belongs to, and so whom Postgres runs as. */
function makeFolder(dir: string): RunAs {
  mkdirSync(dirname(dir), { recursive: true });
  mkdirSync(dir, { recursive: true, mode: 0o700 });
  const self = process.getuid?.();
  const { uid, gid } = statSync(dir);
  if (self !== 0 && uid !== self)
    throw new Error(`it belongs to uid ${uid}, and this is uid ${self}`);
  chmodSync(dir, 0o700);
  if (self !== 0) return {};
  const runAs = uid === 0 ? ordinaryUser() : { uid, gid };
  giveAway(dir, runAs);
  return runAs;
}

/** initdb wants a user that has a line in /etc/passwd. */
function ordinaryUser(): RunAs {
  const lines = readFileSync("/etc/passwd", "utf8").split("\n");
  for (const name of ["postgres", "_postgres", "nobody"]) {
    const [, , uid, gid] = lines.find((line) => line.startsWith(`${name}:`))?.split(":") ?? [];
    if (Number(uid) > 0) return { uid: Number(uid), gid: Number(gid) };
  }
  throw new Error("Postgres refuses to be root, and there is no user postgres or nobody");
}

/** What root has made belongs to whom Postgres runs as, so that that user can be the next to run. */
export function giveAway(path: string, runAs: RunAs): void {
  if ("uid" in runAs) chownSync(path, runAs.uid, runAs.gid);
}

/** The folder that a child is in, by a name that it can use whoever it is. */
export function fromWithin(dir: string): string {
  return process.platform === "linux" ? "/proc/self/cwd" : dir;
}

/**
 * Runs initdb unless it was through before; one that died half-way left only a `making-…`. To be
 * called by one process at a time. Throws an Error with what initdb says.
 */
export async function makeCluster(home: DataDir, say: (line: string) => void): Promise<void> {
  for (const name of readdirSync(home.dir))
    if (name.startsWith("making-")) rmSync(join(home.dir, name), { recursive: true, force: true });
  if (existsSync(join(home.cluster, "PG_VERSION"))) {
    if (existsSync(join(home.dir, "password"))) return;
    throw new Error("its file `password` is missing: restore it");
  }
  say(`making a private Postgres in ${home.dir}`);
  const password = join(home.dir, "password");
  writeFileSync(password, `${randomBytes(24).toString("hex")}\n`, { mode: 0o600 });
  giveAway(password, home.runAs);
  const making = mkdtempSync(join(home.dir, "making-"));
  giveAway(making, home.runAs);
  const here = fromWithin(making);
  const command = [join(home.native, "bin", "initdb"), "-D", here, `--pwfile=${here}/../password`];
  command.push(..."-U daybook -E UTF8 --locale=C --auth=scram-sha-256".split(" "));
  if (process.platform === "linux") command.push("--sync-method=syncfs"); // one call, not a thousand
  const initdb = Bun.spawn(command, {
    ...home.runAs,
    cwd: making,
    env: postgresEnv,
    stdio: ["ignore", "ignore", "pipe"],
    timeout: INITDB_MS,
  });
  const said = await new Response(initdb.stderr).text();
  if ((await initdb.exited) !== 0) {
    rmSync(making, { recursive: true, force: true });
    throw new Error(firstReason(said) || "initdb failed and did not say why");
  }
  renameSync(making, home.cluster);
  const fd = openSync(home.dir, "r");
  fsyncSync(fd);
  closeSync(fd);
}

/** The first line that tells why, without its time and pid; what follows it is only what followed. */
export function firstReason(said: string): string {
  const lines = said.trim().split("\n");
  const why = lines.find((line) => /error:|FATAL|PANIC|could not/.test(line)) ?? lines.at(-1) ?? "";
  return why.replace(/^\d{4}-.*?\] /, "");
}
