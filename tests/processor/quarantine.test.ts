/** Events under the id of another event: quarantined once, reported once, and dismissed for good. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const ID = { id: "a" };
const FIRST = line("ann", 1, ID);
const CLASH = line("ben", 2, ID);

for (const [where, files] of [
  ["in the same file as the first event", [FIRST + CLASH.repeat(3)]],
  ["before it in the file", [FIRST, CLASH.repeat(3)]],
  ["in several files", [FIRST, CLASH, CLASH, CLASH]],
  ["among other clashes", [FIRST + CLASH + line("cid", 3, ID) + CLASH, line("cid", 3, ID) + CLASH]],
] as const)
  test(`an event whose id belongs to another one is quarantined once, however often it comes: ${where}`, async () => {
    await using ledger = await openLedger();
    const counts = { posted: 0, quarantined: 0, repeated: 0 };
    for (const [i, content] of files.entries()) {
      const { stdout } = await ledger.tool([ledger.write(`${i}.jsonl`, content)]);
      const [, posted, quarantined, repeated = 0] =
        /^posted (\d+) events? \((\d+) lines? quarantined(?:, (\d+) events? had come before)?\)/.exec(
          stdout,
        ) ?? [];
      counts.posted += Number(posted);
      counts.quarantined += Number(quarantined);
      counts.repeated += Number(repeated);
    }
    const lines = files.join("").trimEnd().split("\n");
    const others = new Set(lines.filter((text) => `${text}\n` !== FIRST)).size;
    expect(counts).toEqual({
      posted: 1,
      quarantined: others,
      repeated: lines.length - 1 - others,
    });
    expect(await ledger.quarantine()).toHaveLength(others);
    expect(await ledger.balances()).toEqual({ ann: "1" });
    const paths = files.map((_, i) => ledger.file(`${i}.jsonl`));
    expect((await ledger.tool(["--verify", ...paths])).code).toBe(0);
  });

test("duplicates that alternate with fresh events take a row for each batch, and a recount knows each of them", async () => {
  await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "200000" });
  const known = Array.from({ length: 3_000 }, (_, i) => line("ann", 1, { id: `known ${i}` }));
  const mixed = known.map((text, i) => text + line("ben", 1, i % 3 ? {} : { id: `fresh ${i}` }));
  const file = ledger.write("known.jsonl", known.join(""));
  const again = ledger.write("again.jsonl", mixed.join("").slice(0, -1));
  {
    await using server = await ledger.start();
    await ledger.tool([file]);
    const { stdout } = await ledger.tool([again]);
    expect(stdout).toStartWith(
      "posted 3000 events (0 lines quarantined, 3000 events had come before)",
    );
    await server.postLines(mixed.slice(0, 2_999).join(""));
    await server.postLines(mixed.slice(2_999).join(""));
    // Two thirds of `ben` carry no id and count again.
    await untilBalance(server, "ben", "5000");
  }
  const count = async (table: string) =>
    (await ledger.select<{ rows: number }>(`select count(*)::int as rows from ${table}`))[0]?.rows;
  expect(await count("uncounted")).toBeLessThanOrEqual(15);
  expect(await count("packed_uncounted")).toBeGreaterThanOrEqual(2);
  const before = { ann: "3000", ben: "5000" };
  for (const keepDays of [undefined, "0"]) {
    if (keepDays) {
      await using server = await ledger.start({ JOURNAL_KEEP_DAYS: keepDays });
      await until(async () => ((await count("removed")) ?? 0) > 0);
      await server.post(line("cid").trim());
      await untilBalance(server, "cid", "1");
      Object.assign(before, { cid: "1" });
    }
    expect((await ledger.tool(["--verify", file, again])).stdout).toEndWith(
      "balances match their sources\n",
    );
    await ledger.select("update users_revenue set revenue = revenue + 7");
    expect((await ledger.tool(["--rebuild", file, again])).code).toBe(0);
    expect(await ledger.balances()).toEqual(before);
  }
});

/** What the quarantine takes in Postgres. */
async function sizeOf({ select }: Awaited<ReturnType<typeof openLedger>>) {
  const [size] = await select<{ whole: number; packed: number; bytes: number }>(`
    select (select count(*)::int from quarantine) as whole,
      (select count(*)::int from packed_quarantine) as packed,
      (pg_total_relation_size('quarantine') + pg_total_relation_size('packed_quarantine'))::int as bytes`);
  return size as { whole: number; packed: number; bytes: number };
}

