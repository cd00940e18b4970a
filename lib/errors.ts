/** Errors of the operating system, in words: the operation, the path, the reason, and for whom. */
import { accessSync, constants, existsSync, readFileSync } from "node:fs";
import { dirname } from "node:path";

const OPERATIONS: Record<string, string> = {
  access: "read",
  chmod: "set the mode of",
  mkdir: "create the folder",
  open: "open",
  rename: "rename",
  rm: "remove",
  scandir: "list",
  stat: "read",
  unlink: "remove",
};

const REASONS: Record<string, string> = {
  EACCES: "permission denied",
  EDQUOT: "the disk quota is used up",
  EEXIST: "a file of that name is in the way",
  EIO: "the disk reports an input/output error",
  EISDIR: "it is a folder, not a file",
  ELOOP: "its symbolic links form a loop",
  ENAMETOOLONG: "the name is too long",
  ENOENT: "no such file or folder",
  ENOSPC: "the disk is full",
  ENOTDIR: "it, or a part of its path, is not a folder",
  EPERM: "operation not permitted",
  EROFS: "its file system is read-only",
};

/** The message of any error. That of a file or folder names what was tried, and the user who may not. */
export function explain(error: unknown): string {
  const { code = "", syscall = "", path, message } = error as NodeJS.ErrnoException;
  if (!(code in REASONS) || path === undefined) return message;
  return `cannot ${OPERATIONS[syscall] ?? syscall} ${path}: ${reasonOf(error)}`;
}

/** Why the operating system refused, without the path. */
export function reasonOf(error: unknown): string {
  const { code = "", message } = error as NodeJS.ErrnoException;
  const isDenied = code === "EACCES" || code === "EPERM";
  return (REASONS[code] ?? message) + (isDenied ? ` for ${whoAmI()}` : "");
}

/** Throws the reason where this process may not create files in the folder of `path`. */
export function requireWritableFolder(path: string): void {
  try {
    accessSync(dirname(path), constants.W_OK);
  } catch (error) {
    throw Object.assign(error as Error, { syscall: "create files in" });
  }
}

function whoAmI(): string {
  const uid = process.getuid?.();
  const users = existsSync("/etc/passwd") ? readFileSync("/etc/passwd", "utf8").split("\n") : [];
  const [name] = users.find((line) => line.split(":")[2] === `${uid}`)?.split(":") ?? [];
  return name ? `the user ${name} (uid ${uid})` : `uid ${uid}`;
}
