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
  /** Whether another run can continue where this one stops: a pipe needs a name for that. */
  canResume: boolean;
  /** Standard input or another pipe. */
  isStream: boolean;
  compression: string | null;
}

/** What is at `path`; `source` replaces the name that it would have. `problem`: why it cannot be sent. */
export async function inspect(
  path: string,
  source: string | undefined,
): Promise<GivenInput & { problem: string | null }> {
  const given = { path, compression: null, problem: null };
  const pipe = (kind: string) => {
    const name = source ?? `${kind}-${crypto.randomUUID()}`;
    return { ...given, name, isStream: true, canResume: source !== undefined };
  };
  const file = { ...given, name: source ?? basename(path), isStream: false, canResume: true };
  if (path === "-") return pipe("stdin");
  try {
    const stat = statSync(path);
    accessSync(path, constants.R_OK);
    if (stat.isFIFO()) return pipe("pipe");
    if (!stat.isFile()) return { ...file, problem: "not a regular file or a pipe" };
    const found = await inspectFile(path);
    return { ...file, ...found, name: source ?? found.name };
  } catch (error) {
    const { code = "" } = error as { code?: string };
    const problem = ["ENOENT", "ENOTDIR"].includes(code) ? "no such file" : reasonOf(error);
    return { ...file, problem };
  }
}
