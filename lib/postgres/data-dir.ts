/**
 * The folder of the embedded Postgres, DATA_DIR/postgres (mode 0700, owned by the user that runs
 * Postgres):
 *
 *     cluster/      the data; exists only after initdb has succeeded (until then `making-…`)
 *     password      of the user `daybook`, random
 *     port          the last one used
 *     start.lock    held while a process joins or starts Postgres (lib/lock.ts)
 *     users         a FIFO that every user holds open for writing (watcher.ts)
 *     postgres.log  what Postgres logs; emptied when it grows too large
 *
 * Postgres refuses to run as root. Under root it runs as another user, which may not be able to pass
 * the directories above this folder. So a child changes to the cluster's folder while it is still
 * root, and calls it /proc/self/cwd from then on (measured: no capability needed).
 */
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { join } from "node:path";
import { nativeFolder, type RunAs, runAsSelf } from "./binaries.ts";

const MAX_INITDB_MS = 120_000;

export type DataDir = Awaited<ReturnType<typeof openDataDir>>;

/**
 * Creates the folder `path` (absolute) unless it exists. `native` is the folder that contains
 * `bin/postgres`. Throws an Error with the reason.
 */
export async function openDataDir(path: string) {
  if (process.platform === "win32") throw new Error("Windows is not supported");
  fs.mkdirSync(path, { recursive: true });
  const self = process.getuid?.();
  const { uid, gid } = fs.statSync(path);
  if (self !== 0 && uid !== self)
    throw new Error(`the folder belongs to uid ${uid}, but this process runs as uid ${self}`);
  fs.chmodSync(path, 0o700);
  // Under root, the owner of the folder also runs Postgres.
  const user = self !== 0 ? {} : uid === 0 ? ordinaryUser() : { uid, gid };
  const runAs: RunAs = { ...runAsSelf, ...user };
  chownTo(runAs, path);
  return { path, native: await nativeFolder(runAs), runAs };
}

/** initdb requires a user that has a line in /etc/passwd. */
function ordinaryUser(): { uid: number; gid: number } {
  const lines = fs.readFileSync("/etc/passwd", "utf8").split("\n");
  for (const name of ["postgres", "_postgres", "nobody"]) {
    const [, , uid, gid] = lines.find((line) => line.startsWith(`${name}:`))?.split(":") ?? [];
    if (Number(uid) > 0) return { uid: Number(uid), gid: Number(gid) };
  }
  throw new Error("Postgres refuses to run as root, and there is no user postgres or nobody");
}

/** Hands root's file to the user that runs Postgres, who may later run this program itself. */
export function chownTo({ uid, gid }: RunAs, path: string): void {
  if (uid !== undefined && gid !== undefined) fs.chownSync(path, uid, gid);
}

/** The path of `dir` for a child that works in it, valid whatever the child's user may enter. */
export function pathFromInside(dir: string): string {
  return process.platform === "linux" ? "/proc/self/cwd" : dir;
}

/**
 * Runs initdb unless it has succeeded before; an interrupted one leaves only a `making-…`. Requires
 * `start.lock`. Throws an Error with initdb's message.
 */
export async function createCluster(dataDir: DataDir, log: (line: string) => void) {
  const { path, runAs } = dataDir;
  for (const name of fs.readdirSync(path))
    if (name.startsWith("making-")) fs.rmSync(join(path, name), { recursive: true, force: true });
  const password = join(path, "password");
  if (fs.existsSync(join(path, "cluster", "PG_VERSION"))) {
    if (fs.existsSync(password)) return;
    throw new Error("its file `password` is missing; restore it");
  }
  log(`creating an embedded Postgres in ${path}`);
  fs.writeFileSync(password, `${randomBytes(24).toString("hex")}\n`, { mode: 0o600 });
  const making = fs.mkdtempSync(join(path, "making-"));
  for (const created of [password, making]) chownTo(runAs, created);
  await initdb(dataDir, making);
  fs.renameSync(making, join(path, "cluster"));
  const fd = fs.openSync(path, "r");
  fs.fsyncSync(fd);
  fs.closeSync(fd);
}

/** Leaves `dir` behind when it fails: the next createCluster removes it. */
async function initdb({ native, runAs }: DataDir, dir: string): Promise<void> {
  const here = pathFromInside(dir);
  const command = [join(native, "bin", "initdb"), "-D", here, `--pwfile=${here}/../password`];
  command.push(..."-U daybook -E UTF8 --locale=C --auth=scram-sha-256".split(" "));
  if (process.platform === "linux") command.push("--sync-method=syncfs"); // 1 call, not 1,000
  const options = { ...runAs, cwd: dir, stderr: "pipe", timeout: MAX_INITDB_MS } as const;
  const child = Bun.spawn(command, options);
  const output = await new Response(child.stderr).text();
  if ((await child.exited) !== 0)
    throw new Error(firstReason(output) || "initdb failed without a message");
}

/** The first line that gives a reason, without time and pid. The lines after it only follow. */
export function firstReason(output: string): string {
  const lines = output.trim().split("\n");
  const reason = lines.find((line) => /error:|FATAL|PANIC|could not/.test(line)) ?? lines.at(-1);
  return (reason ?? "").replace(/^\d{4}-.*?\] /, "");
}
