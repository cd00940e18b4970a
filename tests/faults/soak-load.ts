/**
 * The load of a soak, and the oracle that knows what it must add up to. What is acknowledged counts once.
 * What was not answered is known in one of these ways:
 *
 * - an event with an id is sent again, to either server, until it is answered;
 * - an event without an id may have counted or not. Each lane sends its events to a user of its own, and
 *   after a lost answer to another one: so a user has at most one event of which that is not known;
 * - a file is sent by `client.ts`, or posted by `processor.ts`, until that says that all of it is there.
 *
 * Amounts are in cents. The oracle keeps one number for each user, and one user for each lost answer.
 */
import { appendFileSync, rmSync, writeFileSync } from "node:fs";

import { event, line } from "../support/events.ts";
import { SECRET, type spawn } from "../support/programs.ts";

const POOL = 2_000;
const LINES = 100;
/** A request without an answer for so long counts as lost. */
const ANSWER_MS = 20_000;

type Program = ReturnType<typeof spawn>;

interface World {
  /** Never killed. */
  steady: string;
  /** Killed. */
  killed: string;
  /** Its disk fills up. */
  small: string;
  /** Runs a program until `isDone` says that nothing is left to do. */
  start(program: string, args: string[], env?: Record<string, string>): Program;
  /** A path in the folder of the soak. */
  file(name: string): string;
  /** Notes what breaks a promise. */
  fail(what: string): void;
  stop: AbortSignal;
}

export function openOracle() {
  const cents = new Map<string, number>();
  const unknown = new Map<string, number>();
  let events = 0;
  return {
    add(user: string, amount: number) {
      cents.set(user, (cents.get(user) ?? 0) + amount);
      events++;
    },
    /** An event of which nobody knows whether it counted: the only one of this user. */
    doubt: (user: string, amount: number) => void unknown.set(user, amount),
    figures: () => ({ events, users: cents.size, unanswered: unknown.size }),
    /** The users whose balances are not what they must be. */
    differences(balances: Map<string, number>): string[] {
      const users = new Set([...cents.keys(), ...unknown.keys(), ...balances.keys()]);
      return [...users].flatMap((user) => {
        const found = balances.get(user) ?? 0;
        const wanted = cents.get(user) ?? 0;
        const more = unknown.get(user);
        if (found === wanted || (more !== undefined && found === wanted + more)) return [];
        return [`${user} has ${found}, expected ${wanted}${more ? ` or ${wanted + more}` : ""}`];
      });
    },
  };
}

export type Oracle = ReturnType<typeof openOracle>;

const pick = (below: number) => Math.floor(Math.random() * below);
/** Never zero, so that it shows whether an event counted. */
const someCents = () => 1 + pick(100_000);
const poolUser = () => `user${pick(POOL)}`;
const post = (url: string, body: string | Uint8Array<ArrayBuffer>, headers: object = {}) =>
  fetch(url, {
    method: "POST",
    headers: { authorization: SECRET, "content-type": "application/json", ...headers },
    body,
    signal: AbortSignal.timeout(ANSWER_MS),
  });

