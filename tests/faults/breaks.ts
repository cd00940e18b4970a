/**
 * The suite is tested by breaking the program: each break takes one promise away, in a copy, and the
 * named tests must turn red. Prints the table; returns 1 when a break went unnoticed.
 */
import { mkdirSync } from "node:fs";

import { type Alteration, alteredCopy, removeTemporary } from "./altered.ts";

const LANES = 2;

interface Break extends Alteration {
  what: string;
  /** The tests that must notice. */
  tests: string[];
}

/** In `file`, `find` becomes `put`. */
const inFile =
  (file: string) =>
  (what: string, find: string, put: string, ...tests: string[]): Break => ({
    ...{ what, file, find, put },
    tests: tests.length > 0 ? tests : ["tests/faults/disk.test.ts"],
  });
const journal = inFile("lib/journal/writer.ts");
const ledger = inFile("lib/ledger/ledger.ts");
const client = inFile("client.ts");

export const BREAKS: readonly Break[] = [
  journal("the sync of a frame", "      await sync();\n", ""),
  journal(
    "the answer after the sync",
    "      await write(frame);\n",
    "for (const { resolve } of group) resolve(base + end); await write(frame);\n",
  ),
  journal(
    "the sync of the directory at the start",
    "  await disk.syncDirectory(dirname(path));\n  return { id: header.id",
    "  return { id: header.id",
  ),
  journal("the sync of the next file", "      await next.sync();\n", ""),
  journal(
    "the sync of the directory between two renames",
    "      await disk.syncDirectory(dirname(path));\n      await disk.rename(nextPath, path);",
    "      await disk.rename(nextPath, path);",
  ),
  journal(
    "the sync of the directory behind them",
    "      await disk.syncDirectory(dirname(path));\n      await file.close();",
    "      await file.close();",
  ),
  journal("the base of the file after a rotation that died", "last?.to ?? 0", "0"),
  journal(
    "the cutting of a torn tail",
    "      await file.truncate(end);\n    }\n  }",
    "    }\n  }",
  ),
  journal(
    "the taking back of what found no room",
    '      await file.truncate(end).catch((error) => {\n        throw fail("truncate", String(error));\n      });\n      throw failure;',
    "      throw failure;",
    "tests/journal/writer.test.ts",
  ),
  journal(
    "the end after a failed sync",
    '      const failure = fail("sync", codeOf(error));\n',
    "      const failure = error;\n",
    "tests/journal/writer.test.ts",
  ),
  journal(
    "the lock of the writer",
    "if (!lock) throw",
    "if (false) throw",
    "tests/settings.test.ts",
    "tests/journal/writer.test.ts",
  ),
  {
    what: "the checksum of a frame",
    file: "lib/journal/format.ts",
    find: "if (sum !== parseInt(match[2] as string, 16))",
    put: "if (false)",
    tests: ["tests/faults/tail.test.ts", "tests/faults/fuzz.test.ts"],
  },
  {
    what: "the reader's look at the header after it has read",
    file: "lib/journal/reader.ts",
    find: "if (!place.to && (await readHeader())?.base !== place.base) continue;",
    put: "",
    tests: ["tests/journal/rotation.test.ts"],
  },
  {
    what: "the reader's own sync before a posting",
    file: "lib/processor/batches.ts",
    find: "      await journal.sync();\n",
    put: "",
    tests: ["tests/journal/rotation.test.ts"],
  },
  {
    what: "the look at the last frame that was posted",
    file: "lib/processor/batches.ts",
    find: "last?.header !== header",
    put: "false",
    tests: ["tests/processor/check.test.ts"],
  },
  ledger(
    "the look at the checkpoint under its lock",
    'if (Number(checkpoint?.position) !== from) return { state: "elsewhere" };',
    "",
    "tests/processor/processor.test.ts",
    "tests/faults/process.test.ts",
  ),
  ledger(
    "the fence in the statement",
    "and checkpoint.position = move.begins",
    "",
    "tests/ledger/ledger.test.ts",
  ),
  ledger(
    "the claim of ids",
    "join claimed using (id) where fresh",
    "join claimed using (id)",
    "tests/processor/ids.test.ts",
  ),
  ledger(
    "the addition to what is there",
    "revenue = balance.revenue + excluded.revenue",
    "revenue = excluded.revenue",
    "tests/processor/processor.test.ts",
  ),
  {
    what: "the position of a source",
    file: "lib/processor/fold.ts",
    find: "if (ends > postedTo) return true;",
    put: "return true;",
    tests: ["tests/server/sources.test.ts"],
  },
  {
    what: "the quarantine",
    file: "lib/processor/fold.ts",
    find: "return this.quarantine(line, position, decoded.reason);",
    put: "return;",
    tests: ["tests/processor/processor.test.ts"],
  },
  {
    what: "the digits as written",
    file: "lib/event/event.ts",
    find: 'const written = values.find(({ holder }) => holder === event)?.written ?? "";',
    put: "const written = `${value}`;",
    tests: ["tests/unit/event.test.ts"],
  },
  inFile("lib/server/auth.ts")(
    "the comparison of secrets",
    "if (timingSafeEqual(secret, presented)) found = true;",
    "found = true;",
    "tests/server/http.test.ts",
  ),
  inFile("lib/server/auth.ts")(
    "the scopes of a token",
    "if (!claims.scopes.includes(scope) && !isOwn)",
    "if (false)",
    "tests/server/auth.test.ts",
  ),
  inFile("lib/server/token.ts")(
    "the algorithm that is given by the settings",
    'algorithms: secret ? ["HS256"] : KEY_ALGORITHMS,',
    "",
    "tests/server/auth.test.ts",
  ),
  inFile("lib/server/token.ts")(
    "the expiry that a token must have",
    'requiredClaims: ["exp"],',
    "",
    "tests/server/auth.test.ts",
  ),
  {
    what: "the 409 of a source that stands elsewhere",
    file: "lib/server/sources.ts",
    find: "if (taken.offset !== from) return taken;",
    put: "",
    tests: ["tests/server/sources.test.ts"],
  },
  journal(
    "the file's going back after a failed sync",
    "      await file.truncate(end).catch(() => {});\n",
    "",
  ),
  journal(
    "the look whether somebody changed the file",
    'if (!file.is(path, end + frame.length)) throw fail("go on with", "somebody changed the file");',
    "",
    "tests/journal/writer.test.ts",
  ),
  journal(
    "the waiting for commits when it closes",
    "while (committing) await committing;",
    "",
    "tests/faults/disk.test.ts",
  ),
  journal(
    "the position before a header that no frame follows",
    "(hasFrames() ? base + end : base)",
    "base + end",
    "tests/journal/rotation.test.ts",
    "tests/processor/ids.test.ts",
  ),
  journal(
    "the closing of the next file when a rotation fails",
    "      await next.close().catch(() => {});\n",
    "",
    "tests/journal/writer.test.ts",
  ),
  inFile("lib/journal/disk.ts")(
    "the room that is left to the private Postgres",
    "if (blocks > 0 && bavail * bsize - bytes.length < left)",
    "if (false)",
    "tests/faults/full.test.ts",
  ),
  journal(
    "the place of the frames at the end of a large file",
    "    from += skip;\n",
    "",
    "tests/journal/writer.test.ts",
  ),
  inFile("lib/journal/disk.ts")(
    "the system's sync of a file",
    "sync: () => syncData(handle.fd),",
    "sync: async () => {},",
    "tests/journal/writer.test.ts",
  ),
  inFile("lib/journal/disk.ts")(
    "the system's sync of a directory",
    "withHandle(path, (fd) => syncAll(fd)),",
    "withHandle(path, async () => {}),",
    "tests/journal/writer.test.ts",
  ),
  inFile("lib/journal/disk.ts")(
    "the system's sync of what another process wrote",
    "withHandle(path, (fd) => syncData(fd)),",
    "withHandle(path, async () => {}),",
    "tests/journal/writer.test.ts",
  ),
  inFile("lib/journal/disk.ts")(
    "the sync of a folder that is made",
    "      await disk.syncDirectory(dirname(at));\n",
    "",
    "tests/journal/writer.test.ts",
  ),
  inFile("lib/journal/repair.ts")(
    "the sync of a file that is mended",
    "  await repaired.sync();\n",
    "",
    "tests/faults/disk.test.ts",
  ),
  inFile("lib/journal/repair.ts")(
    "the sync of what is moved aside",
    "  await file.sync();\n",
    "",
    "tests/faults/disk.test.ts",
  ),
  inFile("lib/processor/retention.ts")(
    "the age of a segment that goes",
    "    if (ageMs < keepDays * DAY_MS) break;\n",
    "",
    "tests/processor/verify.test.ts",
  ),
  inFile("lib/ledger/database.ts")(
    "what passes by itself",
    "/^(08|40|53|55|57|58)|^XX000$/",
    "/^(08|57)/",
    "tests/faults/postgres.test.ts",
  ),
  inFile("lib/ledger/reconcile.ts")(
    "the table in which a tally goes on",
    "    [table, other] = [other, table];\n",
    "",
    "tests/processor/verify.test.ts",
  ),
  inFile("lib/ledger/reconcile.ts")(
    "the comparison of what was counted again",
    "where tally.revenue is distinct from balance.revenue",
    "where false",
    "tests/processor/verify.test.ts",
  ),
  inFile("lib/ledger/reconcile.ts")(
    "the addition of what a rebuild corrects",
    `order by user_id collate "C"
      on conflict (user_id) do update set revenue = balance.revenue + excluded.revenue`,
    `order by user_id collate "C"
      on conflict (user_id) do update set revenue = excluded.revenue`,
    "tests/processor/verify.test.ts",
  ),
  ledger(
    "the note of events that came before",
    "from (select *, turn - row_number() over (order by turn) as island from late where is_same) as late",
    "from (select *, 0 as island from late where false) as late",
    "tests/processor/verify.test.ts",
  ),
  inFile("lib/processor/batches.ts")(
    "the look at the ledger once it can be asked",
    "if (stop.aborted) return;",
    "return;",
    "tests/processor/check.test.ts",
  ),
  inFile("lib/processor/supervisor.ts")(
    "the word of what ended the processor's thread",
    "return error ?? (",
    "return (",
    "tests/faults/process.test.ts",
  ),
  inFile("lib/processor/check.ts")(
    "the ledger's word on a torn tail that it has posted",
    "if (base + from < posted) damage.push",
    "if (false) damage.push",
    "tests/processor/check.test.ts",
  ),
  inFile("lib/processor/check.ts")(
    "the two halves of a damage that is posted in part",
    "      splitAt(file, checkpoint?.position ?? 0);\n",
    "",
    "tests/processor/repair.test.ts",
  ),
  inFile("lib/processor/check.ts")(
    "the ledger's letting go of a frame before it is repaired",
    "if (isLost) await forgetDigest",
    "if (false) await forgetDigest",
    "tests/processor/repair.test.ts",
  ),
  inFile("lib/journal/check.ts")(
    "the rule by which a tail is torn",
    'const mayBeTorn = rest === "short" || !rest.behind;',
    "const mayBeTorn = true;",
    "tests/processor/repair.test.ts",
  ),
  inFile("lib/processor/retention.ts")(
    "the last file that says which journal it is",
    "if ((await disk.size(path)) === 0) files.pop();",
    "",
    "tests/processor/repair.test.ts",
  ),
  inFile("lib/processor/quarantine.ts")(
    "the leaving of the quarantine with the posting",
    "delete from quarantine where source = ${source} and position = ${position} returning 1",
    "select 1",
    "tests/server/event-types.test.ts",
    "tests/processor/verify.test.ts",
  ),
  inFile("lib/journal/format.ts")(
    "the checksum in a journal's name",
    "|| !isJournalId(match[1] as string)",
    "",
    "tests/faults/tail.test.ts",
  ),
  inFile("lib/journal/reader.ts")(
    "the reader's look at what comes before the active file",
    "!isRenamed && (last.id",
    "false && (last.id",
    "tests/faults/tail.test.ts",
  ),
  inFile("lib/processor/batches.ts")(
    "the look whether the writer has taken back what was read",
    "if ((await journal.end()) < position)",
    "if (false)",
    "tests/journal/rotation.test.ts",
  ),
  inFile("lib/processor/retention.ts")(
    "the keeping of segments that are not posted",
    "|| segment.to > posted",
    "",
    "tests/processor/verify.test.ts",
  ),
  inFile("lib/processor/retention.ts")(
    "the snapshot before a segment goes",
    "if (!(await snapshotUpTo(database, journal, segment.to))) break;",
    "",
    "tests/processor/verify.test.ts",
  ),
  ledger(
    "the division by zero where a checkpoint has moved",
    "1 / (count(*) = ${moves.length})::int",
    "1",
    "tests/ledger/ledger.test.ts",
  ),
  ledger(
    "the look at the sources under their locks",
    "if (posted.get(source) !== from) return posted;",
    "",
    "tests/server/sources.test.ts",
  ),
  inFile("lib/processor/posting.ts")(
    "the counting of a batch whose answer was lost",
    "if (sent && batches.from === sent.to)",
    "if (false)",
    "tests/faults/postgres.test.ts",
  ),
  inFile("lib/ledger/database.ts")(
    "the deadline of a statement",
    "return await Promise.race([result, deadline]);",
    "return await result;",
    "tests/faults/postgres.test.ts",
  ),
  inFile("lib/processor/supervisor.ts")(
    "the next life of a processor that died",
    "setTimeout(() => (stopping ? end() : start()), pauseMs);",
    "",
    "tests/faults/process.test.ts",
  ),
  inFile("lib/processor/file-batches.ts")(
    "the digest of a file's posted bytes",
    'if (here.copy().digest("hex") === digest)',
    "if (true)",
    "tests/processor/processor.test.ts",
  ),
  client(
    "the server's word on a piece whose answer was not heard",
    "    if (piece && taken) await judge(remote, source, piece, rejected);\n",
    "",
    "tests/client/client.test.ts",
  ),
  client(
    "the position of what another client has sent",
    "          total.position = stand.position;\n",
    "",
    "tests/client/client.test.ts",
  ),
  client(
    "the digest of a file's taken bytes",
    'if (passed.hash.copy().digest("hex") !== one.taken.digest) continue;',
    "",
    "tests/client/client.test.ts",
  ),
  client(
    "the digest of what another client has sent",
    'return at.hash.copy().digest("hex") === stand.digest ? at : null;',
    "return at;",
    "tests/client/client.test.ts",
  ),
  inFile("lib/client/rejected.ts")(
    "the place of the last rejected line that is kept",
    "message === undefined || at <= last",
    "message === undefined",
    "tests/client/client.test.ts",
  ),
  inFile("lib/event/scanner.ts")(
    "the scanner's look at UTF-8",
    "if (!isAscii && !isUtf8(bytes.subarray(from, at))) return -1;",
    "",
    "tests/unit/scanner.test.ts",
  ),
  inFile("lib/event/scanner.ts")(
    "the most digits that the scanner takes",
    "if ((whole === 0 ? 0 : digits) + decimals > SIGNIFICANT_DIGITS) return -1;",
    "",
    "tests/unit/scanner.test.ts",
  ),
  inFile("lib/event/sums.ts")(
    "the bytes of users with the same hash",
    " && this.isUser(row, bytes, from, to)",
    "",
    "tests/unit/scanner.test.ts",
  ),
  inFile("lib/event/sums.ts")(
    "the sums that are too large for a double",
    "if (sum < MAX_WHOLE && sum > -MAX_WHOLE) return;",
    "return;",
    "tests/unit/scanner.test.ts",
  ),
  inFile("lib/server/body.ts")(
    "the end of a zstd body",
    'if (least === null) throw new Problem(400, "the body is not whole zstd");',
    "if (least === null) return decompress(bytes, { maxOutputLength: MAX_EVENTS_BYTES });",
    "tests/server/http.test.ts",
  ),
  inFile("lib/event/event.ts")(
    "the user that Postgres cannot keep",
    'typeof userId !== "string" || !isUserId(userId)',
    'typeof userId !== "string"',
    "tests/unit/event.test.ts",
  ),
  inFile("lib/progress.ts")(
    "the padding of the time that is left",
    '{ autopaddingChar: "" }',
    "{ autopadding: false }",
    "tests/client/progress.test.ts",
  ),
  inFile("lib/server/throttle.ts")(
    "the free failures of a server that has just begun",
    "paidMs.get(address) ?? free",
    "paidMs.get(address) ?? 0",
    "tests/server/auth.test.ts",
  ),
];

