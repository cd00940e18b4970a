/** No text of a sender, a file's name or a server reaches a terminal as a control sequence. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";

import { event, line } from "./support/events.ts";
import { openLedger } from "./support/ledger.ts";
import { onTerminal } from "./support/terminal.ts";
import { root, run, tempDir, untilBalance } from "./support/programs.ts";

setDefaultTimeout(60_000);

/** Clears the screen, sets the title, reverses what follows, and begins a line of its own. */
const EVIL = "\x1b[2J\x1b]0;x\x07\x9b1m\u202e\x7f\u2066\nsent 5 events";
const SHOWN = String.raw`\u001b[2J\u001b]0;x\u0007\u009b1m\u202e\u007f\u2066\u000asent 5 events`;
/** Of what a terminal obeys, only the end of a line is ours. */
const OBEYED = /[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/;

test("client.ts shows names of files and a server's words escaped, and only the beginning of long ones", async () => {
  const detail = `${EVIL}${"y".repeat(100_000)}`;
  const fetch = ({ method }: Request) =>
    method === "HEAD"
      ? new Response(null, { status: 404 })
      : Response.json({ detail }, { status: 418 });
  await using server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch });
  using dir = tempDir();
  const file = dir.file(`a${EVIL}.jsonl`);
  await Bun.write(file, line("ann"));
  const env = { SERVER_URL: `http://127.0.0.1:${server.port}` };
  const sent = await run("client.ts", { args: [file], env });
  expect(sent.code).toBe(3);
  expect(sent.stderr).toContain(`answered 418: ${SHOWN}yyy`);
  expect(sent.stdout).toContain(SHOWN);
  expect(sent.stdout + sent.stderr).not.toMatch(OBEYED);
  expect(sent.stderr.length).toBeLessThan(2_000);
  const missing = await run("client.ts", { args: [`${file}x`], env });
  expect(missing.stderr).toBe(`${dir.path}/a${SHOWN}.jsonlx: no such file\n`);
  const { shown } = await onTerminal(env, "client.ts", file);
  // The bar is ours: it clears its line.
  expect(shown.replaceAll(/\r\x1b\[K|\r\n/g, "")).not.toMatch(/[\x00-\x1f\x7f-\x9f\u202a-\u202e]/);
  expect(shown).toContain(String.raw`left | a\u001b[2J`);
});

test("the operator's tools show sources, users, ids, reasons and lines escaped; NDJSON keeps its values", async () => {
  await using ledger = await openLedger();
  const file = ledger.write(`a${EVIL}.jsonl`, line(EVIL, 3, { id: EVIL }) + line("bob"));
  expect((await ledger.tool([file])).code).toBe(0);
  {
    await using app = await ledger.start();
    await app.post(event(EVIL, 4, { id: EVIL })); // in conflict with the first
    await app.post(event("cay"));
    await untilBalance(app, "cay", "1");
  }
  await ledger.select("update users_revenue set revenue = revenue + 1");
  await ledger.select(
    `insert into quarantine select 'sent:' || user_id, 7, user_id, user_id, now() from users_revenue`,
  );
  const outputs = await Promise.all([
    ledger.tool(["--quarantine"]),
    ledger.tool(["--quarantine=retry"]),
    ledger.tool(["--quarantine=dismiss", EVIL]),
    ledger.tool(["--verify"]),
    ledger.tool(["--verify", file]),
    ledger.tool(["--retire", EVIL]),
    ledger.tool(["--check", file]),
    ledger.tool(["--check", `${file}x`]),
    ledger.tool(["--history", EVIL, file]),
    ledger.tool([`--quarantine=${EVIL}`]),
    ledger.tool(["--from", EVIL, "--history", "a"]),
    ledger.tool([`--${EVIL}`]),
    ledger.tool([], { PORT: EVIL, LOG_LEVEL: EVIL }),
  ]);
  for (const { stdout, stderr } of outputs) {
    expect(stdout + stderr).not.toMatch(OBEYED);
    expect(stdout + stderr).not.toMatch(/^sent 5 events/m);
  }
  expect(outputs[0]?.stdout).toContain(SHOWN);
  const rows = outputs[8]!.stdout
    .trimEnd()
    .split("\n")
    .map((row) => JSON.parse(row));
  expect(rows).toContainEqual(
    expect.objectContaining({ id: EVIL, source: `file:a${EVIL}.jsonl#1` }),
  );
  const { shown } = await onTerminal(ledger.env, "processor.ts", "--history", EVIL, file);
  expect(shown.replaceAll("\r\n", "")).not.toMatch(OBEYED);
  expect(shown).toContain(SHOWN);
});

test("the log of a server on a terminal is escaped", async () => {
  using dir = tempDir();
  await Bun.write(
    dir.file("schema.json"),
    JSON.stringify({ properties: { [EVIL]: { uniqueItems: true } } }),
  );
  const env = {
    DATA_DIR: dir.file("data"),
    EVENT_SCHEMA: dir.file("schema.json"),
    HOST: "192.0.2.1",
    DATABASE_URL: "postgres://nobody@127.0.0.1:1/nothing",
  };
  const { shown } = await onTerminal(
    { ...env, AUTH_SECRET: "a-secret-of-25-characters" },
    "app.ts",
    "--no-processor",
  );
  expect(shown).toContain(SHOWN);
  expect(shown.replaceAll("\r\n", "")).not.toMatch(OBEYED);
  expect(readFileSync(dir.file("schema.json"), "utf8")).toContain("uniqueItems");
});

test("what a command prints arrives whole, however slowly it is read", async () => {
  const program = `
    import { print, say } from ${JSON.stringify(join(root, "lib/progress.ts"))};
    for (let i = 0; i < 20_000; i++) print(\`\${i} \${"x".repeat(80)}\`);
    for (let i = 0; i < 20_000; i++) say(\`\${i} \${"x".repeat(80)}\`);
    process.exit();
  `;
  const child = Bun.spawn([
    "sh",
    "-c",
    '"$0" -e "$1" 2>&1 | (sleep 1; wc -l)',
    process.execPath,
    program,
  ]);
  expect((await new Response(child.stdout).text()).trim()).toBe("40000");
});