/** Sends everything until `stop`; the promise settles when the last answer is known. */
export async function load(world: World, oracle: Oracle, counts: Counts): Promise<void> {
  const { steady, killed, small, file, fail, stop } = world;
  const run = crypto.randomUUID().slice(0, 8);
  let serial = 0;

  /** Calls `send` again and again, with a pause of about `pauseMs`. */
  async function lane(pauseMs: number, send: () => Promise<void>): Promise<void> {
    while (!stop.aborted) {
      await send();
      await Bun.sleep(pauseMs * (0.5 + Math.random()));
    }
  }

  /** Single events without ids. 503 and 507 promise that nothing was stored. */
  function plain(name: string, url: string, pauseMs: number, more: object = {}) {
    let generation = 0;
    return lane(pauseMs, async () => {
      const user = `${name}.${generation}`;
      const amount = someCents();
      try {
        const { status } = await post(`${url}/liveEvent`, event(user, amount / 100, more));
        if (status === 201) oracle.add(user, amount);
        else if (status === 503 || status === 507) {
          counts.add(`answers ${status}`);
          await Bun.sleep(200);
        } else fail(`POST /liveEvent of ${user} answered ${status}`);
      } catch (error) {
        if (url === steady) fail(`the server that is never killed gave no answer to ${user}`);
        await Bun.sleep(200);
        if ((error as { code?: string }).code === "ConnectionRefused") return; // it was never sent
        oracle.doubt(user, amount);
        generation++;
        counts.add("answers lost");
      }
    });
  }

  /** Sends until it is answered with 201, each time to the other server. */
  async function insist(path: string, body: string | Uint8Array<ArrayBuffer>, headers = {}) {
    for (let tries = 0; ; tries++) {
      const url = tries % 2 === 0 ? killed : steady;
      const response = await post(url + path, body, headers).catch(() => null);
      if (response?.status === 201) return response;
      if (response && response.status !== 503) {
        fail(`POST ${path} answered ${response.status}: ${await response.text()}`);
        return response;
      }
      if (tries === 100) throw new Error(`POST ${path} was not answered 100 times`);
      counts.add("sent again");
      await Bun.sleep(200);
    }
  }

  const withIds = () =>
    lane(40, async () => {
      const [user, amount, id] = [poolUser(), someCents(), `${run}.${serial++}`];
      const isHeader = serial % 2 === 0;
      const body = event(user, amount / 100, isHeader ? {} : { id });
      const headers = isHeader ? { "idempotency-key": id } : {};
      await insist("/liveEvent", body, headers);
      oracle.add(user, amount);
      if (pick(10) > 0) return;
      counts.add("repeated ids");
      await insist("/liveEvent", body, headers);
    });

  /** Events of the pool as lines; `count` them once they are sure to be stored. */
  function someLines(size: number, withIds: boolean, name = "add_revenue") {
    const sign = name === "add_revenue" ? 1 : -1;
    const events = Array.from({ length: size }, () => ({ user: poolUser(), amount: someCents() }));
    const more = () => ({ name, ...(withIds ? { id: `${run}.${serial++}` } : {}) });
    return {
      text: events.map(({ user, amount }) => line(user, amount / 100, more())).join(""),
      count: () => events.forEach(({ user, amount }) => oracle.add(user, sign * amount)),
    };
  }

  const bulk = () =>
    lane(300, async () => {
      const lines = someLines(LINES, false, pick(2) ? "add_revenue" : "subtract_revenue");
      const headers = { "content-type": "application/x-ndjson" };
      const response = await post(`${steady}/liveEvents`, lines.text, headers).catch(() => null);
      if (!response) return fail("the server that is never killed gave no answer to a bulk");
      if (response.status === 503) return counts.add("answers 503");
      if (response.status !== 201) return fail(`POST /liveEvents answered ${response.status}`);
      lines.count();
    });

  const bulkWithIds = () =>
    lane(500, async () => {
      const lines = someLines(LINES, true);
      const bad = pick(10) === 0 ? "not an event\n" : "";
      const body = Bun.gzipSync(Buffer.from(lines.text + bad));
      const headers = { "content-type": "application/x-ndjson", "content-encoding": "gzip" };
      const answer = (await (await insist("/liveEvents", body, headers)).json()) as {
        accepted: number;
        rejected: number;
      };
      if (answer.accepted !== LINES || answer.rejected !== (bad ? 1 : 0))
        fail(`${LINES} lines and ${bad ? 1 : 0} bad: ${JSON.stringify(answer)}`);
      lines.count();
    });

  const followed = () =>
    lane(500, async () => {
      const lines = someLines(50, false);
      appendFileSync(file("followed.jsonl"), lines.text);
      lines.count();
    });

  /** Runs a program with a file until it exits with 0; half of the time it is killed first. */
  async function finish(program: string, path: string, env: Record<string, string>) {
    for (let tries = 0; ; tries++) {
      await using process = world.start(program, [path], env);
      if (tries === 0 && pick(2) === 0) {
        await Bun.sleep(pick(1_500));
        process.kill("SIGKILL");
        counts.add(`kills of ${program} FILE`);
      }
      const code = await process.exit();
      if (code === 0) return;
      // Without Postgres, `processor.ts FILE` gives up after a while; the client, when told to.
      if (code !== null && tries > 20)
        return fail(`${program} ${path} exits with ${code}: ${process.stderr.text()}`);
    }
  }

  const sentFiles = () =>
    lane(20_000, async () => {
      const path = file(`sent-${serial++}.jsonl`);
      const lines = someLines(300, false);
      writeFileSync(path, lines.text);
      const SERVER_URL = pick(2) ? steady : killed;
      await finish("client.ts", path, { SERVER_URL });
      if (pick(2)) await finish("client.ts", path, { SERVER_URL });
      lines.count();
      rmSync(path);
    });

  const postedFiles = () =>
    lane(30_000, async () => {
      const path = file(`posted-${serial++}.jsonl`);
      const lines = someLines(300, false);
      writeFileSync(path, lines.text); // `--verify` needs it at the end
      await finish("processor.ts", path, {});
      if (pick(2)) await finish("processor.ts", path, {});
      lines.count();
    });

  writeFileSync(file("followed.jsonl"), "");
  const four = [1, 2, 3, 4];
  await Promise.all([
    ...four.map((n) => plain(`steady${n}`, steady, 40)),
    ...four.map((n) => plain(`killed${n}`, killed, 40)),
    ...four.map(withIds),
    plain("small", small, 100, { note: "n".repeat(300) }),
    ...[bulk(), bulkWithIds(), followed(), sentFiles(), postedFiles()],
  ]);
}

