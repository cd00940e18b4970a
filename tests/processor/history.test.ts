/** `--history USER`: every event with the balance after it, and the sum beside the ledger's balance. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";

import { encodeFrame, encodeJournalHeader, newJournalId } from "../../lib/journal/format.ts";
import { event, line } from "../support/events.ts";
import { segmentNames } from "../support/journal.ts";
import { openLedger } from "../support/ledger.ts";
import { until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(60_000);

const AT = Date.parse("2026-03-04T05:06:07.890Z");
const HOUR = 3_600_000;

type Ledger = Awaited<ReturnType<typeof openLedger>>;

/** What `--history` prints, its code, and what it says. */
async function historyOf(ledger: Ledger, ...args: string[]) {
  const { code, stdout, stderr } = await ledger.tool(["--history", ...args]);
  const rows = stdout.trimEnd().split("\n");
  return { code, rows: rows.map((row) => JSON.parse(row) as Record<string, unknown>), stderr };
}

/** A journal of three frames, an hour apart, and a file, all posted. */
async function openPosted() {
  const ledger = await openLedger({ EVENT_TYPES: "add_revenue:+,subtract_revenue:-,seen:0" });
  const bytes = [
    line("ann", "0.1") + line("ben", 1) + line("ann", 2, { name: "subtract_revenue", id: "a" }),
    line("ann", 2, { name: "subtract_revenue", id: "a" }) + line("ann", 9, { id: "a" }) + "bad\n",
    `{"name":"add_revenue", "value":5, "userId":"\\u0061nn"}\n${line("ann", 3, { name: "seen" })}`,
  ].map((lines, i) => encodeFrame([Buffer.from(lines)], Buffer.byteLength(lines), AT + i * HOUR));
  mkdirSync(ledger.dataDir, { recursive: true });
  writeFileSync(ledger.journal, Buffer.concat([encodeJournalHeader(newJournalId(), 0), ...bytes]));
  const file = ledger.write("more.jsonl", `${line("ben", 7)}\n${line("ann", 100)}`);
  await ledger.tool([ledger.journal]);
  await ledger.tool([file]);
  return { ledger, file };
}

test("each event has its place, time and balance, and what does not count says why", async () => {
  const { ledger, file } = await openPosted();
  await using _ = ledger;
  const { code, rows } = await historyOf(ledger, "ann", file);
  expect(code).toBe(0);
  const source = rows[0]?.["source"];
  expect(source).toMatch(/^journal:/);
  const at = (hour: number) => new Date(AT + hour * HOUR).toISOString();
  const shown = rows.slice(0, -1).map(({ position, line, ...row }) => [position ?? line, row]);
  const row = (hour: number, id: string | null, name: string, value: string, balance: string) => ({
    ...{ source, at: at(hour), id, name, value, balance },
  });
  expect(shown).toEqual([
    [expect.any(Number), row(0, null, "add_revenue", "0.1", "0.1")],
    [expect.any(Number), row(0, "a", "subtract_revenue", "2", "-1.9")],
    [
      expect.any(Number),
      { ...row(1, "a", "subtract_revenue", "2", "-1.9"), why: "the same event came before" },
    ],
    [
      expect.any(Number),
      {
        ...row(1, "a", "add_revenue", "9", "-1.9"),
        why: "in quarantine: its id belongs to another event, which came first",
      },
    ],
    [expect.any(Number), row(2, null, "add_revenue", "5", "3.1")],
    [expect.any(Number), row(2, null, "seen", expect.any(String) as never, "3.1")],
    [
      3,
      {
        ...{ source: "file:more.jsonl#1", at: null, id: null, name: "add_revenue" },
        ...{ value: "100", balance: "103.1" },
      },
    ],
  ]);
  expect(rows.at(-1)).toEqual({ sum: "103.1", balance: "103.1" });
  const text = Bun.file(ledger.journal).slice(rows[2]?.["position"] as number);
  expect(await text.text()).toStartWith('{"userId":"ann","name":"subtract_revenue"');
});

test("--from begins with the sum before it, --to ends before it, and the sum is still whole", async () => {
  const { ledger, file } = await openPosted();
  await using _ = ledger;
  const { code, rows } = await historyOf(
    ledger,
    ...["ann", "--from", "2026-03-04T06:00Z", "--to", "2026-03-04T07:00Z", file],
  );
  expect(code).toBe(0);
  expect(rows[0]).toEqual({ at: "2026-03-04T06:00:00.000Z", balance: "-1.9" });
  expect(rows.slice(1, 3).map(({ value, why }) => [value, typeof why])).toEqual([
    ["2", "string"],
    ["9", "string"],
  ]);
  expect(rows.at(-1)).toEqual({ sum: "103.1", balance: "103.1" });
});

test("a source that is not here is named, and a balance that is not the sum is reported, with exit code 1", async () => {
  const { ledger, file } = await openPosted();
  await using _ = ledger;
  const missing = await historyOf(ledger, "ann");
  expect(missing.code).toBe(1);
  expect(missing.stderr).toContain("missing: the first");
  expect(missing.rows.at(-1)).toEqual({ sum: "3.1", balance: "103.1" });
  await ledger.select("update users_revenue set revenue = revenue + 1");
  const wrong = await historyOf(ledger, "ann", file);
  expect(wrong.code).toBe(1);
  expect(wrong.stderr).toContain("the sum of what is here, 103.1, is not the balance, 104.1");
  expect(await historyOf(ledger, "nobody", file)).toMatchObject({
    code: 0,
    rows: [{ sum: "0", balance: null }],
  });
  expect((await ledger.tool(["--history", "ann", "--from", "soon", file])).code).toBe(2);
  expect((await ledger.tool(["--from", "2026-01-01", file])).code).toBe(2);
});

test("what removed segments had added comes first", async () => {
  await using ledger = await openLedger({ JOURNAL_SEGMENT_BYTES: "500" });
  await using app = await ledger.start({ JOURNAL_KEEP_DAYS: "0" });
  for (let i = 0; i < 20; i++) await app.post(event("ann"));
  await untilBalance(app, "ann", "20");
  await until(() => segmentNames(ledger.dataDir).length === 0);
  await app.post(event("ann", 5));
  await untilBalance(app, "ann", "25");
  const { code, rows } = await historyOf(ledger, "ann");
  expect(code).toBe(0);
  expect(rows[0]).toMatchObject({ snapshot: expect.any(String), balance: rows[0]?.["snapshot"] });
  expect(rows.length).toBeLessThan(20);
  expect(rows.at(-1)).toEqual({ sum: "25", balance: "25" });
});

test("the line of an event in a file is right after lines that are longer than what is read at once", async () => {
  await using ledger = await openLedger();
  const long = `${"x".repeat(3_000_000)}\n`;
  const file = ledger.write("long.jsonl", `${line("ann")}\n${long}${line("ben")}${line("ann")}`);
  expect((await ledger.tool([file])).code).toBe(1);
  const { rows } = await historyOf(ledger, "ann", file);
  expect(rows.slice(0, 2).map((row) => row["line"])).toEqual([1, 5]);
});
