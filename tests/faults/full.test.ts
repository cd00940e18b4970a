/**
 * Disks that are really full: a small file system where this user may mount one, else a limit on the size
 * of files.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, rmSync, statfsSync, writeFileSync } from "node:fs";

import { event, line } from "../support/events.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, startApp, tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(120_000);

const MIB = 1024 * 1024;

/** A folder on a disk of `mib` MiB; `null` where this user may not mount one. */
function mount(mib: number) {
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

/** A folder with about 1 MiB of free space, which `makeRoom` enlarges. */
function openSmallDisk() {
  const mounted = mount(2);
  const dir = mounted ?? tempDir();
  const ballast = `${dir.path}/ballast`;
  if (mounted) writeFileSync(ballast, Buffer.alloc(MIB));
  return {
    path: dir.path,
    kind: mounted ? "tmpfs" : "RLIMIT_FSIZE",
    limit(pid: number, bytes: string) {
      if (!mounted) Bun.spawnSync(["prlimit", `--pid=${pid}`, `--fsize=${bytes}`]);
    },
    makeRoom(pid: number) {
      rmSync(ballast, { force: true });
      this.limit(pid, "unlimited");
    },
    [Symbol.dispose]: () => dir[Symbol.dispose](),
  };
}

// Concurrent, because both tests mostly wait.
test.concurrent(
  "a full disk is answered with 507 and acknowledges nothing; reads continue, and writing resumes with free space",
  async () => {
    await using database = await testDatabase();
    using disk = openSmallDisk();
    // A rotation may then find no space for the header of the next file.
    await using server = await startApp({
      dataDir: disk.path,
      databaseUrl: database.url,
      env: { JOURNAL_SEGMENT_BYTES: "300000" },
    });
    disk.limit(server.pid, "200000:");
    let accepted = 0;
    const send = async () => {
      const { status } = await server.post(event("ann", 1, { note: "n".repeat(20_000) }));
      if (status === 201) accepted++;
      return status;
    };
    const statuses = new Set<number>();
    await until(async () => {
      statuses.add(await send());
      return statuses.has(507);
    }, 60_000);
    expect([...statuses]).toEqual([201, 507]);

    await untilBalance(server, "ann", `${accepted}`, 30_000);
    expect((await fetch(`${server.url}/healthz`)).status).toBe(200);
    const ready = await fetch(`${server.url}/readyz`);
    expect(ready.status).toBe(503);
    expect(await send()).toBe(507);

    disk.makeRoom(server.pid);
    await until(async () => (await send()) === 201, 30_000);
    await until(async () => (await fetch(`${server.url}/readyz`)).status === 200, 30_000);
    await untilBalance(server, "ann", `${accepted}`, 30_000);
    server.kill("SIGTERM");
    expect(await server.exit()).toBe(0);

    // The next start finds everything that was accepted.
    await using again = await startApp({ dataDir: disk.path, databaseUrl: database.url });
    await again.post(event("ann"));
    await untilBalance(again, "ann", `${accepted + 1}`, 30_000);
    expect(await balances(database.url)).toEqual({ ann: `${accepted + 1}` });
    const check = await run("processor.ts", { args: ["--check"], env: { DATA_DIR: disk.path } });
    expect(check.code, `${disk.kind}: ${check.stdout}`).toBe(0);
  },
);

const mounted = mount(1);
mounted?.[Symbol.dispose]();

test.concurrent.if(mounted !== null)(
  "on a disk that fills up, the embedded Postgres posts everything that was accepted, and reads continue",
  async () => {
    using disk = mount(400);
    if (!disk) throw new Error("cannot mount a second disk");
    await using server = await startApp({ dataDir: disk.path });
    const ballast = `${disk.path}/ballast`;
    const { bavail, bsize } = statfsSync(disk.path);
    writeFileSync(ballast, Buffer.alloc(bavail * bsize - 60 * MIB));
    const read = (user: string, after = "") => fetch(`${server.url}/userEvents/${user}${after}`);
    let sent = 0;
    /** Sends events of 2,000 new users, and waits for the balance of the last one. */
    const send = async () => {
      const users = Array.from({ length: 2_000 }, (_, i) => `${sent}.${i}.${"u".repeat(60)}`);
      const answer = await server.postLines(users.map((user) => line(user)).join(""));
      if (answer.status !== 201) return answer.status;
      const { position } = (await answer.json()) as { position: string };
      const { status } = await read(users.at(-1) as string, `?after=${position}`);
      expect(status, `after ${sent} bodies: ${server.stderr.text().slice(-1_000)}`).toBe(200);
      sent++;
      return 201;
    };
    await until(async () => (await send()) === 507, 60_000);
    expect(sent).toBeGreaterThan(5);
    for (let i = 0; i < 40; i++) {
      expect((await read(`0.0.${"u".repeat(60)}`)).status).toBe(200);
      expect(await send()).toBe(507);
      await Bun.sleep(50);
    }
    rmSync(ballast);
    await until(async () => (await send()) === 201, 30_000);
    expect(server.stderr.text()).not.toContain("Postgres is running again");
  },
);