const clash = (i: number, ids: number) => line(`other ${i}`, 1, { id: `id ${i % ids}` });

test("200,000 clashes take a few rows and bytes, and a recount, a retry and a dismissal know each of them", async () => {
  await using ledger = await openLedger();
  const count = 200_000;
  const ids = 1_000;
  const first = Array.from({ length: ids }, (_, i) => line("ann", 1, { id: `id ${i}` }));
  // A freed id goes to the first of its clashes. Three ids have theirs, two each, among the last lines.
  const clashes = Array.from({ length: count }, (_, i) =>
    i < count - 6 ? clash(i, 900) : line(`other ${i}`, 1, { id: `id ${997 + (i % 3)}` }),
  );
  const before = ledger.write("first.jsonl", first.join(""));
  const file = ledger.write("clashes.jsonl", clashes.join(""));
  await ledger.tool([before]);
  const { stdout } = await ledger.tool([file]);
  expect(stdout).toStartWith(`posted 0 events (${count} lines quarantined)`);
  const size = await sizeOf(ledger);
  expect(size.whole).toBe(1_000);
  expect(size.packed).toBeLessThan(100);
  expect(size.bytes).toBeLessThan(3_000_000);
  const verify = () => ledger.tool(["--verify", before, file]);
  expect(await verify()).toMatchObject({ code: 0 });
  expect((await ledger.tool(["--quarantine"])).stdout).toEndWith(`lines in quarantine: ${count}\n`);

  // Two of these have their first clash among the lines that are kept whole.
  const freed = [997, 998, 999, 7, 8];
  await ledger.select(
    `delete from ids where convert_from(id, 'UTF8') = any('{${freed.map((i) => `id ${i}`).join()}}')`,
  );
  const retried = await ledger.tool(["--quarantine=retry", file]);
  expect(retried).toMatchObject({ code: 1, stderr: "" });
  expect(retried.stdout).toEndWith(`lines posted: 5; remaining in quarantine: ${count - 5}\n`);
  const posted = { "other 199994": "1", "other 199995": "1", "other 199996": "1" };
  const balances = { ann: "1000", "other 7": "1", "other 8": "1", ...posted };
  expect(await ledger.balances()).toEqual(balances);
  expect(await verify()).toMatchObject({ code: 0 });
  expect(await sizeOf(ledger)).toMatchObject({ whole: 998 });

  const places = await ledger.select<{ place: string }>(`
    select source || '@' || from_position + positions[1] as place from packed_quarantine limit 1`);
  const dismissed = await ledger.tool(["--quarantine=dismiss", places[0]?.place ?? ""]);
  expect(dismissed).toMatchObject({ code: 0, stdout: "lines dismissed: 1\n" });
  expect(await verify()).toMatchObject({ code: 0 });
  const { stdout: all } = await ledger.tool(["--quarantine=dismiss"]);
  expect(all).toBe(`lines dismissed: ${count - 6}\n`);
  expect(await ledger.tool(["--quarantine"])).toMatchObject({ code: 0 });
  await ledger.select("delete from ids");
  await ledger.select("update users_revenue set revenue = revenue + 7");
  expect(await ledger.tool(["--rebuild", before, file])).toMatchObject({ code: 0 });
  expect(await ledger.balances()).toEqual(balances);
}, 240_000);

test("lines that are no events are bounded as well, whatever their reasons, and posted once they are events", async () => {
  await using ledger = await openLedger({ EVENT_TYPES: "add_revenue:+" });
  const types = Array.from({ length: 20 }, (_, i) => `type${i}`);
  const later = { EVENT_TYPES: ["add_revenue:+", ...types.map((name) => `${name}:+`)].join() };
  const lines = Array.from({ length: 100 }, (_, i) => line("ann", 1, { name: types[i % 20] }));
  // Postgres holds no NUL, and half of a character is no UTF-8.
  const nonsense = Buffer.concat([
    Buffer.from("nonsense\0\n".repeat(1_500)),
    Buffer.from([0xe2, 10]),
  ]);
  const file = ledger.write("bad.jsonl", Buffer.concat([nonsense, Buffer.from(lines.join(""))]));
  const { stdout } = await ledger.tool([file]);
  expect(stdout).toStartWith("posted 0 events (1601 lines quarantined)");
  const size = await sizeOf(ledger);
  expect(size.whole).toBe(1_000);
  expect(size.packed).toBeLessThanOrEqual(6);
  const unnamed = await ledger.tool(["--quarantine=retry"], later);
  expect(unnamed.stdout).toEndWith("lines posted: 0; remaining in quarantine: 1601\n");
  const retried = await ledger.tool(["--quarantine=retry", file], later);
  expect(retried.stdout).toEndWith("lines posted: 100; remaining in quarantine: 1501\n");
  expect(await ledger.balances()).toEqual({ ann: "100" });
  expect(await ledger.tool(["--verify", file], later)).toMatchObject({ code: 0 });
});

