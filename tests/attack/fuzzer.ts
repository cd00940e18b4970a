/**
 * Requests from a grammar, some of them mutated, with an oracle beside the server: a model that knows from the
 * bytes that were sent and the answers what every balance must be. It shares no code with the server: an
 * amount of up to 15 digits is what a double shows of it.
 */
import { createHash } from "node:crypto";
import { gunzipSync, gzipSync, zstdCompressSync, zstdDecompressSync } from "node:zlib";

import { SECRET } from "../support/programs.ts";
import { randomOf } from "../support/random.ts";
import type { Target } from "./target.ts";

const REQUESTS = Number(process.env["ATTACK_REQUESTS"] ?? 20_400);
const MIN_ACCEPTED_SHARE = 1 / 3;
const LANES = 12;
const UNITS = 10n ** 9n;

type Random = () => number;
const one = <T>(random: Random, of: readonly T[]): T => of[Math.floor(random() * of.length)] as T;

/** Fills a database of its own, so that there is nothing but what it has sent. */
export async function fuzz(target: Target, seed: number): Promise<string> {
  const model = new Model();
  const before = await balancesOf(target);
  if (before.size > 0) model.begin(before);
  let next = 0;
  let accepted = 0;
  const lane = async (number: number) => {
    const sender = new Sender(target, model, `${seed.toString(36)}-${number}`);
    while (next < REQUESTS) {
      const request = next++;
      const random = randomOf(seed * 31 + request);
      try {
        if (await sender.send(random)) accepted++;
      } catch (error) {
        throw new Error(`request ${request} of seed ${seed}: ${(error as Error).message}`);
      }
    }
  };
  await Promise.all(Array.from({ length: LANES }, (_, i) => lane(i)));
  await target.settled();
  const wrong = model.differences(await balancesOf(target));
  if (wrong.length > 0)
    throw new Error(`${wrong.length} balances differ: ${wrong.slice(0, 5).join("; ")}`);
  if (accepted < REQUESTS * MIN_ACCEPTED_SHARE)
    throw new Error(`only ${accepted} requests were accepted`);
  return `${REQUESTS} requests, ${accepted} accepted, ${model.events} events, ${model.users} users, all exact`;
}

async function balancesOf(target: Target): Promise<Map<string, string>> {
  const headers = { accept: "application/x-ndjson" };
  const text = await (await fetch(`${target.url}/userEvents`, { headers })).text();
  const rows = text.split("\n").filter(Boolean);
  return new Map(
    rows.map((row) => {
      const { user_id, revenue } = JSON.parse(row) as { user_id: string; revenue: string };
      return [user_id, revenue];
    }),
  );
}

interface Counted {
  user: string;
  units: bigint;
  id: string | undefined;
  identity: string;
}

/** What every balance must be. */
class Model {
  events = 0;
  readonly #sums = new Map<string, bigint>();
  readonly #claims = new Map<string, string>();

  get users(): number {
    return this.#sums.size;
  }

  begin(balances: Map<string, string>): void {
    for (const [user, revenue] of balances) this.#sums.set(user, unitsOf(revenue));
  }

