/**
 * The folder of the embedded Postgres, DATA_DIR/postgres (mode 0700, owned by the user that runs this
 * program):
 *
 *     cluster/      the data and the socket; exists only after initdb has succeeded (until then `making-…`)
 *     password      of the role that the programs use, random
 *     role          its name; exists once the cluster is prepared for it
 *     start.lock    held while a process joins or starts Postgres (lib/lock.ts)
 *     users         a FIFO that every user holds open for writing (watcher.ts)
 *     postgres.log  what Postgres logs; emptied when it grows too large
 *
 * Postgres refuses to run as root. Under root it runs as another user, to whom `cluster` belongs and
 * nothing else. Controlling that user must not lead to root: so root writes, removes and signals
 * nothing in `cluster` but as that user, and keeps everything else in folders of its own. A child
 * changes to `cluster` while it is still root, and calls it /proc/self/cwd from then on (measured: no
 * capability needed).
 */
import { randomBytes } from "node:crypto";
import * as fs from "node:fs";
import { dirname, join } from "node:path";
import { nativeFolder, type RunAs, runAsSelf } from "./binaries.ts";

const { O_DIRECTORY, O_NOFOLLOW } = fs.constants;
const MAX_INITDB_MS = 120_000;
/** The programs' role. 0.1.0 used `daybook`, a superuser that can be neither demoted nor renamed. */
export const ROLE = "daybook_ledger";

export type DataDir = Awaited<ReturnType<typeof openDataDir>>;

/** What differs from the usual: `programs` is DAYBOOK_POSTGRES, `settings` are added to those of postmaster.ts. */
export interface ClusterOptions {
  programs?: string | undefined;
  settings?: readonly string[];
}

/**
 * Creates the folder `path` (absolute) unless it exists. `native` is the folder that contains
 * `bin/postgres`. Throws an Error with the reason.
 */
export async function openDataDir(path: string, { programs, settings = [] }: ClusterOptions = {}) {
  if (process.platform === "win32") throw new Error("Windows is not supported");
  fs.mkdirSync(path, { recursive: true, mode: 0o700 });
  const self = process.getuid?.();
  if (self === 0) own(path);
  const { uid } = fs.statSync(path);
  if (uid !== self)
    throw new Error(`the folder belongs to uid ${uid}, but this process runs as uid ${self}`);
  if (self !== 0) fs.chmodSync(path, 0o700);
  const runAs: RunAs = { ...runAsSelf, ...(self === 0 ? serverUser(path) : {}) };
  const native = await nativeFolder(runAs, programs);
  requireMajor(path, native);
  return { path, native, runAs, settings };
}

/** The cluster was made by another major version of Postgres, whose files this one cannot read. */
export class OtherMajor extends Error {}

