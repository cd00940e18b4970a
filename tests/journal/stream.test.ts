/** A journal in a stream: its writer and reader, on a cluster of three real nats-servers. */
import { afterAll, beforeAll, expect, setDefaultTimeout, test } from "bun:test";

import { connect } from "@nats-io/transport-node";

import { parseSourceMark } from "../../lib/journal/source-mark.ts";
import { encodeMessage, openStream, type Stream } from "../../lib/journal/stream.ts";
import { findKept, openStreamReader } from "../../lib/journal/stream-reader.ts";
import { openStreamJournal } from "../../lib/journal/stream-writer.ts";
import type { Journal } from "../../lib/journal/writer.ts";
import { hasNats, type Nats, openNats, openTcpProxy } from "../support/nats.ts";
import { until } from "../support/programs.ts";

setDefaultTimeout(60_000);

let nats: Nats;
beforeAll(async () => {
  if (hasNats) nats = await openNats();
});
afterAll(() => nats?.[Symbol.asyncDispose]());
let streams = 0;

const lines = (text: string) => Buffer.from(`${text}\n`);

/** A stream of its own, with the writers that a test opens. */
async function openWorld() {
  const url = nats.url(`journal${++streams}`);
  const stream = await openStream(url);
  const journals: Journal[] = [];
  return {
    url,
    stream,
    async open(at = url): Promise<Journal> {
      const journal = await openStreamJournal(at);
      journals.push(journal);
      return journal;
    },
    /** All lines of all journals. */
    async lines(): Promise<string[]> {
      const { counts } = await stream.list();
      const all = await Promise.all([...counts.keys()].map((id) => linesOf(stream, id)));
      return all.flat();
    },
    journals: async () => [...(await stream.list()).counts.keys()],
    async [Symbol.asyncDispose]() {
      for (const journal of journals) await journal.close();
      await stream.close();
    },
  };
}

async function framesOf(stream: Stream, id: string) {
  const reader = await openStreamReader(stream, id);
  const frames = [];
  for (let position = reader?.start ?? 0; reader;) {
    const read = await reader.read(position);
    if (read.length === 0) break;
    frames.push(...read);
    position = read.at(-1)!.to;
  }
  return frames;
}

async function linesOf(stream: Stream, id: string): Promise<string[]> {
  const texts = (await framesOf(stream, id)).map(({ payload }) => payload.toString());
  return texts.flatMap((text) => text.split("\n").filter((line) => line !== ""));
}

/** Adopts the journal as a server does that believes its owner to be gone. */
async function adopt(stream: Stream, id: string): Promise<void> {
  const last = await stream.last(id);
  const end = (await (await openStreamReader(stream, id))?.end()) ?? 0;
  const claim = encodeMessage(id, end, [], Date.now());
  const published = await stream.publish(id, claim, {
    expected: last?.seq ?? 0,
    writer: "another",
  });
  expect(published.state).toBe("stored");
}

test.if(hasNats)("appends are stored in order, and read back from any position", async () => {
  await using world = await openWorld();
  const journal = await world.open();
  const texts = Array.from({ length: 500 }, (_, i) => `{"n":${i}}`);
  const positions = await Promise.all(texts.map((text) => journal.append(lines(text))));
  expect(positions).toEqual(positions.toSorted((a, b) => a - b));
  expect(await world.lines()).toEqual(texts);
  const frames = await framesOf(world.stream, journal.id);
  expect(frames.length).toBeLessThan(texts.length); // group commit
  for (const { from, to, header } of frames) {
    const reader = await openStreamReader(world.stream, journal.id);
    expect((await reader?.read(from))?.[0]).toMatchObject({ header, to });
  }
  expect(journal.end()).toBe(frames.at(-1)!.to);
});

test.if(hasNats)("a publish that arrives late, or once more, is refused", async () => {
  await using world = await openWorld();
  const journal = await world.open();
  await journal.append(lines("a"));
  const { seq, data } = (await world.stream.last(journal.id))!;
  const late = encodeMessage(journal.id, journal.end(), [lines("late")], Date.now());
  await journal.append(lines("b"));
  const at = { expected: seq, writer: "late" };
  expect(await world.stream.publish(journal.id, late, at)).toEqual({ state: "refused" });
  const again = { expected: 0, writer: "late" };
  expect(await world.stream.publish(journal.id, data, again)).toEqual({ state: "refused" });
  await journal.append(lines("c"));
  expect(await world.lines()).toEqual(["a", "b", "c"]);
});

