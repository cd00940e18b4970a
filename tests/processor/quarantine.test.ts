/** Events under the id of another event: quarantined once, told once, and dismissed for good. */
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
  await ledger.select("delete from event_ids");
  expect((await ledger.tool(["--quarantine=retry"])).stdout).toContain("lines posted: 0");
  await ledger.select("update users_revenue set revenue = revenue + 7");
  for (const tool of ["--rebuild", "--verify"])
    expect((await ledger.tool([tool, file])).code).toBe(0);
  expect(await ledger.balances()).toEqual(before);
});