/** Throws OtherMajor. The first line of postgres.bki names the version of the programs: initdb asks it too. */
function requireMajor(path: string, native: string): void {
  const cluster = majorIn(join(path, "cluster", "PG_VERSION"), /^(\d+)/);
  const own = majorIn(join(native, "share", "postgresql", "postgres.bki"), /^# PostgreSQL (\d+)\n/);
  if (cluster === null || own === null || cluster === own) return;
  throw new OtherMajor(
    `it was made by Postgres ${cluster}, and this version of Daybook has Postgres ${own}. With the version that ` +
      "made it, run processor.ts --backup DIR; then move DATA_DIR away, and run processor.ts --restore DIR with this one",
  );
}

/** What `pattern` finds at the begin of a file; `null` where there is none. The file may be another user's. */
function majorIn(path: string, pattern: RegExp): string | null {
  let fd: number;
  try {
    fd = fs.openSync(path, fs.constants.O_RDONLY | O_NOFOLLOW | fs.constants.O_NONBLOCK);
  } catch (error) {
    if ((error as { code: string }).code === "ENOENT") return null;
    throw error;
  }
  try {
    const bytes = Buffer.alloc(64);
    const length = fs.fstatSync(fd).isFile() ? fs.readSync(fd, bytes) : 0;
    return pattern.exec(bytes.toString("latin1", 0, length))?.[1] ?? null;
  } finally {
    fs.closeSync(fd);
  }
}

/**
 * Makes the folder root's: that of 0.1.0 belonged to the user that runs Postgres. What others have put
 * there is removed, also through a hard link, before root reads it or writes to it.
 */
function own(path: string): void {
  const parent = dirname(path);
  const { uid, mode } = fs.statSync(parent);
  const isOpen = (mode & 0o022) !== 0 && (mode & 0o1000) === 0; // as /tmp is, each name is its owner's
  if (uid !== 0 || isOpen)
    throw new Error(
      `this process runs as root, but ${parent} can be changed by others (uid ${uid}, mode ` +
        `${(mode & 0o777).toString(8)}); run it as that user, or: chown root ${parent} && chmod go-w ${parent}`,
    );
  const fd = fs.openSync(path, O_DIRECTORY | O_NOFOLLOW);
  try {
    const owner = fs.fstatSync(fd).uid;
    if (owner !== 0 && !serverUsers().some((user) => user.uid === owner))
      throw new Error(`the folder belongs to uid ${owner}, but this process runs as uid 0`);
    fs.fchownSync(fd, 0, 0);
    fs.fchmodSync(fd, 0o700); // from here on, nobody else can change what is in it
  } finally {
    fs.closeSync(fd);
  }
  for (const name of fs.readdirSync(path)) {
    const stat = fs.lstatSync(join(path, name));
    if (stat.isDirectory()) continue;
    const isOurs = stat.uid === 0 && stat.nlink === 1 && (stat.isFile() || stat.isFIFO());
    if (!isOurs) fs.unlinkSync(join(path, name));
  }
}

/** The owner of the cluster, or a user for a new one. */
function serverUser(path: string): { uid: number; gid: number } {
  const cluster = fs.lstatSync(join(path, "cluster"), { throwIfNoEntry: false });
  if (cluster && !cluster.isDirectory()) throw new Error("its `cluster` is not a folder");
  if (cluster && cluster.uid !== 0) return { uid: cluster.uid, gid: cluster.gid };
  const [user] = serverUsers();
  if (!user)
    throw new Error("Postgres refuses to run as root, and there is no user postgres or nobody");
  return user;
}

/** Users that may run Postgres for root. initdb requires a line in /etc/passwd. */
function serverUsers(): { uid: number; gid: number }[] {
  const lines = fs.readFileSync("/etc/passwd", "utf8").split("\n");
  return ["postgres", "_postgres", "nobody"].flatMap((name) => {
    const [, , uid, gid] = lines.find((line) => line.startsWith(`${name}:`))?.split(":") ?? [];
    return Number(uid) > 0 ? [{ uid: Number(uid), gid: Number(gid) }] : [];
  });
}

/** The path of `dir` for a child that works in it, valid whatever the child's user may enter. */
export function pathFromInside(dir: string): string {
  return process.platform === "linux" ? "/proc/self/cwd" : dir;
}

/** Whether the cluster is prepared for this version. */
export function isPrepared({ path }: DataDir): boolean {
  return fs.existsSync(join(path, "cluster")) && fs.existsSync(join(path, "role"));
}

/**
 * Creates the cluster unless it exists, and prepares it: one of 0.1.0, or one whose preparation was
 * interrupted, which begins again. Requires `start.lock`, and that no Postgres runs. Throws an Error.
 */
export async function createCluster(dataDir: DataDir, log: (line: string) => void) {
  const { path, runAs } = dataDir;
  const cluster = join(path, "cluster");
  if (!fs.existsSync(cluster)) {
    log(`creating an embedded Postgres in ${path}`);
    const making = fs.mkdtempSync(join(path, "making-"));
    if (runAs.uid !== undefined && runAs.gid !== undefined)
      fs.chownSync(making, runAs.uid, runAs.gid);
    await initdb(dataDir, making);
    fs.renameSync(making, cluster);
  } else log(`preparing the embedded Postgres in ${path} for the role ${ROLE}`);
  // That of 0.1.0 was known to the user that runs Postgres.
  const password = randomBytes(24).toString("hex");
  writeSynced(join(path, "password"), `${password}\n`);
  await prepare(dataDir, password);
  fs.rmSync(join(path, "port"), { force: true }); // of 0.1.0
  writeSynced(join(path, "role"), `${ROLE}\n`);
}

/** A power cut leaves the whole file, or none that counts: `role` is the last one. */
function writeSynced(path: string, text: string): void {
  fs.rmSync(path, { force: true });
  fs.writeFileSync(path, text, { mode: 0o600, flag: "wx" });
  for (const one of [path, dirname(path)]) {
    const fd = fs.openSync(one, "r");
    fs.fsyncSync(fd);
    fs.closeSync(fd);
  }
}

/** Removes what interrupted initdbs have left. Requires `start.lock`. */
export function removeRemnants({ path, runAs }: DataDir): void {
  for (const name of fs.readdirSync(path)) {
    if (!name.startsWith("making-")) continue;
    const dir = join(path, name);
    // As its owner, who may have put links there.
    Bun.spawnSync(["find", ".", "-mindepth", "1", "-delete"], { ...runAs, cwd: dir });
    try {
      fs.rmdirSync(dir);
    } catch (error) {
      // An initdb whose parent was killed still writes there: the next start removes it.
      if ((error as { code: string }).code !== "ENOTEMPTY") throw error;
    }
  }
}

/** Leaves `dir` behind when it fails: removeRemnants removes it. */
async function initdb({ native, runAs }: DataDir, dir: string): Promise<void> {
  const command = [join(native, "bin", "initdb"), "-D", pathFromInside(dir)];
  command.push(..."-U postgres -E UTF8 --locale=C --auth=reject".split(" "));
  if (process.platform === "linux") command.push("--sync-method=syncfs"); // 1 call, not 1,000
  await run(command, { ...runAs, cwd: dir }, "");
}

/** Nobody but the programs' role can log in; so no superuser can. */
const HBA = `local all ${ROLE} scram-sha-256\n`;

/**
 * One transaction, which can be repeated. `reassign owned` refuses the objects of the first superuser,
 * to which everything of 0.1.0 belongs: so each is given to the role.
 */
const preparation = (password: string) => `
do $$
declare
  statement text;
begin
  if not exists (select from pg_roles where rolname = '${ROLE}') then create role ${ROLE}; end if;
  alter role ${ROLE} with login nosuperuser nocreatedb nocreaterole noreplication nobypassrls
    password '${password}';
  execute format('alter role %I password null', current_user);
  alter schema public owner to ${ROLE};
  for statement in
    select format('alter table %s owner to ${ROLE}', oid::regclass) from pg_class
    where relkind in ('r', 'p', 'v', 'm') and relnamespace = 'public'::regnamespace
      and relowner = current_user::regrole
      and not exists (select from pg_depend where objid = pg_class.oid and deptype = 'e')
  loop execute statement; end loop;
  for statement in -- without those of a table, which went with it
    select format('alter sequence %s owner to ${ROLE}', oid::regclass) from pg_class
    where relkind = 'S' and relnamespace = 'public'::regnamespace
      and relowner = current_user::regrole
      and not exists (select from pg_depend where objid = pg_class.oid and deptype in ('a', 'i', 'e'))
  loop execute statement; end loop;
  for statement in
    select format('alter routine %s owner to ${ROLE}', oid::regprocedure) from pg_proc
    where pronamespace = 'public'::regnamespace and proowner = current_user::regrole
      and not exists (select from pg_depend where objid = pg_proc.oid and deptype = 'e')
  loop execute statement; end loop;
  for statement in
    select format('alter type %s owner to ${ROLE}', oid::regtype) from pg_type
    where typtype in ('d', 'e') and typnamespace = 'public'::regnamespace
      and typowner = current_user::regrole
      and not exists (select from pg_depend where objid = pg_type.oid and deptype = 'e')
  loop execute statement; end loop;
end
$$;

`;

/** Runs in a Postgres that serves nobody. */
async function prepare(dataDir: DataDir, password: string): Promise<void> {
  await run(["sh", "-c", "umask 077; cat >pg_hba.conf && sync"], inCluster(dataDir), HBA);
  await runSingle(dataDir, preparation(password));
}

/** Runs statements, each of which ends with a semicolon and an empty line, as the first superuser. */
export async function runSingle(dataDir: DataDir, sql: string): Promise<void> {
  const { path, native } = dataDir;
  const command = [`${native}/bin/postgres`, "--single", "-j", "-D"];
  command.push(pathFromInside(`${path}/cluster`), "-c", "exit_on_error=on");
  // The name shows that it still runs, after the death of this process.
  const settings = ["dynamic_shared_memory_type=mmap", "log_min_error_statement=panic"];
  for (const setting of [...settings, clusterName(dataDir)]) command.push("-c", setting);
  await run([...command, "postgres"], inCluster(dataDir), sql);
}

/** A setting that appears in the command line of this cluster's Postgres and of no other. */
export function clusterName({ path }: DataDir): string {
  return `cluster_name=daybook-${fs.lstatSync(`${path}/cluster`, { bigint: true }).ino}.`;
}

/** How a child works in the cluster. */
export function inCluster({ path, runAs }: DataDir) {
  return { ...runAs, cwd: join(path, "cluster") };
}

async function run(command: string[], options: RunAs & { cwd: string }, input: string) {
  const child = Bun.spawn(command, {
    ...options,
    stdio: [new Blob([input]), "ignore", "pipe"],
    timeout: MAX_INITDB_MS,
  });
  const output = await new Response(child.stderr).text();
  if ((await child.exited) !== 0)
    throw new Error(firstReason(output) || `${command[0]} failed without a message`);
}

/** The first line that gives a reason, without time and pid. The lines after it only follow. */
export function firstReason(output: string): string {
  const lines = output.trim().split("\n");
  const reason =
    lines.find((line) => /error:|ERROR:|FATAL|PANIC|could not/.test(line)) ?? lines.at(-1);
  return (reason ?? "").replace(/^\d{4}-.*?\] /, "");
}
