/**
 * Disks that are really full: a small file system where this user may mount one, else a limit on the size
 * of files.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { rmSync, writeFileSync } from "node:fs";

import { diskSpace } from "../../lib/journal/disk.ts";
import { event, line } from "../support/events.ts";
import { canMount, mount } from "../support/mount.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, startApp, tempDir, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(120_000);

const MIB = 1024 * 1024;

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

const mayMount = canMount("tests of disks that fill up");

test.concurrent.if(mayMount)(
  "on a disk that fills up, reads continue, and all that was accepted is posted once there is room",
  async () => {
    using disk = mount(400);
    if (!disk) throw new Error("cannot mount a second disk");
    await using server = await startApp({ dataDir: disk.path });
    const ballast = `${disk.path}/ballast`;
    const free = () => diskSpace(disk.path).free;
    writeFileSync(ballast, Buffer.alloc(free() - 60 * MIB));
    const nameOf = (body: number, i: number) => `${body}.${i}.${"u".repeat(60)}`;
    let sent = 0;
    /** Sends events of 2,000 new users. */
    const send = async () => {
      const lines = Array.from({ length: 2_000 }, (_, i) => line(nameOf(sent, i)));
      const { status } = await server.postLines(lines.join(""));
      if (status === 201) sent++;
      return status;
    };
    const read = async () => (await fetch(`${server.url}/userEvents/${nameOf(0, 0)}`)).status;
    expect(await send()).toBe(201);
    await until(async () => (await read()) === 200);
    await until(async () => {
      expect(await read(), server.stderr.text().slice(-1_000)).toBe(200);
      return (await send()) === 507;
    }, 60_000);
    for (let i = 0; i < 40; i++) {
      expect(free()).toBeGreaterThan(8 * MIB); // for Postgres
      expect(await read()).toBe(200);
      expect(await send()).toBe(507);
    }
    rmSync(ballast);
    await until(async () => (await send()) === 201, 30_000);
    for (let body = 0; body < sent; body += 10)
      await untilBalance(server, nameOf(body, 1_999), "1");
    expect(server.stderr.text()).not.toContain("Postgres is running again");
  },
);

test.concurrent.if(mayMount)(
  "a backlog that the disk has no room for waits, says so, and is posted once there is room; reads continue",
  async () => {
    using disk = mount(500);
    if (!disk) throw new Error("cannot mount a third disk");
    const users = 300_000;
    const user = (i: number) => `user-${Bun.hash(`${i}`).toString(36)}`; // all over the index
    {
      await using server = await startApp({ dataDir: disk.path, args: ["--no-processor"] });
      for (let from = 0; from < users; from += 20_000) {
        const lines = Array.from({ length: 20_000 }, (_, i) => line(user(from + i)));
        expect((await server.postLines(lines.join(""))).status).toBe(201);
      }
      server.kill("SIGTERM");
      expect(await server.exit()).toBe(0);
    }
    const ballast = `${disk.path}/ballast`;
    writeFileSync(ballast, Buffer.alloc(diskSpace(disk.path).free - 80 * MIB));
    await using server = await startApp({ dataDir: disk.path });
    const metric = async (name: string) => {
      const text = await (await fetch(`${server.url}/metrics`)).text();
      return Number(new RegExp(`^daybook_${name} (.*)$`, "m").exec(text)?.[1]);
    };
    const statuses = new Set<number>();
    const read = async () =>
      statuses.add((await fetch(`${server.url}/userEvents/${user(0)}`)).status);
    await until(async () => {
      await read();
      return (await metric("posting_paused")) === 1;
    }, 60_000);
    const ready = await (await fetch(`${server.url}/readyz?reads`)).json();
    expect(ready).toMatchObject({ status: "ready", reads: "ready" });
    expect(ready.paused).toMatch(
      /^the disk of \S+ is nearly full: posting needs \d+ MiB of free space there$/,
    );
    for (let i = 0; i < 100; i++) await read();
    expect([...statuses].filter((status) => status !== 200 && status !== 404)).toEqual([]);

    rmSync(ballast);
    await until(async () => (await metric("posting_lag_bytes")) === 0, 60_000);
    await untilBalance(server, user(users - 1), "1");
    expect(await metric("posting_paused")).toBe(0);
    expect(server.stderr.text()).not.toContain("Postgres is running again");
  },
);