  /** An event that the server has accepted. Of one id, the first counts. */
  count({ user, units, id, identity }: Counted): void {
    this.events++;
    if (id !== undefined && this.#claims.has(id)) return;
    if (id !== undefined) this.#claims.set(id, identity);
    this.#sums.set(user, (this.#sums.get(user) ?? 0n) + units);
  }

  differences(found: Map<string, string>): string[] {
    const wrong: string[] = [];
    for (const [user, sum] of this.#sums) {
      const balance = found.get(user);
      if (balance === undefined || unitsOf(balance) !== sum)
        wrong.push(`${JSON.stringify(user)} has ${balance}, expected ${sum} billionths`);
    }
    for (const user of found.keys())
      if (!this.#sums.has(user)) wrong.push(`${JSON.stringify(user)} was never accepted`);
    return wrong;
  }
}

/** Billionths, from a decimal. */
function unitsOf(decimal: string): bigint {
  const [, sign, whole = "0", fraction = ""] = /^(-?)(\d*)\.?(\d*)$/.exec(decimal) ?? [];
  const units = BigInt(whole || "0") * UNITS + BigInt(fraction.padEnd(9, "0"));
  return sign ? -units : units;
}

/** The event of a line that the server has accepted. */
function parse(text: string, key?: string): Counted {
  const event = JSON.parse(text) as { userId: string; name: string; value: number; id?: string };
  const { userId: user, name, value } = event;
  const id = event.id ?? key;
  const [, sign, digits, fraction = "", exponent = "0"] =
    /^(-?)(\d+)\.?(\d*)(?:e([+-]\d+))?$/.exec(String(value)) ?? [];
  if (digits === undefined) throw new Error(`no amount in an accepted line: ${text.slice(0, 200)}`);
  const shift = 9 + Number(exponent) - fraction.length;
  const scaled = BigInt(digits + fraction) * 10n ** BigInt(Math.max(0, shift));
  const units = shift < 0 ? scaled / 10n ** BigInt(-shift) : scaled;
  const isNegative = (sign === "-") !== (name === "subtract_revenue");
  return { user, units: isNegative ? -units : units, id, identity: text };
}

const USERS = [
  "ann",
  "__proto__",
  "constructor",
  "é€😀",
  "a\tb",
  "..",
  "a/b",
  '"',
  "\\",
  "x".repeat(256),
];
const GOOD_VALUES = [
  ...[
    "0",
    "-0",
    "98",
    "1.5e3",
    "0.1",
    "1e-9",
    "999999999999999",
    "-12.25",
    "1E2",
    "123456.123456789",
  ],
  ...["0.000000001", "-1e14", "2.50", "100e-2"],
];
const BAD_VALUES = [
  "1e999",
  "1e-10",
  "1e15",
  "null",
  '"98"',
  "true",
  "[]",
  "01",
  "1.",
  "NaN",
  "1234567890123456",
  "",
];

/** Sends requests one after the other, so that it knows their order. Its users are its own. */
class Sender {
  #source = { name: "", offset: 0, hash: createHash("sha256") };
  #ids = 0;

  constructor(
    private readonly target: Target,
    private readonly model: Model,
    private readonly prefix: string,
  ) {}

  /** Sends one request. Returns whether it was accepted. Throws if the answer is wrong. */
  async send(random: Random): Promise<boolean> {
    const kind = random();
    if (kind < 0.4) return this.#single(random);
    if (kind < 0.65) return this.#many(random);
    if (kind < 0.85) return this.#piece(random);
    return this.#read(random);
  }

  #event(random: Random): string {
    const user = JSON.stringify(`${this.prefix}${one(random, USERS)}`.slice(0, 200));
    const isBad = random() < 0.12;
    const fields = [
      `"userId":${isBad && random() < 0.3 ? one(random, ['""', "7", '"\\ud800"', '"\\u0000"']) : user}`,
      `"name":"${isBad && random() < 0.3 ? "refund" : one(random, ["add_revenue", "subtract_revenue"])}"`,
      `"value":${isBad ? one(random, BAD_VALUES) : one(random, GOOD_VALUES)}`,
    ];
    if (random() < 0.3)
      fields.push(
        `"id":"${this.prefix}.${random() < 0.7 ? this.#ids++ : Math.floor(random() * (this.#ids + 1))}"`,
      );
    if (random() < 0.2)
      fields.push(`"more":${one(random, ["[1,{}]", '{"value":7,"userId":1}', '"\\n"', "1e400"])}`);
    if (random() < 0.3) fields.reverse();
    const blank = random() < 0.2 ? " " : "";
    return `{${fields.join(`,${blank}`)}${blank}}`;
  }

  #lines(random: Random): Buffer {
    const lines = Array.from({ length: 1 + random() ** 3 * 40 }, () =>
      random() < 0.05 ? one(random, ["", " ", "x", "{}", "[]", "\ufeff"]) : this.#event(random),
    );
    const text = lines.join(one(random, ["\n", "\n", "\r\n"])) + one(random, ["\n", "\n", ""]);
    return mutated(Buffer.from(text), random, 0.15);
  }

