/** Servers whose journal is a stream: on a cluster of three real nats-servers. */
import { afterAll, beforeAll, expect, test } from "bun:test";

import { line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { hasNats, type Nats, openNats } from "../support/nats.ts";
import { untilBalance } from "../support/programs.ts";

let nats: Nats;
beforeAll(async () => {
  if (hasNats) nats = await openNats();
}, 60_000);
afterAll(() => nats?.[Symbol.asyncDispose]());
let streams = 0;
/** The JOURNAL_URL of a stream of its own. */
const newStream = () => nats.url(`s${++streams}`);

test.if(hasNats)(
  "events, bulk and sources are counted by whichever server they come to",
  async () => {
    await using ledger = await openLedger({ JOURNAL_URL: newStream() });
    await using one = await ledger.start();
    await using two = await ledger.start({ DATA_DIR: ledger.file("none") });
    expect((await one.post(JSON.parse(line("ann", 2)))).status).toBe(201);
    expect((await two.post(JSON.parse(line("ann", 3)))).status).toBe(201);
    const bulk = await two.postLines(line("ann", 5) + line("ben", 7));
    const { position } = (await bulk.json()) as { position: string };
    const read = await fetch(`${one.url}/userEvents/ben?after=${position}`);
    expect(await read.json()).toEqual({ user_id: "ben", revenue: "7" });
    await untilBalance(one, "ann", "10");
    await untilBalance(two, "ann", "10");
  },
  60_000,
);
