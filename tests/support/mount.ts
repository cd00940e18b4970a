/** Small disks, for what happens when one is full. */
import { mkdirSync } from "node:fs";

import { tempDir } from "./programs.ts";

/** A folder on a disk of `mib` MiB; `null` where this user may not mount one. */
export function mount(mib: number) {
  const dir = tempDir();
  const path = dir.file("small");
  mkdirSync(path);
  const mounting = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", `size=${mib}m`, "tmpfs", path]);
  const remove = () => {
    Bun.spawnSync(["umount", "-l", path]);
    dir[Symbol.dispose]();
  };
  if (mounting.success) return { path, [Symbol.dispose]: remove };
  remove();
  return null;
}

/** Whether this user may mount a disk; if not, the tests that need one are named. */
export function canMount(tests: string): boolean {
  const mounted = mount(1);
  mounted?.[Symbol.dispose]();
  if (!mounted) console.warn(`skipping ${tests}: this user may not mount a file system`);
  return mounted !== null;
}
