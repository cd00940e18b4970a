/** deploy/try-cluster.sh, as a person runs it. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync } from "node:fs";

import { event } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { hasNats } from "../support/nats.ts";
import { until } from "../support/programs.ts";

setDefaultTimeout(90_000);

test.if(hasNats)(
  "deploy/try-cluster.sh starts a cluster with two servers, and cleans up",
  async () => {
    await using ledger = await openLedger();
    const first = 20_000 + Math.floor(Math.random() * 10_000);
    const child = Bun.spawn(["deploy/try-cluster.sh", `${first}`], {
      env: { ...process.env, DATABASE_URL: ledger.url },
      stdio: ["ignore", "pipe", "inherit"],
    });
    try {
      let text = "";
      const reading = (async () => {
        for await (const chunk of child.stdout) text += Buffer.from(chunk).toString();
      })();
      await until(() => /send with/.test(text), 60_000);
      for (const port of [first, first + 1]) {
        const headers = { authorization: "secret", "content-type": "application/json" };
        const url = `http://127.0.0.1:${port}/liveEvent`;
        const { status } = await fetch(url, { method: "POST", headers, body: event("ann") });
        expect(status).toBe(201);
      }
      await until(async () => (await ledger.balances())["ann"] === "2");
      const [, folder] = /store: (\S+)/.exec(text)!;
      child.kill("SIGTERM");
      await child.exited;
      await reading;
      expect(existsSync(folder!)).toBe(false);
    } finally {
      child.kill("SIGTERM"); // after a kill its own processes would remain
      await child.exited;
    }
  },
);