test("lines beyond the bound are retried from the journal as long as it has them", async () => {
  await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "200000" });
  await using server = await ledger.start();
  await server.post(line("ann", 1, { id: "id 0" }).trim());
  const clashes = Array.from({ length: 6_000 }, (_, i) => clash(i, 1));
  const again = clashes.slice(-10);
  for (const body of [clashes.slice(0, 3_000), clashes.slice(3_000), again, again])
    await server.postLines(body.join(""));
  await server.post(line("ann", 1).trim());
  await untilBalance(server, "ann", "2");
  expect(await sizeOf(ledger)).toMatchObject({ whole: 1_000 });
  // The first 1,000 are gone: the one that is posted is packed.
  await ledger.select("delete from quarantine where line not like '%other 0\"%'");
  await ledger.select(`update ids set event = (
    select daybook_identity(replace(line, 'other 0', 'other 5995')) from quarantine)`);
  const same = await ledger.tool(["--quarantine=retry"]);
  // Clashes of one batch are one: it was packed once, twice or three times.
  expect(same.stdout).toMatch(/lines posted: [123]; remaining/);
  expect((await ledger.tool(["--history", "other 5995"])).stdout).toContain(
    "the same event came before",
  );
  expect((await ledger.tool(["--history", "other 5994"])).stdout).toContain(
    "in quarantine: its id",
  );
});

test("an id conflict is logged and counted by its reason, and never again once it is dismissed", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start();
  await app.postLines(FIRST + line("ben", 2, ID) + line("cid", 3, ID) + line("ann", 4));
  const file = ledger.write("bad.jsonl", `nonsense\n${line("dan")}`);
  await untilBalance(app, "ann", "5");
  await ledger.tool([file]);
  await until(() =>
    app.stderr
      .text()
      .includes(
        "processor: quarantined 2 lines (its id belongs to another event); see bun run processor.ts --quarantine",
      ),
  );
  const metrics = await (await fetch(`${app.url}/metrics`)).text();
  expect(metrics).toContain('daybook_events_quarantined_total{reason="conflict"} 2\n');
  expect(metrics).toContain('daybook_events_quarantined_total{reason="invalid"} 0\n');

  const listed = (await ledger.tool(["--quarantine"])).stdout.split("\n");
  expect(listed).toHaveLength(5); // three lines, their number, and the end
  const place = listed.find((text) => text.includes("cid"))?.split(",")[0] ?? "";
  const wrong = await ledger.tool(["--quarantine=dismiss", "file:none#1"]);
  expect(wrong).toMatchObject({ code: 2, stdout: "" });
  expect(wrong.stderr).toContain("file:none#1: no such line is in quarantine");
  const one = await ledger.tool(["--quarantine=dismiss", place]);
  expect(one).toMatchObject({ code: 0, stdout: "lines dismissed: 1\n" });
  expect((await ledger.quarantine()).map(({ line }) => line)).toEqual([
    "nonsense",
    expect.stringContaining("ben"),
  ]);
  expect((await ledger.tool(["--quarantine=dismiss"])).stdout).toBe("lines dismissed: 2\n");
  expect(await ledger.tool(["--quarantine"])).toMatchObject({ code: 0 });

  // Neither when the id is free again, nor when the balances are computed anew.
  const before = await ledger.balances();
  await ledger.select("delete from ids");
  expect((await ledger.tool(["--quarantine=retry"])).stdout).toContain("lines posted: 0");
  await ledger.select("update users_revenue set revenue = revenue + 7");
  for (const tool of ["--rebuild", "--verify"])
    expect((await ledger.tool([tool, file])).code).toBe(0);
  expect(await ledger.balances()).toEqual(before);
});