  async #single(random: Random): Promise<boolean> {
    const body = mutated(Buffer.from(this.#event(random)), random, 0.12);
    const key = random() < 0.2 ? `${this.prefix}k${this.#ids++}` : undefined;
    const { status, text } = await this.#request("POST", "/liveEvent", random, {
      body,
      headers: { "content-type": "application/json", ...(key ? { "idempotency-key": key } : {}) },
    });
    if (status !== 201) return expected(status, [400, 401, 413, 415, 422], text);
    this.model.count(parse(decoded(body), key));
    return true;
  }

  async #many(random: Random): Promise<boolean> {
    const body = this.#lines(random);
    const { status, text } = await this.#request(
      "POST",
      "/liveEvents?errors=20000",
      random,
      compressed(body, random),
    );
    if (status !== 201) return expected(status, [400, 401, 413, 415], text);
    this.#countLines(body, text);
    return true;
  }

  async #piece(random: Random): Promise<boolean> {
    if (this.#source.name === "" || random() < 0.1)
      this.#source = { name: `${this.prefix} ${random()}`, offset: 0, hash: createHash("sha256") };
    const { name, offset, hash } = this.#source;
    const body = this.#lines(random);
    const next = hash.copy().update(body);
    const isLost = random() < 0.1;
    const { headers, ...sent } = compressed(body, random);
    const at = isLost && random() < 0.5 ? offset + 1 : offset;
    const digest = isLost && at === offset ? "0".repeat(64) : next.copy().digest("hex");
    const path = `/sources/${encodeURIComponent(name)}?errors=20000`;
    const answer = await this.#request("PATCH", path, random, {
      ...sent,
      headers: { ...headers, "upload-offset": `${at}`, "source-digest": digest },
    });
    if (answer.status !== 200) {
      // What was not stored leaves the source where it is.
      return expected(answer.status, [400, 401, 409, 413, 415, 422], answer.text);
    }
    if (isLost) throw new Error("stored at a wrong offset or digest");
    // In the middle of a source a BOM belongs to its line.
    this.#countLines(body, answer.text, offset > 0);
    this.#source = { name, offset: offset + body.length, hash: next };
    return true;
  }

  async #read(random: Random): Promise<boolean> {
    const user = encodeURIComponent(`${this.prefix}${one(random, USERS)}`.slice(0, 200));
    const path = one(random, [
      ...[
        `/userEvents/${user}`,
        `/userEvents?user_id=${user}`,
        "/userEvents?limit=7",
        "/quarantine?limit=3",
      ],
      ...[
        "/healthz",
        "/readyz",
        "/revenue",
        "/metrics",
        "/userEvents?cursor=%ff",
        "/userEvents?limit=x",
      ],
      ...[
        "/userEvents/a?after=x",
        "/nothing",
        "/%ff",
        `/sources/${user}`,
        "/userEvents?order=revenue",
      ],
    ]);
    const { status, text } = await this.#request("GET", path, random, {});
    return status === 200 || expected(status, [404, 405, 422], text);
  }

  async #request(
    method: string,
    path: string,
    random: Random,
    { body, headers = {} }: { body?: Buffer; headers?: Record<string, string> },
  ) {
    const authorization = random() < 0.004 ? one(random, ["", "wrong", "Bearer x.y.z"]) : SECRET;
    const type =
      random() < 0.04 ? "text/plain" : (headers["content-type"] ?? "application/x-ndjson");
    const response = await fetch(this.target.url + path, {
      method,
      headers: { ...headers, authorization, "content-type": type },
      ...(body ? { body: new Uint8Array(body) } : {}),
      signal: AbortSignal.timeout(30_000),
    });
    const text = await response.text();
    if (response.status >= 400 && JSON.parse(text).status !== response.status)
      throw new Error(`no problem document: ${text.slice(0, 200)}`);
    return { status: response.status, text };
  }

  /** Counts the lines that an answer does not list as rejected. */
  #countLines(body: Buffer, answer: string, isInside = false): void {
    const { accepted, errors } = JSON.parse(answer) as {
      accepted: number;
      errors: { line: number }[];
    };
    const bad = new Set(errors.map(({ line }) => line));
    let good = 0;
    const bytes = !isInside && body.subarray(0, 3).equals(BOM) ? body.subarray(3) : body;
    for (let from = 0, number = 1; from < bytes.length; number++) {
      const newline = bytes.indexOf(10, from);
      const to = newline < 0 ? bytes.length : newline;
      const text = bytes.subarray(from, to);
      from = to + 1;
      if (bad.has(number) || text.every((byte) => byte === 32 || byte === 9 || byte === 13))
        continue;
      this.model.count(parse(text.toString()));
      good++;
    }
    if (good !== accepted)
      throw new Error(
        `${accepted} lines accepted, ${good} are not rejected: ${answer.slice(0, 300)}`,
      );
  }
}

