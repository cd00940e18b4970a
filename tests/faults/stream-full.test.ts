/** The disks of nodes that hold a stream are really full. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { closeSync, openSync, rmSync, writeSync } from "node:fs";
import { join } from "node:path";

import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { canMount, mount } from "../support/mount.ts";
import { hasNats, openNats } from "../support/nats.ts";
import { until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(240_000);

const DISK_MIB = 96;
const MIB = 1024 * 1024;
/** On a machine that runs other tests too. */
const PATIENCE_MS = 90_000;

const ballastOf = (disk: string) => join(disk, "ballast");

/** Writes a file until the disk takes no byte more. */
function fill(disk: string): void {
  const file = openSync(ballastOf(disk), "a");
  try {
    for (let size = MIB; size > 0;)
      try {
        if (writeSync(file, Buffer.alloc(size)) < size) size >>= 1;
      } catch (error) {
        if ((error as { code?: string }).code !== "ENOSPC") throw error;
        size >>= 1;
      }
  } finally {
    closeSync(file);
  }
}

test.if(hasNats && canMount("tests of nodes of a stream whose disks are full"))(
  "while disks of nodes are full, nothing is acknowledged that is lost, and it resumes once there is room",
  async () => {
    using stack = new DisposableStack();
    const disks = [0, 1, 2].map(() => {
      const disk = mount(DISK_MIB);
      if (!disk) throw new Error("cannot mount a second disk");
      return stack.use(disk).path;
    });
    await using nats = await openNats({ storeOf: (node) => disks[node]! });
    await using ledger = await openLedger({ JOURNAL_URL: nats.url() });
    await using app = await ledger.start();
    const acknowledged: string[] = [];
    let sent = 0;
    const statuses: number[] = [];
    const note = async (users: string[], answering: Promise<Response>) => {
      const status = await answering.then(
        (answer) => answer.status,
        () => 0,
      );
      statuses.push(status);
      if (status === 201) acknowledged.push(...users);
      return status;
    };
    /** Sends 100 events with 100 kB, and then one. */
    const send = async () => {
      const users = Array.from({ length: 100 }, (_, i) => `b${sent}-${i}`);
      const lines = users.map((user) => line(user, 1, { fill: "x".repeat(1000) })).join("");
      const single = `s${sent++}`;
      const all = [note(users, app.postLines(lines)), note([single], app.post(event(single)))];
      return (await Promise.all(all)).every((status) => status === 201);
    };
    for (let n = 0; n < 20; n++) expect(await send()).toBe(true);
    await untilBalance(app, "s0", "1", PATIENCE_MS);

    // JetStream stops on that node. The others continue, after an election.
    const first = await nats.leader("daybook");
    fill(disks[first]!);
    await until(async () => {
      await send();
      return !(await nats.nodes[first]!.isReady());
    }, PATIENCE_MS);
    await until(send, PATIENCE_MS);
    // Without a quorum nothing is acknowledged. Reads continue.
    const second = (first + 1) % 3;
    fill(disks[second]!);
    await until(async () => !(await send()), PATIENCE_MS);
    expect(await send()).toBe(false);
    expect((await fetch(`${app.url}/readyz`)).status).toBe(503);
    expect((await fetch(`${app.url}/userEvents/s0`)).status).toBe(200);
    // A status of 0: no answer.
    expect([...new Set(statuses)].filter((status) => ![201, 503, 507].includes(status))).toEqual(
      [],
    );

    for (const node of [first, second]) {
      rmSync(ballastOf(disks[node]!));
      await nats.nodes[node]!.kill("SIGTERM");
      nats.nodes[node]!.start();
    }
    await until(send, PATIENCE_MS);
    await nats.ready();
    const missing = async () => {
      const balances = await ledger.balances();
      return acknowledged.filter((user) => !(user in balances));
    };
    await until(async () => (await missing()).length === 0, PATIENCE_MS).catch(() => {});
    expect(await missing()).toEqual([]);
    const balances = Object.entries(await ledger.balances());
    expect(balances.filter(([, revenue]) => revenue !== "1")).toEqual([]);
    expect(await ledger.tool(["--verify"])).toMatchObject({ code: 0 });
  },
);