/** Looks at the pages of both servers until `stop`; some viewers hang up. */
export async function view({ steady, killed, fail, stop }: World, counts: Counts): Promise<void> {
  const paths = [
    ...["/", "/metrics", "/quarantine", "/openapi", "/readyz?reads", "/userEvents/user1"],
    ...["/revenue?step=minute", "/revenue?step=day", "/userEvents?order=revenue"],
  ];
  const rest = async (response: Response, mayHangUp: boolean) => {
    if (!response.body) return;
    const reader = response.body.getReader();
    const untilMs = performance.now() + Math.random() * 10_000;
    while (!(await reader.read()).done)
      if (mayHangUp && performance.now() > untilMs) {
        counts.add("viewers that hung up");
        return reader.cancel();
      }
  };
  const look = async (url: string, path: string, headers = {}, mayHangUp = false) => {
    const gone = AbortSignal.any([stop, AbortSignal.timeout(120_000)]);
    try {
      const response = await fetch(url + path, { headers, signal: gone });
      if (![200, 404, 503, 504].includes(response.status))
        fail(`GET ${path} answered ${response.status}`);
      counts.add("views");
      await rest(response, mayHangUp);
    } catch (error) {
      if (
        url === steady &&
        !gone.aborted &&
        path !== "/live" &&
        !/csv/.test(JSON.stringify(headers))
      )
        fail(`GET ${path} of the server that is never killed failed: ${(error as Error).message}`);
    }
  };
  const list = async (url: string) => {
    let next: string | null = "";
    while (next !== null && !stop.aborted) {
      const query = `/userEvents?limit=1000${next && `&cursor=${next}`}`;
      const response = await fetch(url + query, { signal: AbortSignal.timeout(20_000) }).catch(
        () => null,
      );
      if (response?.status !== 200) return;
      ({ next } = (await response.json()) as { next: string | null });
    }
    counts.add("views");
  };
  const lane = async (pauseMs: number, one: () => Promise<void>) => {
    for (; !stop.aborted; await Bun.sleep(pauseMs * (0.5 + Math.random()))) await one();
  };
  await Promise.all(
    [steady, killed].flatMap((url) => [
      lane(500, () => look(url, paths[pick(paths.length)] as string)),
      lane(3_000, () => list(url)),
      lane(4_000, () => look(url, "/userEvents", { accept: "text/csv" }, pick(2) === 0)),
      lane(1_000, () => look(url, "/live")),
      lane(1_000, () => look(url, "/live", {}, true)),
    ]),
  );
}

export function openCounts() {
  const counts = new Map<string, number>();
  return {
    add: (what: string, more = 1) => void counts.set(what, (counts.get(what) ?? 0) + more),
    get: (what: string) => counts.get(what) ?? 0,
    all: () => [...counts].toSorted(),
  };
}

export type Counts = ReturnType<typeof openCounts>;