/** Tries the breaks whose names contain `named`. */
export async function tryBreaks(named = ""): Promise<number> {
  const chosen = BREAKS.filter(({ what }) => what.includes(named));
  const waiting = [...chosen];
  let unnoticed = 0;
  const lane = async () => {
    for (let one = waiting.shift(); one; one = waiting.shift())
      if (!(await isNoticed(one))) unnoticed++;
  };
  console.log("without …, these tests turn red:");
  await Promise.all(Array.from({ length: LANES }, lane));
  console.log(`${chosen.length} breaks, ${unnoticed} unnoticed`);
  return unnoticed > 0 || chosen.length === 0 ? 1 : 0;
}

async function isNoticed(one: Break): Promise<boolean> {
  const began = performance.now();
  const broken = await tryTests([one], ["--bail", ...one.tests]);
  const { test } = broken;
  // A copy that does not even load would be red as well; so would a test that fails now and then.
  const name = test
    ?.split(" > ")
    .at(-1)
    ?.replace(/[^\w ]/g, ".");
  const whole = name ? await tryTests([], [...one.tests, "-t", name]) : null;
  const verdict = broken.passed || !test ? "GREEN" : whole?.passed ? "red" : "RED ANYWAY";
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const told = test ?? broken.stderr.slice(-300);
  console.log(`${verdict.padEnd(5)} ${one.what} | ${told} | ${seconds} s`);
  return verdict === "red";
}