test.if(hasNats)("a new writer adopts the journal of one that is gone", async () => {
  await using world = await openWorld();
  const first = await world.open();
  await first.append(lines("a"));
  await first.close();
  const second = await world.open();
  expect(second.id).toBe(first.id);
  await second.append(lines("b"));
  expect(await world.lines()).toEqual(["a", "b"]);
});

test.if(hasNats)("the journal of a writer that answers is not adopted", async () => {
  await using world = await openWorld();
  const first = await world.open();
  await first.append(lines("a"));
  const second = await world.open();
  expect(second.id).not.toBe(first.id);
});

test.if(hasNats)(
  "of several writers that start at once, each has a journal of its own",
  async () => {
    await using world = await openWorld();
    const first = await world.open();
    await first.append(lines("a"));
    await first.close();
    const opened = await Promise.all([1, 2, 3, 4].map(() => world.open()));
    expect(new Set(opened.map(({ id }) => id)).size).toBe(4);
    expect(opened.filter(({ id }) => id === first.id)).toHaveLength(1);
    await Promise.all(opened.map((journal, i) => journal.append(lines(`${i}`))));
    expect((await world.lines()).toSorted()).toEqual(["0", "1", "2", "3", "a"]);
  },
);

test.if(hasNats)("a journal that another server claims first is left to it", async () => {
  await using world = await openWorld();
  const first = await world.open();
  await first.append(lines("a"));
  await first.close();
  const [name, id] = [world.url.split("/").at(-1), first.id];
  // It is claimed after its last frame was read, when it is asked whether anybody writes it.
  const nc = await connect({
    servers: world.url.slice("nats://".length).split("/")[0]!.split(","),
  });
  const claimed = Promise.withResolvers<void>();
  nc.subscribe(`${name}-live.${id}`, {
    callback: () => void adopt(world.stream, id).then(claimed.resolve, claimed.reject),
  });
  await nc.flush();
  const second = await world.open();
  await claimed.promise;
  expect(second.id).not.toBe(id);
  await nc.close();
});

test.if(hasNats)(
  "a living writer whose journal was adopted continues in another, and nobody who waits notices",
  async () => {
    await using world = await openWorld();
    const journal = await world.open();
    await journal.append(lines("a"));
    const before = journal.id;
    await adopt(world.stream, before);
    const position = await journal.append(lines("b"));
    expect(journal.id).not.toBe(before);
    expect(position).toBe(journal.end());
    await journal.append(lines("c"));
    expect(await linesOf(world.stream, before)).toEqual(["a"]);
    expect(await linesOf(world.stream, journal.id)).toEqual(["b", "c"]);
  },
);

test.if(hasNats)("what belongs to a source is not stored in another journal", async () => {
  await using world = await openWorld();
  const journal = await world.open();
  await journal.append(lines("a"));
  await adopt(world.stream, journal.id);
  const mark = { source: { name: "f", from: 1, to: 2, digest: "", events: 1 } };
  const marked = journal.append(lines(`${JSON.stringify(mark)}\nb`));
  // An event that begins like a mark is none.
  const event = '{"source":{"name":"shop"},"userId":"ann"}';
  const plain = journal.append(lines(event));
  await expect(marked).rejects.toThrow("does not move");
  await plain;
  expect((await world.lines()).toSorted()).toEqual(["a", event]);
});

/** One server behind a proxy, a writer that reaches it through that, and a reader that does not. */
async function openBehindProxy() {
  const server = await openNats({ nodes: 1 });
  const proxy = await openTcpProxy(() => server.nodes[0]!.port);
  const journal = await openStreamJournal(`nats://127.0.0.1:${proxy.port}/one`);
  const stream = await openStream(server.url("one"));
  await journal.append(lines("a"));
  const { seq } = (await stream.last(journal.id))!;
  return {
    proxy,
    journal,
    lines: () => linesOf(stream, journal.id),
    /** Appends a line whose message is stored, and whose acknowledgement is lost. */
    async appendUnheard(text: string): Promise<{ appending: Promise<number> }> {
      proxy.muteAfter(text);
      const appending = journal.append(lines(text));
      appending.catch(() => {});
      await until(async () => (await stream.last(journal.id))!.seq > seq);
      proxy.cut();
      return { appending };
    },
    async [Symbol.asyncDispose]() {
      proxy.mend();
      await journal.close();
      await stream.close();
      await proxy[Symbol.asyncDispose]();
      await server[Symbol.asyncDispose]();
    },
  };
}

