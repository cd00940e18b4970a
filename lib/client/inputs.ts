/** What the client is given to send: files, compressed files, pipes and standard input. */
import { accessSync, constants, statSync } from "node:fs";
import { basename } from "node:path";

import { reasonOf } from "../errors.ts";
import { inspectFile } from "../event/input.ts";

/** What is given to be sent. */
export interface GivenInput {
  /** `-` for standard input. */
  path: string;
  /** The name of the source. */
  name: string;
  /** Standard input or another pipe. */
  isStream: boolean;
  compression: string | null;
}

/** What is at `path`. `problem`: why it cannot be sent. */
export async function inspect(path: string): Promise<GivenInput & { problem: string | null }> {
  const stream = { path, isStream: true, compression: null, problem: null };
  const file = { ...stream, isStream: false, name: basename(path) };
  if (path === "-") return { ...stream, name: `stdin-${crypto.randomUUID()}` };
  try {
    const stat = statSync(path);
    accessSync(path, constants.R_OK);
    if (stat.isFIFO()) return { ...stream, name: `pipe-${crypto.randomUUID()}` };
    if (!stat.isFile()) return { ...file, problem: "not a regular file or a pipe" };
    return { ...file, ...(await inspectFile(path)) };
  } catch (error) {
    const { code = "" } = error as { code?: string };
    const problem = ["ENOENT", "ENOTDIR"].includes(code) ? "no such file" : reasonOf(error);
    return { ...file, problem };
  }
}