const BOM = Buffer.from("\ufeff");

function decoded(body: Buffer): string {
  return (body.subarray(0, 3).equals(BOM) ? body.subarray(3) : body).toString();
}

/** A refused request must have one of these. */
function expected(status: number, wanted: number[], text: string): false {
  if (!wanted.includes(status)) throw new Error(`answered ${status}: ${text.slice(0, 300)}`);
  return false;
}

/** The same body, plain or compressed. */
function compressed(
  body: Buffer,
  random: Random,
): { body: Buffer; headers: Record<string, string> } {
  const coding = one(random, ["", "", "gzip", "zstd", "br"]);
  if (coding === "" || (coding === "br" && random() < 0.8)) return { body, headers: {} };
  const packed =
    coding === "gzip" ? gzipSync(body) : coding === "zstd" ? zstdCompressSync(body) : body;
  const sent = random() < 0.1 ? mutated(packed, random, 1) : packed;
  const isSame = sent.equals(packed) || isSameContent(coding, sent, body);
  // A mutation that leaves the content valid, but another one, is not what the oracle knows.
  return {
    body: isSame || isBroken(coding, sent) ? sent : packed,
    headers: { "content-encoding": coding },
  };
}

function isSameContent(coding: string, sent: Buffer, body: Buffer): boolean {
  try {
    return (coding === "gzip" ? gunzipSync(sent) : zstdDecompressSync(sent)).equals(body);
  } catch {
    return false;
  }
}

function isBroken(coding: string, sent: Buffer): boolean {
  if (coding === "br") return true;
  try {
    return (coding === "gzip" ? gunzipSync(sent) : Bun.zstdDecompressSync(sent)) === null;
  } catch {
    return true;
  }
}

/** With these odds, bytes inserted, removed, repeated or cut off. */
function mutated(bytes: Buffer, random: Random, odds: number): Buffer {
  if (random() >= odds || bytes.length === 0) return bytes;
  const at = Math.floor(random() * bytes.length);
  const to = Math.min(bytes.length, at + 1 + Math.floor(random() ** 3 * 40));
  const [head, middle, tail] = [bytes.subarray(0, at), bytes.subarray(at, to), bytes.subarray(to)];
  const junk = Buffer.from(Array.from({ length: 1 + random() * 4 }, () => random() * 256));
  return Buffer.concat(
    one(random, [
      [head, junk, middle, tail],
      [head, tail],
      [head, middle, middle, tail],
      [head],
      [
        head,
        Buffer.from(one(random, ["\n", "\r", "\0", "\ufeff", "{", "\u2028", '"'])),
        middle,
        tail,
      ],
    ]),
  );
}
