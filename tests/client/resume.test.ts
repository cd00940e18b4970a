/**
 * A file is taken once, to the event, whatever happens on the way: the client is killed, the server
 * with its processor is killed under it, and what lies between them drops, delays and cuts. What
 * must come of it is summed up by the test itself, from the file it wrote.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync, statSync } from "node:fs";

import { count } from "../faults/figures.ts";
import { rejectedFaults, writeEvents } from "../support/events.ts";
import { type Fault, openMeddler } from "../support/network.ts";
import { balances, testDatabase } from "../support/postgres.ts";
import { run, spawn, startApp, tempDir, until } from "../support/programs.ts";
import { IS_LONG, seeded } from "../support/random.ts";

setDefaultTimeout(300_000);

const LINES = 40_000;
const KILLS = 10;
/** A client that meets bad luck five times in a row waits for 10 s, and then for 5 s each time. */
const GOES_ON_MS = 120_000;
/** Beyond the point at which a client is to die, so much more gets through at most. */
const SLACK_BYTES = 1024 * 1024;

test.if(IS_LONG)(
  "the client is killed again and again and the server now and then: every event counts once",
  seeded(async (random) => {
    await using ledger = await openLedger();
    const { good, bad, balances } = writeEvents(ledger.file, LINES, random);
    await using way = await ledger.openWay(() => null);
    await ledger.sendAndKill(way.url, random);
    expect(await ledger.sendRest(ledger.server.url)).toEndWith("; all of it is in the ledger\n");
    expect(differences(await ledger.balances(), balances)).toEqual([]);
    expect(rejectedFaults(ledger.file, bad)).toEqual([]);
    expect(ledger.events()).toBe(good.length);
  }),
);

// In the normal run a client dies, and answers are lost, at each point by name (tests/faults/process.test.ts,
// tests/client/client.test.ts).
test.if(IS_LONG)(
  "the same with a network that drops, delays and cuts requests and answers",
  seeded(async (random) => {
    await using ledger = await openLedger();
    const { good, bad, balances } = writeEvents(ledger.file, LINES, random);
    await using way = await ledger.openWay(() => badLuck(random));
    await ledger.sendAndKill(way.url, random);
    expect(await ledger.sendRest(way.url)).toEndWith("; all of it is in the ledger\n");
    expect(differences(await ledger.balances(), balances)).toEqual([]);
    expect(rejectedFaults(ledger.file, bad)).toEqual([]);
    expect(ledger.events()).toBe(good.length);
  }),
);

function badLuck(random: () => number): Fault {
  const faults: Fault[] = ["cut", "lose", "tear", { delayMs: random() * 50 }, { answer: 503 }];
  return random() < 0.4 ? (faults[Math.floor(random() * faults.length)] as Fault) : null;
}

/** The users whose balances are not those that are wanted. */
function differences(found: Record<string, string>, wanted: Record<string, string>): string[] {
  const users = Object.keys({ ...found, ...wanted });
  return users
    .filter((user) => found[user] !== wanted[user])
    .map((user) => `${user}: ${found[user]}, wanted ${wanted[user]}`);
}

/** A server with a ledger of its own, and a file to be sent. */
async function openLedger() {
  const database = await testDatabase();
  const folder = tempDir();
  const file = folder.file("a.jsonl");
  const journal = folder.file("data/eventsPost.jsonl");
  const app = { dataDir: folder.file("data"), databaseUrl: database.url };
  let server = await startApp(app);
  const size = () => statSync(journal).size;
  let mostBytes = Number.POSITIVE_INFINITY;

  return {
    file,
    server,
    balances: () => balances(database.url),
    /**
     * A way to the server. It waits where a client is to die: on a busy machine that would else be
     * through with the file before the test looks again.
     */
    openWay: (choose: () => Fault) =>
      openMeddler(server.url, async () => {
        await until(() => size() <= mostBytes, GOES_ON_MS, 1);
        return choose();
      }),
    /** Starts the client `KILLS` times; kills it when it is under way, and each third time the server before. */
    async sendAndKill(url: string, random: () => number) {
      const bytes = statSync(file).size;
      for (let kill = 0; kill < KILLS; kill++) {
        await using client = spawn("client.ts", { args: [file], env: { SERVER_URL: url } });
        const reach = (journalBytes: number) => {
          mostBytes = journalBytes + SLACK_BYTES;
          return until(
            () => size() > journalBytes || client.child.exitCode !== null,
            GOES_ON_MS,
            1,
          );
        };
        await reach(Math.max(size(), (bytes * (kill + random())) / (KILLS + 4)));
        if (kill % 3 === 0) {
          server.kill("SIGKILL");
          count("kills");
          await server.exit();
          server = await startApp({ ...app, env: { PORT: new URL(server.url).port } });
          await reach(size());
        }
        await Bun.sleep(random() * 10);
        client.kill("SIGKILL");
        count("kills");
        await client.exit();
        expect(client.child.signalCode).toBe("SIGKILL"); // it was not through before
      }
      mostBytes = Number.POSITIVE_INFINITY;
    },
    /** What the client says that has come to the end. */
    async sendRest(url: string) {
      const args = [file, "--wait"];
      const { code, stdout } = await run("client.ts", { args, env: { SERVER_URL: url } });
      expect(code).toBe(1); // some lines are bad
      return stdout;
    },
    /** The events in the journal. */
    events() {
      const lines = readFileSync(journal, "utf8").trimEnd().split("\n");
      return lines.filter((line) => !/^\{"(journal|frame|source)":/.test(line)).length;
    },
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      folder[Symbol.dispose]();
      await database.drop();
    },
  };
}
