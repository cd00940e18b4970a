/**
 * What `client.ts` and `processor.ts FILE` do with files and pipes that are not plain lines of events: what
 * is compressed is read, what is something else is named, and bytes that are no event do not pass for sent.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { appendFileSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { gzipSync, zstdCompressSync } from "node:zlib";

import { line } from "../support/events.ts";
import { FOREIGN } from "../support/formats.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";

setDefaultTimeout(60_000);

const lines = (user: string, count: number) => line(user, 1).repeat(count);

test("a file in another format is named with the command that converts it, by client and processor, with exit code 2", async () => {
  await using ledger = await openLedger();
  const good = ledger.write("good.jsonl", line("ann", 1));
  const files = FOREIGN.map(([, bytes], i) => ledger.write(`${i}.jsonl`, bytes));
  const gz = ledger.write("array.gz", gzipSync('[{"userId":"ann"}]'));
  for (const ran of await Promise.all([
    ledger.send(good, ...files, gz),
    ledger.post(good, ...files, gz),
  ])) {
    expect(ran).toMatchObject({ code: 2, stdout: "" });
    const found = ran.stderr.trimEnd().split("\n");
    expect(found).toHaveLength(FOREIGN.length + 1);
    for (const [i, [format]] of FOREIGN.entries()) {
      expect(found[i]).toStartWith(
        `${files[i]}: this is not one event a line, but ${format}; convert it: `,
      );
      expect(found[i]).toEndWith(` > ${files[i]}.jsonl`);
    }
    expect(found.at(-1)).toEndWith(`: gzip -dc < ${gz} | jq -c '.[]' > ${gz}.jsonl`);
  }
  expect(await ledger.balances()).toEqual({});
  const [, utf16] = FOREIGN[0]!;
  const piped = await ledger.pipe(utf16);
  expect(piped.code).toBe(2);
  expect(piped.stderr).toEndWith("; pipe it through: iconv -f UTF-16 -t UTF-8\n");
});

test("a binary format that no common command converts, and a source that no path can name, are refused with exit code 2", async () => {
  using folder = tempDir();
  const parquet = folder.file("a.parquet");
  writeFileSync(parquet, "PAR1\0\0PAR1");
  for (const program of ["client.ts", "processor.ts"])
    expect(
      await run(program, { args: [parquet], env: { DATA_DIR: folder.file("data") } }),
    ).toMatchObject({
      code: 2,
      stderr: expect.stringContaining(
        `${parquet}: this is not one event a line, but Parquet; convert`,
      ),
    });
  const file = folder.file("a.jsonl");
  writeFileSync(file, line("ann", 1));
  for (const source of [".", "..", ""])
    expect(await run("client.ts", { args: ["--source", source, file] })).toMatchObject({
      code: 2,
      stderr: '--source requires a name of 1 to 256 bytes, not "." or ".."\n',
    });
});

test("bytes that remain give exit code 1: a cut line, or NULs, without which the file still counts once", async () => {
  await using ledger = await openLedger();
  for (const way of [ledger.send, ledger.post]) {
    const user = way === ledger.send ? "sent" : "posted";
    for (const [i, nuls] of [7, 200_000].entries()) {
      const file = ledger.write(`${user}${i}.jsonl`, lines(user, 2) + "\0".repeat(nuls));
      const ran = await way(file);
      expect(ran.code).toBe(1);
      expect(ran.stderr).toStartWith(
        `${file} ends with ${nuls} NUL bytes, as a crash leaves them: `,
      );
      const command = /tr -d .*$/m.exec(ran.stderr)?.[0] as string;
      expect(Bun.spawnSync(["sh", "-c", command]).exitCode).toBe(0);
      appendFileSync(file, line(user, 1));
      expect(await way(file)).toMatchObject({ code: 0, stderr: "" });
    }
    const cut = ledger.write(`${user}.jsonl`, line(user, 1) + line(user, 1).slice(0, 10));
    expect((await way(cut)).code).toBe(1);
    expect((await way(cut)).code).toBe(1); // nothing new, and still not everything
  }
  expect((await ledger.pipe(line("sent", 1) + '{"userId":')).code).toBe(1);
  expect(await ledger.posted()).toEqual({ sent: "8", posted: "7" });
});

test("gzip and zstd files are sent and posted, and count once with their plain file, however they are compressed", async () => {
  await using ledger = await openLedger();
  for (const [way, user] of [
    [ledger.send, "sent"],
    [ledger.post, "posted"],
  ] as const) {
    const [one, two] = [lines(user, 30_000), lines(user, 10)];
    const members = Buffer.concat([gzipSync(one), gzipSync(two)]);
    expect(await way(ledger.write(`${user}.jsonl.gz`, members))).toMatchObject({
      code: 0,
      stderr: "",
    });
    const frames = Buffer.concat([zstdCompressSync(one), zstdCompressSync(two)]);
    for (const [name, bytes] of [
      [`b/${user}.jsonl.gz`, gzipSync(one + two)],
      [`${user}.jsonl.zst`, frames],
      [`${user}.jsonl`, one + two],
    ] as const) {
      const again = await way(ledger.write(name, bytes));
      expect(again).toMatchObject({ code: 0, stderr: "" });
      expect(again.stdout).toMatch(/^(sent|posted) 0 events /);
    }
    const grown = ledger.write(`${user}.jsonl.gz`, Buffer.concat([members, gzipSync(two)]));
    expect((await way(grown)).stdout).toMatch(/^(sent|posted) 10 events /);
  }
  expect(await ledger.posted()).toEqual({ sent: "30020", posted: "30020" });
  const verified = await ledger.post("--verify", ledger.path("posted.jsonl.gz"));
  expect(verified).toMatchObject({ code: 0 });
});

test("a damaged compressed file is named with exit code 3, and counts once when its whole is sent", async () => {
  await using ledger = await openLedger();
  const text = Array.from({ length: 60_000 }, (_, i) => line(`user${i % 9}`, i)).join("");
  for (const [name, whole] of [
    ["a.gz", gzipSync(text)],
    ["b.zst", zstdCompressSync(text)],
  ] as const)
    for (const [folder, way] of [
      ["s", ledger.send],
      ["p", ledger.post],
    ] as const) {
      const file = ledger.write(`${folder}-${name}`, whole.subarray(0, whole.length - 20));
      const ran = await way(file);
      expect(ran.code).toBe(3);
      expect(ran.stderr).toContain(
        `${file}: the ${name === "a.gz" ? "gzip" : "zstd"} data is damaged: `,
      );
      ledger.write(`${folder}-${name}`, whole);
      expect((await way(file)).code).toBe(0);
    }
  const sum = Object.values(await ledger.posted()).reduce((sum, each) => sum + Number(each), 0);
  expect(sum).toBe((4 * (60_000 * 59_999)) / 2);
});

test("several files and pipes are sent one after the other; the summary counts them together", async () => {
  await using ledger = await openLedger();
  const fifo = ledger.path("fifo");
  Bun.spawnSync(["mkfifo", fifo]);
  const [one, two] = [
    ledger.write("1.jsonl", line("ann", 1)),
    ledger.write("2.jsonl", "bad\n" + line("ann", 2)),
  ];
  const writer = Bun.spawn(["sh", "-c", `cat > ${fifo}`], { stdin: gzipSync(line("ben", 3)) });
  const ran = await run("client.ts", {
    ...ledger.client,
    args: [one, "-", fifo, two],
    stdin: zstdCompressSync(line("cid", 4)),
  });
  await writer.exited;
  expect(ran.code).toBe(1);
  expect(ran.stdout).toStartWith("sent 4 events (1 rejected) from 4 files: ");
  expect(await ledger.posted()).toEqual({ ann: "3", ben: "3", cid: "4" });
  expect(readFileSync(`${two}.rejected.jsonl`, "utf8")).toContain('"text":"bad"');
});

test("--follow awaits a cut line and NULs, and reports those of a file that was rotated away", async () => {
  await using ledger = await openLedger();
  const file = ledger.write("a.jsonl", line("ann", 1) + "\0".repeat(100_000));
  await using client = spawn("client.ts", { ...ledger.client, args: [file, "--follow"] });
  await until(() => ledger.journal().includes('"ann"'));
  writeFileSync(file, line("ann", 1) + line("ben", 2) + '{"userId":"cid"');
  await until(() => ledger.journal().includes('"ben"'));
  client.kill("SIGTERM");
  expect(await client.exit()).toBe(0);
  expect(client.stderr.text()).toBe("");

  await using next = spawn("client.ts", { ...ledger.client, args: [file, "--follow"] });
  appendFileSync(file, `,"name":"add_revenue","value":3}\n{"userId":"eve"`);
  await until(() => ledger.journal().includes('"cid"'));
  renameSync(file, `${file}.1`);
  writeFileSync(file, line("dan", 4));
  await until(() => ledger.journal().includes('"dan"'));
  next.kill("SIGTERM");
  expect(await next.exit()).toBe(1);
  expect(next.stderr.text()).toBe(
    `${file}: line 4 has no newline and is not a complete event: not sent\n`,
  );
});

async function openLedger() {
  const database = await testDatabase();
  const folder = tempDir();
  const dataDir = folder.file("data");
  const app = await startApp({ dataDir, databaseUrl: database.url });
  const client = { cwd: folder.path, env: { SERVER_URL: app.url } };
  const env = { DATA_DIR: dataDir, DATABASE_URL: database.url };
  return {
    client,
    path: folder.file,
    write(name: string, content: string | Uint8Array) {
      const path = folder.file(name);
      Bun.spawnSync(["mkdir", "-p", path.slice(0, path.lastIndexOf("/"))]);
      writeFileSync(path, content);
      return path;
    },
    send: (...args: string[]) => run("client.ts", { ...client, args }),
    pipe: (stdin: string | Uint8Array) => run("client.ts", { ...client, args: ["-"], stdin }),
    post: (...args: string[]) => run("processor.ts", { env, args }),
    journal: () => readFileSync(`${dataDir}/eventsPost.jsonl`, "utf8"),
    balances: () => balances(database.url),
    /** The balances once everything sent is posted. */
    async posted() {
      const empty = folder.file("wait.jsonl");
      writeFileSync(empty, line("wait", 0));
      expect((await run("client.ts", { ...client, args: [empty, "--wait"] })).code).toBe(0);
      const { wait, ...others } = await balances(database.url);
      expect(wait).toBe("0");
      return others;
    },
    async [Symbol.asyncDispose]() {
      await app[Symbol.asyncDispose]();
      folder[Symbol.dispose]();
      await database.drop();
    },
  };
}
