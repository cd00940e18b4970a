/**
 * `bun run faults --soak HOURS [--out DIR]`: everything at once, on one ledger. Three servers accept about
 * 900 events a second from every kind of sender (soak-load.ts), while
 *
 * - one server, its two processors and a client that follows a file are killed and stopped every few seconds;
 * - connections to Postgres are cut;
 * - the disk of another server fills up;
 * - the clocks of a server and of Postgres step by minutes, hours and days in both directions;
 * - the ledger's day moves, so that ids, segments and points grow old: segments are removed all the time;
 * - viewers read every page, and hang up.
 *
 * One server and one processor are never killed. Their memory, descriptors and threads, those of Postgres,
 * temporary files and the bloat of tables are compared between the second and the last quarter. Of
 * processes that are killed only those of a like age are compared.
 *
 * In the end each balance must be what the oracle says, the points of `/revenue` must add up to the sum of
 * balances, `--verify` must find nothing, and every program must stop with exit code 0.
 */
import { appendFileSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import postgres from "postgres";

import { moveDay, readDay } from "../../lib/ledger/boundary.ts";
import { openDatabase } from "../../lib/ledger/database.ts";
import { openTestCluster } from "../support/cluster.ts";
import { openProxy } from "../support/network.ts";
import { closedPort, run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { load, openCounts, openOracle, view } from "./soak-load.ts";
import {
  countFiles,
  format,
  holdsLock,
  judge,
  plot,
  readPostgres,
  readProcess,
  readTables,
  type Sample,
  type Unit,
  type Verdict,
} from "./soak-watch.ts";

const FAKETIME = `/usr/lib/${process.arch === "x64" ? "x86_64" : "aarch64"}-linux-gnu/faketime/libfaketime.so.1`;
/** Processes that are killed are compared while they are this old: they live for ten seconds or so. */
const LIKE_AGE_S = { from: 5, to: 10 };
const STEPS_S = [0, 70, -70, 3_700, -3_700, 90_000, -90_000, 8_640_000, -8_640_000];
const ID_DAYS = "2";

type Program = ReturnType<typeof spawn>;

/** Runs the soak; returns the exit code. `out` is the folder for samples and plot. */
export async function soak(hours: number, out: string): Promise<number> {
  const lengthS = hours * 3600;
  const failures: string[] = [];
  const counts = openCounts();
  const oracle = openOracle();
  const stopping = new AbortController();
  const { signal: stop } = stopping;
  mkdirSync(out, { recursive: true });
  console.log(`soak: ${hours} hours; samples and plot in ${out}`);
  const startedMs = performance.now();
  const spentS = () => (performance.now() - startedMs) / 1000;
  const fail = (what: string) => {
    counts.add("failures");
    if (failures.length < 100) failures.push(what);
    console.log(`${new Date().toTimeString().slice(0, 8)} FAILED: ${what}`);
  };

  using dir = tempDir();
  const live = new Set<Program>();
  process.on("exit", () => live.forEach((program) => program.kill("SIGKILL")));
  const cluster = await openTestCluster(dir.file("postgres"));
  const sql = postgres(cluster.url(), { max: 2, fetch_types: false, onnotice: () => {} });
  await using proxy = await openProxy(cluster.url());
  const clock = await openClocks(cluster.url(), sql, dir.file("clock"));
  mkdirSync(dir.file("temporary"));
  using disk = mountSmall(dir.file("small"));
  const common = {
    DATABASE_URL: proxy.url,
    ID_DAYS,
    LOG_LEVEL: "error",
    TMPDIR: dir.file("temporary"),
    JOURNAL_SEGMENT_BYTES: "500000",
  };
  const steadyEnv = { ...common, DATA_DIR: dir.file("steady"), JOURNAL_KEEP_DAYS: "1" };
  const killedEnv = { ...common, DATA_DIR: dir.file("killed"), JOURNAL_KEEP_DAYS: "0" };
  const smallEnv = { ...common, DATA_DIR: dir.file("small"), JOURNAL_KEEP_DAYS: "0" };
  const keep = <P extends Program>(program: P): P => {
    live.add(program);
    void program.child.exited.then(() => live.delete(program));
    return program;
  };
  const server = async (env: Record<string, string>, args: string[] = []) =>
    keep(await startApp({ dataDir: env["DATA_DIR"] as string, databaseUrl: proxy.url, env, args }));
  const processor = (env: Record<string, string>) => keep(spawn("processor.ts", { env }));

  const port = `${await closedPort()}`;
  const steady = await server(steadyEnv, ["--no-processor"]);
  const small = await server(smallEnv);
  const steadyProcessor = processor(steadyEnv);
  const killedUrl = `http://127.0.0.1:${port}`;
  const startFollower = () =>
    keep(
      spawn("client.ts", {
        args: ["--follow", "--retry-for", "1h", dir.file("followed.jsonl")],
        env: { SERVER_URL: killedUrl },
      }),
    );
  writeFileSync(dir.file("followed.jsonl"), "");
  const killed = await Promise.all([
    openVictim("server", () =>
      server({ ...killedEnv, ...clock.env, PORT: port }, ["--no-processor"]),
    ),
    openVictim("processor", () => processor(killedEnv)),
    openVictim("processor", () => processor(killedEnv)),
    openVictim("client", startFollower),
  ]);
  const steadies = { server: steady, processor: steadyProcessor, "server with processor": small };

  const measures = new Map<string, { unit: Unit; samples: Sample[] }>();
  const world = {
    steady: steady.url,
    killed: killedUrl,
    small: small.url,
    start: (program: string, args: string[], env: Record<string, string> = {}) =>
      keep(spawn(program, { args, env: { ...common, DATA_DIR: dir.file("posting"), ...env } })),
    file: dir.file,
    fail,
    stop,
  };
  const everything = Promise.all([
    watch(),
    load(world, oracle, counts),
    view(world, counts),
    every(2_000, 5_000, killOne),
    every(10_000, 25_000, cut),
    every(15_000, 25_000, stepClocks),
    every(...around(Math.max(30_000, lengthS * 50)), moveLedgerDay),
    ...(disk ? [every(20_000, 60_000, fillDisk)] : []),
  ]);
  await Promise.race([everything, Bun.sleep(startedMs + lengthS * 1000 - performance.now())]);
  stopping.abort();
  await everything;
  await settle();
  await checkEnd();
  await sql.end({ timeout: 1 });
  await cluster.close();
  return report();

  /** A process that is killed and started again. */
  async function openVictim(name: string, start: () => Program | Promise<Program>) {
    const victim = {
      name,
      program: await start(),
      bornS: spentS(),
      async kill() {
        const { program } = victim;
        if (program.child.exitCode !== null)
          fail(
            `a ${name} ended by itself with ${program.child.exitCode}: ${program.stderr.text()}`,
          );
        const signal = Math.random() < 0.7 ? "SIGKILL" : "SIGTERM";
        program.kill(signal);
        const late = setTimeout(() => (program.kill("SIGKILL"), counts.add("late stops")), 30_000);
        const code = await program.exit();
        clearTimeout(late);
        const wanted = name === "client" ? [0, 1, 143] : [0];
        if (signal === "SIGTERM" && !wanted.includes(code ?? -1))
          fail(`a ${name} ends with ${code} on SIGTERM: ${program.stderr.text().slice(-1_000)}`);
        counts.add(`${signal} of the ${name}`);
        if (signal === "SIGKILL" && name !== "client") counts.add("kill -9 of server or processor");
        counts.add("kills and stops");
        await Bun.sleep(Math.random() * 300);
        victim.program = await start();
        victim.bornS = spentS();
      },
    };
    return victim;
  }

  /** Calls `act` until the end, with pauses between these times. */
  async function every(minMs: number, maxMs: number, act: () => Promise<void>): Promise<void> {
    while (!stop.aborted) {
      await until(() => stop.aborted, minMs + Math.random() * (maxMs - minMs), 100).catch(() => {});
      if (!stop.aborted) await act().catch((error: Error) => fail(`${act.name}: ${error.stack}`));
    }
  }

  async function killOne() {
    await killed[Math.floor(Math.random() * killed.length)]?.kill();
  }

  async function cut() {
    proxy.cut();
    await Bun.sleep(Math.random() * 3_000);
    proxy.mend();
    counts.add("times that Postgres was cut off");
  }

  async function stepClocks() {
    await clock.step();
    counts.add("clock steps");
  }

  async function moveLedgerDay() {
    await clock.moveDay();
    counts.add("days of the ledger");
  }

  async function fillDisk() {
    if (!disk) return;
    const before = counts.get("answers 507");
    const isFull = () => {
      disk.fill(); // again: a segment may be removed meanwhile
      return stop.aborted || counts.get("answers 507") > before;
    };
    await until(isFull, 30_000);
    disk.makeRoom();
    const ready = async () =>
      (await fetch(`${small.url}/readyz`).catch(() => null))?.status === 200;
    await until(async () => stop.aborted || (await ready()), 60_000);
    counts.add("times that a disk was full");
  }

  /** Samples every measure until the end. */
  async function watch() {
    const pauseMs = Math.min(10_000, Math.max(500, lengthS * 2));
    const postmaster = Number(
      readFileSync(dir.file("postgres/cluster/postmaster.pid"), "utf8").split("\n")[0],
    );
    for (let sample = 0; !stop.aborted; sample++) {
      const found: [string, Unit, number][] = [];
      const look = (name: string, pid: number) => {
        const state = readProcess(pid);
        if (!state) return;
        found.push([`${name}: memory`, "MiB", state.mib]);
        found.push([`${name}: descriptors`, "count", state.descriptors]);
        found.push([`${name}: threads`, "count", state.threads]);
      };
      for (const [name, { pid, child }] of Object.entries(steadies)) {
        if (child.exitCode !== null) return fail(`the ${name} that is never killed has ended`);
        look(name, pid);
      }
      for (const { name, program, bornS } of killed) {
        const ageS = spentS() - bornS;
        if (ageS < LIKE_AGE_S.from || ageS >= LIKE_AGE_S.to) continue;
        // One of the processors waits for the other one, and needs half the memory.
        if (name !== "processor" || holdsLock(program.pid)) look(`killed ${name}`, program.pid);
      }
      const ofPostgres = readPostgres(postmaster);
      found.push(["Postgres: memory", "MiB", ofPostgres.mib]);
      found.push(["Postgres: descriptors", "count", ofPostgres.descriptors]);
      found.push(["Postgres: processes", "count", ofPostgres.processes]);
      const temporary =
        countFiles(dir.file("temporary"), true) +
        countFiles(dir.file("posting"), true) +
        countFiles(dir.file("postgres/cluster/base/pgsql_tmp"));
      found.push(["temporary files", "count", temporary]);
      found.push(["files of the killed journal", "count", countFiles(dir.file("killed"))]);
      for (const { name, bytes, rows } of await readTables(sql)) {
        // Below a thousand rows, a page more is a large share.
        if (rows >= 1_000) found.push([`table ${name}`, "bytes/row", bytes / rows]);
        else found.push([`table ${name} (small)`, "KiB", bytes / 1024]);
      }
      const atS = spentS();
      for (const [name, unit, value] of found) {
        const measure = measures.get(name) ?? { unit, samples: [] };
        measures.set(name, measure);
        measure.samples.push([atS, value]);
      }
      const line = Object.fromEntries(found.map(([name, , value]) => [name, value]));
      appendFileSync(join(out, "samples.ndjson"), `${JSON.stringify({ atS, ...line })}\n`);
      const { events } = oracle.figures();
      if (sample % 30 === 0)
        console.log(
          `${atS.toFixed(0)} s: ${events} events, ${counts.get("kills and stops")} kills`,
        );
      await until(() => stop.aborted, pauseMs, 100).catch(() => {});
    }
  }

  /** Sends what is left, and waits until all is posted. */
  async function settle() {
    proxy.mend();
    disk?.makeRoom();
    const follower = killed.find(({ name }) => name === "client")?.program;
    follower?.kill("SIGTERM");
    await follower?.exit();
    const args = [dir.file("followed.jsonl"), "--wait"];
    const sent = await run("client.ts", { args, env: { SERVER_URL: killedUrl } });
    if (sent.code !== 0) fail(`client.ts --wait exits with ${sent.code}: ${sent.stderr}`);
    const isRight = async () => oracle.differences(await balances()).length === 0;
    await until(isRight, 180_000, 1_000).catch(() => {});
  }

  /** In cents. */
  async function balances(): Promise<Map<string, number>> {
    const rows = await sql<{ user_id: string; cents: string }[]>`
      select user_id, (revenue * 100)::text as cents from users_revenue`;
    return new Map(rows.map(({ user_id, cents }) => [user_id, Number(cents)]));
  }

  async function checkEnd() {
    const found = await balances();
    const differing = oracle.differences(found);
    if (differing.length > 0)
      fail(`${differing.length} balances differ: ${differing.slice(0, 20).join("; ")}`);

    const answer = await fetch(`${steady.url}/revenue?step=day&from=2020-01-01&to=2040-01-01`);
    const { points } = (await answer.json()) as { points: { amount: string; step: string }[] };
    const ofPoints = points.reduce((sum, { amount }) => sum + Math.round(Number(amount) * 100), 0);
    const ofBalances = [...found.values()].reduce((sum, cents) => sum + cents, 0);
    console.log(`sum over /revenue ${ofPoints / 100}, sum over balances ${ofBalances / 100}`);
    if (ofPoints !== ofBalances) fail("the sum over /revenue is not the sum over balances");
    const [removed] = await sql<{ mib: number; day: string; steps: string }[]>`
      select coalesce(sum(position), 0)::float8 / 1048576 as mib, (select day::text from boundary),
        (select string_agg(distinct step, ', ') from points) as steps from removed`;
    console.log(
      `removed segments of ${format(removed?.mib)} MiB; the ledger's day is ${removed?.day}; points by ${removed?.steps}`,
    );
    if (!removed || removed.mib === 0) fail("no segment was removed");

    const posted = [...new Bun.Glob("posted-*.jsonl").scanSync(dir.path)].map(dir.file);
    const journals = [killedEnv, smallEnv].map((env) => `${env.DATA_DIR}/eventsPost.jsonl`);
    const args = ["--verify", ...journals, ...posted];
    const verified = await run("processor.ts", { args, env: steadyEnv });
    console.log(verified.stdout.trim().split("\n").at(-1));
    if (verified.code !== 0) fail(`--verify: ${verified.stdout}${verified.stderr}`);

    for (const program of live) {
      program.kill("SIGTERM");
      const code = await program.exit();
      if (code !== 0) fail(`a program ends with ${code} on SIGTERM: ${program.stderr.text()}`);
    }
    for (const env of [steadyEnv, killedEnv, smallEnv]) {
      const check = await run("processor.ts", { args: ["--check"], env });
      if (check.code !== 0) fail(`--check of ${env.DATA_DIR}: ${check.stdout}${check.stderr}`);
    }
  }

  function report(): number {
    const verdicts: Verdict[] = [...measures].map(([name, { unit, samples }]) =>
      judge(name, unit, samples, lengthS),
    );
    writeFileSync(join(out, "plot.svg"), plot(measures, verdicts, lengthS));
    for (const { name, unit, second, last, state } of verdicts)
      console.log(`${state.padEnd(15)} ${name}: ${format(second)} → ${format(last)} ${unit}`);
    const { events, users, unanswered } = oracle.figures();
    console.log(`${events} events of ${users} users acknowledged, ${unanswered} without an answer`);
    for (const [what, count] of counts.all()) console.log(`${`${count}`.padStart(9)} ${what}`);
    for (const left of [
      ...(disk ? [] : ["a full disk: this user cannot mount a tmpfs"]),
      ...(clock.isFake ? [] : ["clock steps of a server: libfaketime is not installed"]),
    ])
      console.log(`left out: ${left}`);
    const grown = verdicts
      .filter(({ state }) => state === "grew")
      .map(({ name }) => `${name} grew`);
    for (const what of [...failures, ...grown]) console.log(`FAILED: ${what}`);
    return failures.length + grown.length > 0 ? 1 : 0;
  }
}

const around = (ms: number) => [ms * 0.9, ms * 1.1] as const;

/**
 * The clocks that step: that of the database, whose `now()` is replaced by a function of a schema that comes
 * before Postgres' own, and that of a server (libfaketime). Elapsed time is not affected.
 */
async function openClocks(url: string, sql: postgres.Sql, file: string) {
  const database = openDatabase(() => url, "soak", 1);
  await readDay(database); // applies the schema
  await sql.unsafe(`
    create schema clock;
    create table clock.ahead as select interval '0' as step;
    create function clock.now() returns timestamptz language plpgsql stable as $$
      begin return (select pg_catalog.now() + step from clock.ahead); end $$;
    alter database postgres set search_path = clock, pg_catalog, public`);
  await database.close();
  const isFake = await Bun.file(FAKETIME).exists();
  writeFileSync(file, "+0");
  const env = {
    LD_PRELOAD: FAKETIME,
    DONT_FAKE_MONOTONIC: "1",
    FAKETIME_TIMESTAMP_FILE: file,
    FAKETIME_CACHE_DURATION: "1",
  };
  const someStep = () => STEPS_S[Math.floor(Math.random() * STEPS_S.length)] as number;
  return {
    isFake,
    /** Of the server whose clock steps. */
    env: isFake ? env : {},
    async step() {
      const seconds = someStep();
      writeFileSync(file, `${seconds < 0 ? "" : "+"}${seconds}`);
      await sql`update clock.ahead set step = ${someStep()}::float8 * interval '1 second'`;
    },
    /** As a processor does after an hour in which the day was due. */
    async moveDay() {
      const other = openDatabase(() => url, "soak", 1);
      const { day } = await readDay(other);
      await moveDay(other, day);
      await other.close();
    },
  };
}

/** A folder on a small disk of its own; `null` where this user may not mount one (it is then a plain folder). */
function mountSmall(path: string) {
  mkdirSync(path);
  const mounting = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path]);
  if (!mounting.success) return null;
  const ballast = join(path, "ballast");
  return {
    fill() {
      const piece = Buffer.alloc(16_384);
      try {
        for (;;) appendFileSync(ballast, piece);
      } catch {
        // full
      }
    },
    makeRoom: () => rmSync(ballast, { force: true }),
    [Symbol.dispose]: () => void Bun.spawnSync(["umount", "-l", path]),
  };
}

/** Where samples and plot go unless `--out` says otherwise: it stays after the run. */
export function defaultOut(): string {
  return join(
    tmpdir(),
    `daybook-soak-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}`,
  );
}
