/** `client.ts --follow` beside another client, and while the file is away. */
import { expect, setDefaultTimeout, test } from "bun:test";
import {
  appendFileSync,
  existsSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";

import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { openMeddler } from "../support/network.ts";
import { spawn, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const follow = (file: string, url: string) =>
  spawn("client.ts", { args: [file, "--follow"], env: { SERVER_URL: url } });

/** The files that a process has open; none where there is no /proc. */
function openFiles(pid: number): string[] {
  const folder = `/proc/${pid}/fd`;
  if (!existsSync(folder)) return [];
  return readdirSync(folder).flatMap((fd) => {
    try {
      return readlinkSync(`${folder}/${fd}`);
    } catch {
      return []; // closed meanwhile
    }
  });
}

test("a client that follows a file keeps its rejected lines once the client that did has ended", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  const journal = () => readFileSync(ledger.journal, "utf8");
  const file = ledger.write("a.jsonl", line("ann", 1));
  await using first = follow(file, app.url);
  await until(() => journal().includes('"ann"'));
  await using second = follow(file, app.url);
  await until(() => second.stderr.text().includes("another client sends it too"));
  first.kill("SIGTERM");
  expect(await first.exit()).toBe(0);
  // What comes next wakes it, and what follows is its own.
  appendFileSync(file, line("ben", 2));
  await until(() => journal().includes('"ben"'));
  appendFileSync(file, `bad\n${line("cid", 3)}`);
  await until(() => existsSync(`${file}.rejected.jsonl`));
  expect(readFileSync(`${file}.rejected.jsonl`, "utf8")).toContain('"text":"bad"');
  second.kill("SIGTERM");
  expect(await second.exit()).toBe(1);
  expect(second.stderr.text()).toContain(`1 line was rejected: see ${file}.rejected.jsonl`);
});

test("SIGTERM ends a client with 0 while the file that it follows is away", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({}, ["--no-processor"]);
  const journal = () => readFileSync(ledger.journal, "utf8");
  let patches = 0;
  await using proxy = await openMeddler(app.url, ({ method }) =>
    method === "PATCH" && ++patches === 2 ? { delayMs: 1_000 } : null,
  );
  const file = ledger.write("a.jsonl", line("ann", 1));
  await using client = follow(file, proxy.url);
  await until(() => journal().includes('"ann"'));
  // The last line of the old file is under way when the new one is removed again.
  renameSync(file, `${file}.1`);
  appendFileSync(`${file}.1`, line("ben", 1));
  writeFileSync(file, line("cid", 1));
  await until(() => patches === 2);
  rmSync(file);
  await until(() => journal().includes('"ben"'));
  await until(() => !openFiles(client.pid).includes(`${file}.1`)); // it waits for the next file
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(0);
  expect(journal()).not.toContain('"cid"');
});
