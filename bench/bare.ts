/**
 * The least that could do the work of server and client: whatever arrives is on the disk before the 201, and
 * nobody looks at it. All bodies of a turn of the event loop share a write and a sync, as in Daybook. The
 * sender posts a file in chunks of 1 MiB and reads one while the one before is in flight.
 *
 *     bun bench/bare.ts serve DIRECTORY      prints its URL
 *     bun bench/bare.ts send URL FILE        prints how many milliseconds it took
 */
import { fdatasync, openSync, write } from "node:fs";
import { promisify } from "node:util";

const CHUNK_BYTES = 1024 * 1024;
const [mode, where = "", path = ""] = Bun.argv.slice(2);

if (mode === "serve") {
  const fd = openSync(`${where}/bare.jsonl`, "a");
  const sync = promisify(fdatasync);
  const append = promisify(write);
  const waiting: { body: Uint8Array; done(): void }[] = [];
  let committing = false;
  const commitAll = async () => {
    committing = true;
    while (waiting.length > 0) {
      await new Promise((resolve) => setImmediate(resolve));
      const group = waiting.splice(0);
      const [first] = group;
      const bytes = group.length > 1 ? Buffer.concat(group.map(({ body }) => body)) : first?.body;
      if (!bytes) continue;
      for (let at = 0; at < bytes.length;) at += (await append(fd, bytes, at)).bytesWritten;
      await sync(fd);
      for (const { done } of group) done();
    }
    committing = false;
  };
  const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    async fetch(request) {
      const body = await request.bytes();
      await new Promise<void>((done) => {
        waiting.push({ body, done });
        if (!committing) void commitAll();
      });
      return new Response('{"message":"Event sent to process"}', { status: 201 });
    },
  });
  console.log(`http://127.0.0.1:${server.port}`);
} else {
  const startedMs = performance.now();
  const file = Bun.file(path);
  let next = file.slice(0, CHUNK_BYTES).bytes();
  for (let at = 0; at < file.size; at += CHUNK_BYTES) {
    const body = await next;
    const sent = fetch(`${where}/liveEvents`, { method: "POST", body });
    next = file.slice(at + CHUNK_BYTES, at + 2 * CHUNK_BYTES).bytes();
    if ((await sent).status !== 201) throw new Error("not accepted");
  }
  console.log(performance.now() - startedMs);
}
