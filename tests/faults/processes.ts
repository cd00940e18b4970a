/** Test runs as processes of their own, each in a group that can be killed with everything it started. */

/** A run that takes longer hangs. */
const MAX_MS = 20 * 60_000;

/** The groups of the runs in progress. A signal to this process does not reach them. */
const groups = new Set<number>();

/** Runs `bun test ARGS` in `cwd`, and kills what it leaves running. */
export async function runTestProcess(args: string[], cwd: string, env: Record<string, string>) {
  const child = Bun.spawn([process.execPath, "test", ...args], {
    cwd,
    env: { ...process.env, ...env },
    stdio: ["ignore", "pipe", "pipe"],
    detached: true,
  });
  groups.add(child.pid);
  const timer = setTimeout(() => killGroup(child.pid), MAX_MS);
  const [stdout, stderr] = await Promise.all([
    new Response(child.stdout).text(),
    new Response(child.stderr).text(),
  ]);
  const passed = (await child.exited) === 0;
  clearTimeout(timer);
  killGroup(child.pid);
  groups.delete(child.pid);
  return { passed, stdout, stderr };
}

/** Kills every run in progress. */
export function killRuns(): void {
  for (const pid of groups) killGroup(pid);
}

function killGroup(pid: number): void {
  try {
    process.kill(-pid, "SIGKILL");
  } catch {
    // nothing left to kill
  }
}
