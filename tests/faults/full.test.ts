/**
 * A disk that is really full: a small file system of its own where this user may mount one, else a
 * limit on the size of files. 507, reads go on, and writing goes on by itself once there is room.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, rmSync, statfsSync, writeFileSync } from "node:fs";

import { balances, testDatabase } from "../support/postgres.ts";
import { spawn, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(120_000);

const MIB = 1024 * 1024;

/** A folder on a disk of `mib` MiB, or `null` where this user may mount none. */
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

/** A folder with about a megabyte of room, and how more comes to be. */
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

// Both wait more than they do.
test.concurrent(
  "a full disk: 507, nothing of it acknowledged, reads go on, and with room so does writing",
  async () => {
    await using database = await testDatabase();
    using disk = openSmallDisk();
    // The last rotation has not the room for the next file's header.
    await using server = await startApp({
      dataDir: disk.path,
      databaseUrl: database.url,
      env: { JOURNAL_SEGMENT_BYTES: "300000" },
    });
    disk.limit(server.pid, "200000:");
    const wanted = { ann: 0 };
    const send = async () => {
      const note = "n".repeat(20_000);
      const { status } = await server.post({ userId: "ann", name: "add_revenue", value: 1, note });
      if (status === 201) wanted.ann++;
      return status;
    };
    const statuses = new Set<number>();
    await until(async () => {
      statuses.add(await send());
      return statuses.has(507);
    }, 60_000);
    expect([...statuses]).toEqual([201, 507]);

    await until(async () => (await server.balance("ann")) === `${wanted.ann}`, 30_000);
    expect((await fetch(`${server.url}/healthz`)).status).toBe(200);
    const ready = await fetch(`${server.url}/readyz`);
    expect(ready.status).toBe(503);
    expect(await send()).toBe(507);

    disk.makeRoom(server.pid);
    await until(async () => (await send()) === 201, 30_000);
    await until(async () => (await fetch(`${server.url}/readyz`)).status === 200, 30_000);
    await until(async () => (await server.balance("ann")) === `${wanted.ann}`, 30_000);
    server.kill("SIGTERM");
    expect(await server.exit()).toBe(0);

    // And all of it is on the disk for the next one.
    await using again = await startApp({ dataDir: disk.path, databaseUrl: database.url });
    await again.post({ userId: "ann", name: "add_revenue", value: 1 });
    await until(async () => (await again.balance("ann")) === `${wanted.ann + 1}`, 30_000);
    expect(await balances(database.url)).toEqual({ ann: `${wanted.ann + 1}` });
    await using check = spawn("processor.ts", { args: ["--check"], env: { DATA_DIR: disk.path } });
    expect(await check.exit(), `${disk.kind}: ${check.stdout.text()}`).toBe(0);
  },
);

const mounted = mount(1);
mounted?.[Symbol.dispose]();

test.concurrent.if(mounted !== null)(
  "a disk that fills up under the private Postgres: all that was taken is posted, and reads go on",
  async () => {
    using disk = mount(400);
    if (!disk) throw new Error("cannot mount once more");
    await using server = await startApp({ dataDir: disk.path });
    const ballast = `${disk.path}/ballast`;
    const { bavail, bsize } = statfsSync(disk.path);
    writeFileSync(ballast, Buffer.alloc(bavail * bsize - 60 * MIB));
    const read = (user: string, after = "") => fetch(`${server.url}/userEvents/${user}${after}`);
    let sent = 0;
    /** 2,000 users more, the last of whom is read at once. */
    const send = async () => {
      const users = Array.from({ length: 2_000 }, (_, i) => `${sent}.${i}.${"u".repeat(60)}`);
      const lines = users.map((userId) => `{"userId":"${userId}","name":"add_revenue","value":1}`);
      const answer = await server.postLines(lines.join("\n"));
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
