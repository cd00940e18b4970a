/** What a role may do, where its tables are, and what is set on it: each program with exactly its rights. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { openProxy } from "../support/network.ts";
import { run, until, untilBalance } from "../support/programs.ts";

setDefaultTimeout(120_000);

type Ledger = Awaited<ReturnType<typeof openLedger>>;

/** A role of this test, and the URL with which it connects. It may use the schema, and nothing else. */
async function createRole(ledger: Ledger) {
  const name = `daybook_test_${crypto.randomUUID().replaceAll("-", "")}`;
  const url = new URL(ledger.url);
  url.username = name;
  url.password = "pw";
  const database = url.pathname.slice(1);
  await ledger.select(`create role ${name} login password 'pw'`);
  await ledger.select(`grant usage on schema public to ${name}`);
  await ledger.select(`revoke temporary on database ${database} from public`);
  return {
    name,
    env: { DATABASE_URL: url.href },
    grant: (what: string) => ledger.select(`grant ${what} to ${name}`),
    database,
    async [Symbol.asyncDispose]() {
      await ledger.select(`grant temporary on database ${database} to public`);
      await ledger.select(`drop owned by ${name}; drop role ${name}`);
    },
  };
}

const ALL = "select, insert, update, delete on all tables in schema public";

test("rights: a server reads, a processor changes rows, a tool also makes temporary tables", async () => {
  await using ledger = await openLedger();
  const path = ledger.write("a.jsonl", line("ann"));
  await ledger.tool([path]); // as the owner, who makes the tables
  await using reader = await createRole(ledger);
  await reader.grant("select on all tables in schema public");
  await using writer = await createRole(ledger);
  await writer.grant(ALL);
  await using operator = await createRole(ledger);
  await operator.grant(ALL);
  await operator.grant(`temporary on database ${operator.database}`);

  await using server = await ledger.start(reader.env, ["--no-processor"]);
  expect(await server.balance("ann")).toBe("1");
  for (const path of ["/userEvents", "/userEvents?order=revenue", "/revenue", "/readyz?reads"])
    expect((await fetch(server.url + path)).status, path).toBe(200);
  await server.post(event("ann", 2, { id: "one" }));
  await server.postLines(`${event("ann", 2, { id: "one" })}\n${event("ann", 3, { id: "one" })}`);
  const source = ledger.write("c.jsonl", line("cay"));
  await run("client.ts", { args: [source], env: { SERVER_URL: server.url } });
  {
    await using processor = ledger.process([], writer.env);
    await untilBalance(server, "cay", "1");
    expect(processor.stderr.text()).not.toContain("permission");
  }
  const other = ledger.write("b.jsonl", line("bob"));
  expect(await ledger.tool([other], writer.env)).toMatchObject({ code: 0 });
  expect(await ledger.tool(["--quarantine"], reader.env)).toMatchObject({ code: 1, stderr: "" });

  const sources = [path, other];
  const refused = await ledger.tool(["--verify", ...sources], writer.env);
  expect(refused).toMatchObject({ code: 3 });
  expect(refused.stderr).toContain("permission denied to create temporary tables");
  expect(await ledger.tool(["--verify", ...sources], operator.env)).toMatchObject({ code: 0 });
  await ledger.select("update users_revenue set revenue = 7 where user_id = 'bob'");
  expect(await ledger.tool(["--rebuild", ...sources], operator.env)).toMatchObject({ code: 0 });
  expect(await ledger.balances()).toEqual({ ann: "3", bob: "1", cay: "1" });
  await ledger.select("delete from ids");
  const retried = await ledger.tool(["--quarantine=retry"], writer.env);
  expect(retried.stdout, retried.stderr).toStartWith("lines posted: 1");
});

test("a schema other than public, by options in DATABASE_URL", async () => {
  await using ledger = await openLedger();
  await ledger.select("create schema money");
  await ledger.select("create table public.users_revenue (of_somebody_else int)");
  const env = { DATABASE_URL: `${ledger.url}?options=-csearch_path%3Dmoney` };
  const path = ledger.write("a.jsonl", line("ann"));
  {
    await using server = await ledger.start(env);
    await server.post(event("ann"));
    await untilBalance(server, "ann", "1");
  }
  expect(await ledger.tool([path], env)).toMatchObject({ code: 0 });
  expect(await ledger.tool(["--rebuild", path], env)).toMatchObject({ code: 0 });
  expect(await ledger.select("select user_id, revenue from money.users_revenue")).toEqual([
    { user_id: "ann", revenue: "2" },
  ]);
  await ledger.select("drop schema money cascade");
});

test("time limits and a strict isolation that are set on the role do not stop a recount or a posting", async () => {
  await using ledger = await openLedger();
  const lines = Array.from({ length: 60_000 }, (_, i) => line(`user${i}`)).join("");
  const path = ledger.write("a.jsonl", lines);
  await ledger.tool([ledger.write("b.jsonl", line("bob"))]);
  await using role = await createRole(ledger);
  await role.grant(ALL);
  await role.grant(`temporary on database ${role.database}`);
  const [version] = await ledger.select<{ major: number }>(
    "select current_setting('server_version_num')::int / 10000 as major",
  );
  const limits = ["statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"];
  if (version!.major >= 17) limits.push("transaction_timeout");
  for (const limit of limits) await ledger.select(`alter role ${role.name} set ${limit} = '150ms'`);
  // Between `begin` and the statement that sets it, a busy machine may need longer than that.
  await ledger.select(`alter role ${role.name} set idle_in_transaction_session_timeout = '3s'`);
  await ledger.select(`alter role ${role.name} set default_transaction_isolation = 'serializable'`);
  expect(await ledger.tool([path], role.env)).toMatchObject({ code: 0 });
  await ledger.select("update users_revenue set revenue = 7");
  const sources = [path, ledger.file("b.jsonl")];
  expect(await ledger.tool(["--rebuild", ...sources], role.env)).toMatchObject({ code: 0 });
  const { stdout, stderr } = await ledger.tool(["--verify", ...sources], role.env);
  expect(stdout, stderr).toBe("60001 balances match their sources\n");
});

test("Postgres does not compile the statement that posts, which took two seconds of each large batch", async () => {
  await using ledger = await openLedger();
  await ledger.tool([ledger.write("a.jsonl", line("ann"))]);
  await ledger.select("create table seen (jit text)");
  await ledger.select(`create function see() returns trigger language plpgsql as $$
    begin insert into seen select current_setting('jit'); return new; end $$`);
  await ledger.select(
    "create trigger see after insert on users_revenue for each row execute function see()",
  );
  const path = ledger.write("b.jsonl", line("ben"));
  await using role = await createRole(ledger);
  await role.grant(ALL);
  await role.grant("insert on seen");
  await ledger.select(`alter role ${role.name} set jit = on`);
  expect(await ledger.tool([path], role.env)).toMatchObject({ code: 0 });
  expect(await ledger.select<{ jit: string }>("select jit from seen")).toEqual([{ jit: "off" }]);
});

test("a database that is down at the start: events are accepted, and posted once it is there", async () => {
  await using ledger = await openLedger();
  await using proxy = await openProxy(ledger.url);
  proxy.cut();
  await using server = await ledger.start({ DATABASE_URL: proxy.url });
  expect((await server.post(event("ann"))).status).toBe(201);
  expect((await fetch(`${server.url}/userEvents/ann`)).status).toBe(503);
  await until(() => proxy.refused() > 2);
  proxy.mend();
  await untilBalance(server, "ann", "1");
});
