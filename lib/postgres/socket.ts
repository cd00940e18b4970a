/**
 * Where the embedded Postgres is reached: a Unix socket in `cluster`. The system limits the path of a
 * socket to some 100 bytes. On Linux a deeper one is reached through the descriptor of its folder;
 * elsewhere the socket lies in a private folder, which the file `socket` names.
 */
import * as fs from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import type { DataDir } from "./data-dir.ts";

/** 107 bytes on Linux and 103 on macOS, without `/.s.PGSQL.5432` and what Postgres adds for its lock. */
const MAX_FOLDER_BYTES = 80;

/** The open folders of this thread. */
const descriptors = new Map<string, number>();

/** Settings for the start. */
export function socketSettings({ path, runAs }: DataDir): string[] {
  let folder = ".";
  if (isDeep(path) && process.platform !== "linux") {
    folder = fs.mkdtempSync(join(Buffer.byteLength(tmpdir()) < 60 ? tmpdir() : "/tmp", "daybook-"));
    if (runAs.uid !== undefined && runAs.gid !== undefined)
      fs.chownSync(folder, runAs.uid, runAs.gid);
    fs.writeFileSync(join(path, "socket"), `${folder}\n`, { mode: 0o600 });
  }
  return ["port=5432", `unix_socket_directories=${folder}`];
}

/** A URL for this process. Throws if no Postgres has ever run in `path`. */
export function clusterUrl(relativePath: string): string {
  const path = resolve(relativePath); // a host that does not begin with / is not a folder
  const read = (name: string) => fs.readFileSync(join(path, name), "utf8").trim();
  const user = `${read("role")}:${read("password")}`;
  return `postgres://${user}@${encodeURIComponent(socketFolder(path, read))}:5432/postgres`;
}

function socketFolder(path: string, read: (name: string) => string): string {
  const cluster = join(path, "cluster");
  if (!isDeep(path)) return cluster;
  if (process.platform !== "linux") return read("socket");
  const fd = descriptors.get(cluster) ?? fs.openSync(cluster, fs.constants.O_DIRECTORY);
  descriptors.set(cluster, fd);
  return `/proc/self/fd/${fd}`;
}

function isDeep(path: string): boolean {
  return Buffer.byteLength(join(path, "cluster")) > MAX_FOLDER_BYTES;
}
