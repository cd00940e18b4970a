/** A real failover: two servers, streaming replication, promotion, and the old primary back as a standby. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { openDatabase } from "../../lib/ledger/database.ts";
import { event } from "../support/events.ts";
import { openProxy } from "../support/network.ts";
import { balances } from "../support/postgres.ts";
import { run, startApp, tempDir, until, untilBalance } from "../support/programs.ts";
import { createServer, hasServers, isDone, isNotYet, type Server } from "../support/servers.ts";

setDefaultTimeout(180_000);

const hasPostgres = hasServers();

/** Posts events, one after the other, until it is stopped. */
function startLoad(app: Awaited<ReturnType<typeof startApp>>) {
  let accepted = 0;
  let isStopped = false;
  const ended = (async () => {
    while (!isStopped) if ((await app.post(event("ann"))).status === 201) accepted++;
  })();
  return {
    accepted: () => accepted,
    async stop() {
      isStopped = true;
      await ended;
    },
  };
}

/** Shuts the primary down, promotes the standby, and starts the old primary as its standby. */
async function failOver(primary: Server, standby: Server) {
  await primary.stop();
  await standby.promote();
  await primary.startBehind(standby);
}

test.if(hasPostgres)(
  "the old primary is back at its address as a standby: posting continues on the new one",
  async () => {
    await using servers = await openPair();
    const { first, second } = servers;
    await using address = await openProxy(first.url);
    using folder = tempDir();
    {
      await using app = await startApp({ dataDir: folder.path, databaseUrl: address.url });
      const load = startLoad(app);
      await until(async () => Number(await app.balance("ann")) > 20);
      await failOver(first, second);
      // Connected to what can only be read; the connections stay when the address changes.
      await until(() => app.stderr.text().includes("read-only transaction"), 30_000);
      address.lead(second.url);
      await continuesOn(second, load);
      expect(app.stderr.text()).toContain("posting again");
    }
    await expectVerified(folder.path, second.url);
  },
);

test.if(hasPostgres)(
  "several hosts: the one that can be written is found, again and again",
  async () => {
    await using servers = await openPair();
    const { first, second } = servers;
    const hosts = [first, second].map(({ port }) => `127.0.0.1:${port}`);
    const databaseUrl = `postgres://daybook@${hosts}/postgres?target_session_attrs=read-write`;
    using folder = tempDir();
    {
      await using app = await startApp({ dataDir: folder.path, databaseUrl });
      const load = startLoad(app);
      await until(async () => Number(await app.balance("ann")) > 20);
      await failOver(first, second);
      await untilMore(second);
      await failOver(second, first);
      await continuesOn(first, load);
      // Reads, too, are from the primary.
      await untilBalance(app, "ann", `${load.accepted()}`, 15_000);
    }
    await expectVerified(folder.path, databaseUrl);
  },
);

for (const [session, isStandby] of [
  ["any", true],
  ["primary", false],
  ["read-write", false],
] as const)
  test.if(hasPostgres)(
    `target_session_attrs=${session} ${isStandby ? "takes" : "passes over"} a standby`,
    async () => {
      await using servers = await openPair();
      const hosts = [servers.second, servers.first].map(({ port }) => `127.0.0.1:${port}`);
      const url = `postgres://daybook@${hosts}/postgres?target_session_attrs=${session}`;
      const primary = openDatabase(() => servers.first.url, "test", 1);
      await primary.use(async (sql) => sql`select`); // makes the tables, which a standby cannot
      await primary.close();
      await until(() => balances(servers.second.url).then(isDone, isNotYet)); // it has them, too
      const database = openDatabase(() => url, "test", 1);
      const [row] = await database.use(
        (sql) => sql<{ found: boolean }[]>`select pg_is_in_recovery() as found`,
      );
      expect(row?.found).toBe(isStandby);
      await database.close();
    },
  );

async function openPair() {
  const first = await createServer();
  await first.start();
  const second = await createServer(first);
  await second.start();
  const close = async () => void (await Promise.all([first, second].map((one) => one.close())));
  return { first, second, [Symbol.asyncDispose]: close };
}

const posted = async ({ url }: Server) => Number((await balances(url))["ann"]);

/** Waits until more is posted to this server. */
async function untilMore(server: Server) {
  const posts = () => posted(server).catch(() => 0);
  const before = await posts();
  await until(async () => (await posts()) > before + 20, 15_000);
}

/** Posting continues there, and everything that was accepted counts once. */
async function continuesOn(server: Server, load: ReturnType<typeof startLoad>) {
  await untilMore(server);
  await load.stop();
  await until(async () => (await posted(server)) === load.accepted(), 15_000);
}

async function expectVerified(dataDir: string, url: string) {
  const { stdout, stderr } = await run("processor.ts", {
    args: ["--verify"],
    env: { DATA_DIR: dataDir, DATABASE_URL: url },
  });
  expect(stdout, stderr).toBe("1 balances match their sources\n");
}
