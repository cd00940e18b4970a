/** The files of a stream's node are damaged, or parts of the network are cut off. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { JournalUnavailable } from "../../lib/journal/format.ts";
import { openStream } from "../../lib/journal/stream.ts";
import { openStreamReader } from "../../lib/journal/stream-reader.ts";
import { openStreamJournal } from "../../lib/journal/stream-writer.ts";
import { hasNats, openNats, openTcpProxy } from "../support/nats.ts";
import { until } from "../support/programs.ts";

setDefaultTimeout(120_000);

/** The files with the messages of a node's streams, the largest first. */
function blocksOf(store: string): string[] {
  const names = readdirSync(store, { recursive: true, encoding: "utf8" });
  const paths = names
    .filter((name) => /streams.*msgs.*\.blk$/.test(name))
    .map((name) => join(store, name));
  return paths.toSorted((a, b) => statSync(b).size - statSync(a).size);
}

/** As a processor does, asks again while the stream is unavailable: while a leader is elected, for example. */
function patiently<T>(ask: () => Promise<T>) {
  const unlessUnavailable = (error: unknown) => {
    if (error instanceof JournalUnavailable) return null;
    throw error;
  };
  return until(() => ask().catch(unlessUnavailable), 60_000);
}

const DAMAGE: Record<string, (bytes: Buffer) => Buffer> = {
  "a byte in the middle is flipped": (bytes) => {
    bytes[bytes.length >> 1]! ^= 0x40;
    return bytes;
  },
  "bytes all over are flipped": (bytes) => {
    for (let at = 1000; at < bytes.length; at += 30_000) bytes[at]! ^= 0xff;
    return bytes;
  },
  "its second half is cut off": (bytes) => bytes.subarray(0, bytes.length >> 1),
  "it is empty": () => Buffer.alloc(0),
};

for (const isRunning of [true, false])
  test.if(hasNats).each(Object.keys(DAMAGE))(
    `no reader skips a frame when, of a block file of ${isRunning ? "a running" : "a stopped"} node, %s`,
    async (how) => {
      await using nats = await openNats();
      const journal = await openStreamJournal(nats.url());
      const texts = Array.from(
        { length: 120 },
        (_, i) => `{"n":${i},"fill":"${"x".repeat(9000)}"}`,
      );
      for (const text of texts) await journal.append(Buffer.from(`${text}\n`));
      const [node] = nats.nodes;
      if (!isRunning) await node!.kill();
      const [block] = blocksOf(node!.store);
      writeFileSync(block!, DAMAGE[how]!(readFileSync(block!)));
      if (!isRunning) {
        node!.start();
        await nats.ready();
      }
      // Connected to that node, whose own replica answers first.
      const stream = await openStream(`nats://127.0.0.1:${node!.port}/daybook`);
      const reader = (await patiently(() => openStreamReader(stream, journal.id)))!;
      const found: string[] = [];
      for (let position = reader.start; ;) {
        const frames = await patiently(() => reader.read(position));
        if (frames.length === 0) break;
        for (const { payload } of frames) found.push(...payload.toString().trimEnd().split("\n"));
        position = frames.at(-1)!.to;
      }
      expect(found.length).toBe(texts.length);
      expect(found).toEqual(texts);
      await until(() => journal.append(Buffer.from("more\n")).catch(() => null), 60_000);
      await stream.close();
      await journal.close();
    },
  );

test.if(hasNats)(
  "a node that is cut off from the others acknowledges nothing, and the writer finds another",
  async () => {
    const ports = new Map<string, number>();
    const pairs = [0, 1, 2].flatMap((from) => [0, 1, 2].map((to) => `${from}${to}`));
    const proxies = new Map(
      await Promise.all(
        pairs.map(async (pair) => [pair, await openTcpProxy(() => ports.get(pair)!)] as const),
      ),
    );
    await using _nats = await openNats({
      routeOf(from, to, port) {
        ports.set(`${from}${to}`, port);
        return proxies.get(`${from}${to}`)!.port;
      },
    });
    const journal = await openStreamJournal(_nats.url());
    const acknowledged: string[] = [];
    let n = 0;
    const append = async () => {
      const text = `line${n++}`;
      const isStored = await journal.append(Buffer.from(`${text}\n`)).then(
        () => true,
        () => false,
      );
      if (isStored) acknowledged.push(text);
      return isStored;
    };
    for (const cutOff of [0, 1, 2]) {
      await append();
      const around = [...proxies].filter(([pair]) => pair.includes(`${cutOff}`));
      for (const [, proxy] of around) proxy.cut();
      for (let times = 0; times < 20; times++) await append();
      await until(append, 30_000);
      for (const [, proxy] of around) proxy.mend();
      await _nats.ready();
    }
    await until(append, 30_000);
    const stream = await openStream(_nats.url());
    const readAll = async () => {
      const lines: string[] = [];
      for (const id of (await stream.list()).counts.keys()) {
        const reader = (await patiently(() => openStreamReader(stream, id)))!;
        for (let position = reader.start; ;) {
          const frames = await patiently(() => reader.read(position));
          if (frames.length === 0) break;
          for (const { payload } of frames)
            lines.push(...payload.toString().split("\n").filter(Boolean));
          position = frames.at(-1)!.to;
        }
      }
      return lines;
    };
    const missing = (lines: string[]) => acknowledged.filter((line) => !lines.includes(line));
    // The node that was cut off may still take itself for the leader, and not know what the others have.
    await until(async () => missing(await readAll()).length === 0, 30_000, 500).catch(() => {});
    const lines = await readAll();
    expect(new Set(lines).size).toBe(lines.length);
    expect(missing(lines)).toEqual([]);
    await stream.close();
    await journal.close();
    for (const proxy of proxies.values()) await proxy[Symbol.asyncDispose]();
  },
);