/** Runs `bun test ARGS` in a copy with these alterations; `test` is the first that failed. */
async function tryTests(alterations: Alteration[], args: string[]) {
  using copy = alteredCopy(alterations);
  // What a test that is given up leaves goes with the copy.
  const temporary = `${copy.path}/tmp`;
  mkdirSync(temporary);
  const child = Bun.spawn([process.execPath, "test", ...args], {
    cwd: copy.path,
    env: { ...process.env, TMPDIR: temporary },
    stdio: ["ignore", "pipe", "pipe"],
    detached: true,
  });
  groups.add(child.pid);
  const [stderr] = await Promise.all([
    new Response(child.stderr).text(),
    new Response(child.stdout).text(),
  ]);
  const passed = (await child.exited) === 0;
  killGroup(child.pid); // a test that is given up leaves its processes
  groups.delete(child.pid);
  removeTemporary(temporary);
  const [, test] = /^\(fail\) (.*?)(?: \[[\d.]+ms\])?$/m.exec(stderr) ?? [];
  return { passed, test, stderr };
}

/** What runs with `detached`: a signal to us does not reach it. */
export const groups = new Set<number>();

/** Kills what was started with `detached`, and all that it has started. */
export function killGroup(pid: number): void {
  try {
    process.kill(-pid, "SIGKILL");
  } catch {
    // all gone
  }
}
