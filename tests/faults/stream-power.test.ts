/**
 * The power of all nodes of a stream fails at one moment. Each store lies on a file system of its own. All
 * nodes are stopped, the images of the file systems copied, and the nodes killed: what they had not synced is
 * only in the kernel's cache, and not in the copies, on which they start again.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { copyFileSync, mkdirSync } from "node:fs";

import { openStream } from "../../lib/journal/stream.ts";
import { openStreamReader } from "../../lib/journal/stream-reader.ts";
import { openStreamJournal } from "../../lib/journal/stream-writer.ts";
import { hasNats, openNats } from "../support/nats.ts";
import { tempDir, until } from "../support/programs.ts";
import { count } from "./figures.ts";

setDefaultTimeout(120_000);

const canMount =
  hasNats &&
  process.platform === "linux" &&
  process.getuid?.() === 0 &&
  Bun.which("losetup") !== null;
const NODES = [0, 1, 2];

function run(...command: string[]): void {
  const { success, stderr } = Bun.spawnSync(command);
  if (!success) throw new Error(`${command.join(" ")}: ${stderr}`);
}

/** A file system for each node; `useCopies` replaces them by what was on their disks. */
function openDisks() {
  const folder = tempDir();
  const storeOf = (node: number) => folder.file(`disk${node}`);
  const image = (node: number) => folder.file(`image${node}`);
  const mount = (node: number) => run("mount", "-o", "loop,commit=300", image(node), storeOf(node));
  for (const node of NODES) {
    run("truncate", "-s", "256M", image(node));
    run("mkfs.ext4", "-q", image(node));
    mkdirSync(storeOf(node));
    mount(node);
  }
  return {
    storeOf,
    copy() {
      for (const node of NODES) run("cp", "--sparse=always", image(node), `${image(node)}.copy`);
    },
    useCopies() {
      for (const node of NODES) {
        run("umount", storeOf(node));
        copyFileSync(`${image(node)}.copy`, image(node));
        mount(node);
      }
    },
    [Symbol.dispose]() {
      for (const node of NODES) Bun.spawnSync(["umount", "-l", storeOf(node)]);
      folder[Symbol.dispose]();
    },
  };
}

/** How many of the acknowledged lines are gone after a power cut. */
async function cutPower(sync: string): Promise<{ acknowledged: number; lost: number }> {
  using disks = openDisks();
  await using nats = await openNats({ sync, storeOf: disks.storeOf });
  const journal = await openStreamJournal(nats.url());
  const acknowledged: string[] = [];
  let isOver = false;
  const appending = Array.from({ length: 8 }, async (_, lane) => {
    for (let n = 0; !isOver; n++) {
      const text = `${lane}-${n}-${"x".repeat(500)}`;
      await journal.append(Buffer.from(`${text}\n`)).then(
        () => acknowledged.push(text),
        () => (isOver = true),
      );
    }
  });
  await until(() => acknowledged.length > 2_000, 60_000);
  await Promise.all(nats.nodes.map((node) => node.kill("SIGSTOP")));
  await Bun.sleep(50); // acknowledgements on their way
  disks.copy();
  const expected = [...acknowledged];
  isOver = true;
  for (const node of nats.nodes) await node.kill();
  await Promise.all(appending);
  await journal.close();
  disks.useCopies();
  for (const node of nats.nodes) node.start();
  await nats.ready();
  const lines = await readLines(nats.url());
  for (const node of nats.nodes) await node.kill();
  return {
    acknowledged: expected.length,
    lost: expected.filter((text) => !lines.has(text)).length,
  };
}

async function readLines(url: string): Promise<Set<string>> {
  const stream = await openStream(url);
  const lines = new Set<string>();
  for (const id of (await stream.list()).counts.keys()) {
    const reader = (await openStreamReader(stream, id))!;
    for (let position = reader.start; ;) {
      const frames = await reader.read(position);
      if (frames.length === 0) break;
      for (const { payload } of frames)
        for (const line of payload.toString().split("\n")) lines.add(line);
      position = frames.at(-1)!.to;
    }
  }
  await stream.close();
  return lines;
}

test.if(canMount)("nothing acknowledged is lost when the power of all nodes fails", async () => {
  const { acknowledged, lost } = await cutPower("always");
  count("events acknowledged before a power cut of a stream", acknowledged);
  expect(lost).toBe(0);
});

test.if(canMount)(
  "with the sync_interval of a nats-server that nobody configured, it is",
  async () => {
    const { lost } = await cutPower("2m");
    expect(lost).toBeGreaterThan(0);
  },
);
