/** A real failover: two servers, streaming replication, promotion, and the old primary back as a standby. */
import { expect, setDefaultTimeout, test } from "bun:test";

import { event } from "../support/events.ts";
import { openProxy } from "../support/network.ts";
import { balances } from "../support/postgres.ts";
import { run, startApp, tempDir, until } from "../support/programs.ts";
import { createServer, hasServers, type Server } from "../support/servers.ts";

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
    await using first = await createServer();
    await first.start();
    await using second = await createServer(first);
    await second.start();
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
      const posted = async () => Number((await balances(second.url))["ann"]);
      const before = await posted();
      await until(async () => (await posted()) > before + 20, 15_000);
      await load.stop();
      await until(async () => (await posted()) === load.accepted(), 15_000);
      expect(app.stderr.text()).toContain("posting again");
    }
    const verified = await run("processor.ts", {
      args: ["--verify"],
      env: { DATA_DIR: folder.path, DATABASE_URL: second.url },
    });
    expect(verified.stdout, verified.stderr).toBe("1 balances match their sources\n");
  },
);
