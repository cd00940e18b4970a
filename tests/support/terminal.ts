/** A program on a terminal. */
import { join } from "node:path";

import { root, SECRET } from "./programs.ts";

/** Runs one of the programs to its end. Returns its exit code and what the terminal was sent. */
export async function onTerminal(env: Record<string, string>, program: string, ...args: string[]) {
  let shown = "";
  const { promise: closed, resolve: close } = Promise.withResolvers<void>();
  const child = Bun.spawn([process.execPath, "run", join(root, program), ...args], {
    env: { ...process.env, AUTH_SECRET: SECRET, ...env },
    terminal: {
      data: (_, bytes) => void (shown += Buffer.from(bytes).toString()),
      exit: () => close(),
    },
  });
  const code = await child.exited;
  await closed;
  return { code, shown };
}
