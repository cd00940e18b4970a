/**
 * Each event of a file counts once, whatever happens while it is sent: the client, or the server with its
 * processor, is killed; the network drops, delays and cuts. The test computes the expected
 * balances from the file that it wrote.
 */
import { expect, setDefaultTimeout } from "bun:test";
import { readFileSync, statSync } from "node:fs";

import { count } from "../faults/figures.ts";
import { rejectedFaults, writeEvents } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { type Fault, openMeddler } from "../support/network.ts";
import { run, spawn, until } from "../support/programs.ts";
import { longTest, seeded } from "../support/random.ts";

setDefaultTimeout(300_000);

const LINES = 40_000;
const KILLS = 10;
/** A client that fails five times in a row pauses for 10 s altogether, and then for 5 s each time. */
const MAX_WAIT_MS = 120_000;
/** How many bytes may reach the journal after the point at which a client is to be killed. */
const MAX_SLACK_BYTES = 1024 * 1024;

longTest(
  "every event counts once when the client is killed repeatedly, and the server with every third kill",
  seeded(async (random) => {
    await using ledger = await openSending();
    const { good, bad, balances } = writeEvents(ledger.file, LINES, random);
    await using proxy = await ledger.openProxy(() => null);
    await ledger.sendAndKill(proxy.url, random);
    expect(await ledger.sendRest(ledger.server.url)).toEndWith("; all of it is in the ledger\n");
    expect(differences(await ledger.balances(), balances)).toEqual([]);
    expect(rejectedFaults(ledger.file, bad)).toEqual([]);
    expect(ledger.events()).toBe(good.length);
  }),
);

// In the normal run, a client dies and answers are lost at each point once (tests/faults/process.test.ts,
// tests/client/client.test.ts).
longTest(
  "every event counts once when the network also drops, delays and cuts requests and answers",
  seeded(async (random) => {
    await using ledger = await openSending();
    const { good, bad, balances } = writeEvents(ledger.file, LINES, random);
    await using proxy = await ledger.openProxy(() => badLuck(random));
    await ledger.sendAndKill(proxy.url, random);
    expect(await ledger.sendRest(proxy.url)).toEndWith("; all of it is in the ledger\n");
    expect(differences(await ledger.balances(), balances)).toEqual([]);
    expect(rejectedFaults(ledger.file, bad)).toEqual([]);
    expect(ledger.events()).toBe(good.length);
  }),
);

function badLuck(random: () => number): Fault {
  const faults: Fault[] = ["cut", "lose", "tear", { delayMs: random() * 50 }, { answer: 503 }];
  return random() < 0.4 ? (faults[Math.floor(random() * faults.length)] as Fault) : null;
}

/** The users whose balances are not the expected ones. */
function differences(found: Record<string, string>, expected: Record<string, string>): string[] {
  const users = Object.keys({ ...found, ...expected });
  return users
    .filter((user) => found[user] !== expected[user])
    .map((user) => `${user}: ${found[user]}, expected ${expected[user]}`);
}

/** A server with its own ledger, and a file to send. */
async function openSending() {
  const ledger = await openLedger();
  const file = ledger.file("a.jsonl");
  let server = await ledger.start();
  const size = () => statSync(ledger.journal).size;
  let maxBytes = Number.POSITIVE_INFINITY;

  return {
    file,
    server,
    balances: ledger.balances,
    /**
     * A proxy to the server. It delays requests at the point at which a client is to be killed. Without it,
     * the client could finish the file on a busy machine before the test looks again.
     */
    openProxy: (choose: () => Fault) =>
      openMeddler(server.url, async () => {
        await until(() => size() <= maxBytes, MAX_WAIT_MS, 1);
        return choose();
      }),
    /** Starts the client `KILLS` times and kills it half-way; each third time, it kills the server first. */
    async sendAndKill(url: string, random: () => number) {
      const bytes = statSync(file).size;
      for (let kill = 0; kill < KILLS; kill++) {
        await using client = spawn("client.ts", { args: [file], env: { SERVER_URL: url } });
        const reach = (journalBytes: number) => {
          maxBytes = journalBytes + MAX_SLACK_BYTES;
          return until(
            () => size() > journalBytes || client.child.exitCode !== null,
            MAX_WAIT_MS,
            1,
          );
        };
        await reach(Math.max(size(), (bytes * (kill + random())) / (KILLS + 4)));
        if (kill % 3 === 0) {
          server.kill("SIGKILL");
          count("kills");
          await server.exit();
          server = await ledger.start({ PORT: new URL(server.url).port });
          await reach(size());
        }
        await Bun.sleep(random() * 10);
        client.kill("SIGKILL");
        count("kills");
        await client.exit();
        expect(client.child.signalCode).toBe("SIGKILL"); // it had not finished before
      }
      maxBytes = Number.POSITIVE_INFINITY;
    },
    /** Sends the rest of the file, and returns the summary. */
    async sendRest(url: string) {
      const args = [file, "--wait"];
      const { code, stdout } = await run("client.ts", { args, env: { SERVER_URL: url } });
      expect(code).toBe(1); // some lines are bad
      return stdout;
    },
    /** The events in the journal. */
    events() {
      const lines = readFileSync(ledger.journal, "utf8").trimEnd().split("\n");
      return lines.filter((line) => !/^\{"(journal|frame|source)":/.test(line)).length;
    },
    async [Symbol.asyncDispose]() {
      await server[Symbol.asyncDispose]();
      await ledger[Symbol.asyncDispose]();
    },
  };
}