test.if(hasNats)("a frame whose acknowledgement is lost is stored once", async () => {
  await using world = await openBehindProxy();
  const { appending } = await world.appendUnheard("needle");
  world.proxy.mend();
  await appending;
  await world.journal.append(lines("b"));
  expect(await world.lines()).toEqual(["a", "needle", "b"]);
});

test.if(hasNats)(
  "a frame that was given up and is there after all is followed by the next one",
  async () => {
    await using world = await openBehindProxy();
    const { appending } = await world.appendUnheard("needle");
    await expect(appending).rejects.toThrow("may or may not be kept");
    world.proxy.mend();
    await until(() => world.journal.append(lines("b")).catch(() => null), 20_000);
    expect(await world.lines()).toEqual(["a", "needle", "b"]);
  },
);

test.if(hasNats)("an append that is larger than a message is cut at line ends", async () => {
  await using world = await openWorld();
  const journal = await world.open();
  const line = (i: number) => `{"n":${i},"fill":"${"x".repeat(50_000)}"}`;
  const texts = Array.from({ length: 100 }, (_, i) => line(i));
  await journal.append(lines(texts.join("\n")));
  expect(await world.lines()).toEqual(texts);
  const frames = await framesOf(world.stream, journal.id);
  expect(frames.length).toBeGreaterThan(4);
  const mark = { name: "f", from: 0, to: 9, digest: "", events: 1 };
  const part = lines(`${JSON.stringify({ source: mark })}\n${"y".repeat(900_000)}`);
  await journal.append(part, part);
  const marked = (await framesOf(world.stream, journal.id)).slice(frames.length);
  expect(marked).toHaveLength(2);
  for (const { payload } of marked)
    expect(parseSourceMark(payload.subarray(0, payload.indexOf(10)))).toEqual(mark);
});

test.if(hasNats)("a purge keeps what is behind a position, and always the last frame", async () => {
  await using world = await openWorld();
  const journal = await world.open();
  const ends = [];
  for (const text of ["a", "b", "c"]) ends.push(await journal.append(lines(text)));
  const purge = async (position: number) => {
    const kept = (await findKept(world.stream, journal.id, position))!;
    await world.stream.purge(journal.id, kept.seq);
    return kept.position;
  };
  expect(await purge(ends[0]!)).toBe(ends[0]!);
  expect(await world.lines()).toEqual(["b", "c"]);
  expect(await purge(ends[2]!)).toBe(ends[1]!);
  expect(await world.lines()).toEqual(["c"]);
  await journal.append(lines("d"));
  expect(await world.lines()).toEqual(["c", "d"]);
  await journal.close();
  const next = await world.open();
  expect(next.id).toBe(journal.id);
});

test.if(hasNats)(
  "where a leader does not know the end of a journal yet, it is asked again",
  async () => {
    await using world = await openWorld();
    const journal = await world.open();
    const before = await journal.append(lines("a"));
    const old = await world.stream.last(journal.id);
    const after = await journal.append(lines("b"));
    let asked = 0;
    const stale = {
      ...world.stream,
      last: (id: string) => (++asked < 4 ? Promise.resolve(old) : world.stream.last(id)),
    };
    const reader = await openStreamReader(stale, journal.id);
    expect(await reader?.end(before)).toBe(before);
    expect(asked).toBe(1);
    expect(await reader?.end(after)).toBe(after);
    expect(asked).toBe(4);
  },
);

test.if(hasNats)("a reader stops at a gap, and names it", async () => {
  await using world = await openWorld();
  const journal = await world.open();
  const end = await journal.append(lines("a"));
  const { seq } = (await world.stream.last(journal.id))!;
  const beyond = encodeMessage(journal.id, end + 10, [lines("b")], Date.now());
  await world.stream.publish(journal.id, beyond, { expected: seq, writer: "damage" });
  const reader = (await openStreamReader(world.stream, journal.id))!;
  expect((await reader.read(0)).map(({ payload }) => payload.toString())).toEqual(["a\n"]);
  await expect(reader.read(end)).rejects.toThrow(
    `journal ${journal.id} of stream ${world.url.split("/").at(-1)} is damaged at byte ${end}: the next ` +
      `message begins at position ${end + 10}, and no server has what is before it`,
  );
});
