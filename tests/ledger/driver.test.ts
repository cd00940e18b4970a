/**
 * What the patched driver promises when its connection is lost. postgres 3.4.9 as published breaks each of
 * these promises, which is why `patches/postgres@3.4.9.patch` exists: some promises never settle, some
 * exceptions cannot be caught, and one statement runs outside its transaction.
 *
 * Every client reaches a real Postgres through a proxy that the test cuts at a known moment.
 */
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from "bun:test";
import net from "node:net";
import postgres from "postgres";
import { testDatabase } from "../support/postgres.ts";

type Cut = "close" | "reset";

interface Client {
  sql: postgres.Sql;
  /** Cuts the connections, and returns when the driver has noticed. */
  cut(how: Cut): Promise<void>;
}

let database: Awaited<ReturnType<typeof testDatabase>>;
let wire: Awaited<ReturnType<typeof openWire>>;
let clients: Client[] = [];

beforeAll(async () => {
  database = await testDatabase();
}, 60_000); // an embedded Postgres may have to be created first

afterAll(async () => {
  await database.drop();
});

beforeEach(async () => {
  wire = await openWire(database.url);
});

afterEach(async () => {
  await Promise.all(clients.map(({ sql }) => sql.end({ timeout: 0 })));
  clients = [];
  await wire.close();
});

// A failure mostly shows as a promise that never settles, so a test does not wait long.
const limitMs = 1_500;

test("a statement after a COPY whose rows were read late is answered", async () => {
  const { sql } = client();
  const copied = sql.begin(async (tx) => {
    // What Postgres sends fills the stream, so that the driver stops reading the socket at its last row.
    const rows =
      await tx`copy (select repeat('n', 100) from generate_series(1, 1000)) to stdout`.readable();
    await Bun.sleep(100);
    let bytes = 0;
    for await (const chunk of rows) bytes += (chunk as Buffer).length;
    expect(bytes).toBe(101_000);
    expect(await one(tx as unknown as postgres.Sql)).toBe(1);
  });
  const late = Bun.sleep(limitMs).then(() => Promise.reject(new Error("no answer")));
  expect(await outcome(Promise.race([copied, late]))).toBe("ok");
});

test("a statement that fails after its first rows leaves the next one all of its own", async () => {
  const { sql } = client();
  const failing = sql`select n, 1 / (500 - n) from generate_series(1, 1000) as n`;
  expect(await outcome(failing)).toBe("22012");
  const rows = await sql`select 7 as n`;
  expect([...rows]).toEqual([{ n: 7 }]);
});

for (const how of ["close", "reset"] as const) {
  test(
    `a ${how} while a statement of a transaction runs rejects the transaction, and the pool still works`,
    async () => {
      const { sql } = client();
      for (let round = 0; round < 3; round++) {
        const posting = sql.begin(async (tx) => {
          const slow = tx`select pg_sleep(10)`.execute();
          wire.sent("pg_sleep").then(() => wire.cut(how));
          await slow;
        });
        expect(await outcome(posting)).toBe("CONNECTION_CLOSED");
        expect(await one(sql)).toBe(1);
        expect(await one(sql)).toBe(1);
      }
      expect(await outcome(sql.end())).toBe("ok");
    },
    limitMs,
  );

  test(
    `after a ${how} in the middle of a transaction none of its statements runs outside it`,
    async () => {
      const { sql, cut } = client();
      await sql`create table if not exists notes (note text)`;
      await sql`truncate notes`;
      const later: string[] = [];
      const done = Promise.withResolvers<void>();
      const posting = sql.begin(async (tx) => {
        await tx`insert into notes values ('inside')`;
        await cut(how);
        // The same connection object now serves the pool, on another backend.
        await sql`select 1`;
        later.push(await outcome(tx`insert into notes values ('stray')`));
        later.push(await outcome(tx.savepoint((sp) => sp`insert into notes values ('stray')`)));
        later.push(await outcome(tx`commit`));
        done.resolve();
      });
      expect(await outcome(posting)).toBe("CONNECTION_CLOSED");
      await done.promise;
      expect(later).toEqual(["CONNECTION_CLOSED", "CONNECTION_CLOSED", "CONNECTION_CLOSED"]);
      expect(await sql`select note from notes`).toHaveLength(0);
    },
    limitMs,
  );
}

test(
  "after a reset of all connections none of them waits before it reconnects",
  async () => {
    const { sql, cut } = client({ max: 8 });
    const all = () => Promise.all(Array.from({ length: 8 }, () => sql`select pg_sleep(0.02)`));
    await all();
    await cut("reset");
    await Bun.sleep(20);
    expect(await outcome(all())).toBe("ok");
  },
  limitMs,
);

test(
  "statements that are queued in a lost transaction are rejected",
  async () => {
    const { sql, cut } = client();
    const waiting: Promise<string>[] = [];
    const posting = sql.begin(async (tx) => {
      // A statement with parameters is described first; those after it wait in the transaction.
      waiting.push(outcome(tx`select pg_sleep(${10})`));
      waiting.push(outcome(tx`select 2`), outcome(tx`select 3`));
      await wire.sent("pg_sleep");
      await cut("close");
    });
    expect(await outcome(posting)).toBe("CONNECTION_CLOSED");
    expect(await Promise.all(waiting)).toEqual(Array(3).fill("CONNECTION_CLOSED"));
  },
  limitMs,
);

test(
  "the next query gets neither the error nor the rows of a query whose backend was killed",
  async () => {
    const { sql } = client({ fetch_types: false });
    const killed = sql`
      select g, case when g = 3 then pg_terminate_backend(pg_backend_pid()) end
      from generate_series(1, 5) g`;
    expect(await outcome(killed)).toBe("CONNECTION_CLOSED");
    expect(await sql`select 7 as n`).toEqual([{ n: 7 }] as never);
  },
  limitMs,
);

test(
  "a connection that is cut while it starts rejects only the query that waits for it",
  async () => {
    const { sql } = client();
    wire.cutAtOnce = true;
    expect(await outcome(sql`select 1`)).toBe("CONNECTION_CLOSED");
    wire.cutAtOnce = false;
    expect(await one(sql)).toBe(1);
  },
  limitMs,
);

test(
  "a reset while the driver reads the types rejects the query and throws nothing outside a promise",
  async () => {
    const { sql } = client();
    wire.resetOn = "pg_catalog.pg_type";
    expect(await outcome(sql`select 1`)).toBe("ECONNRESET");
    wire.resetOn = null;
    expect(await one(sql)).toBe(1);
  },
  limitMs,
);

test(
  "a transaction that begins while the pipeline is full has a connection of its own",
  async () => {
    const { sql } = client({ max_pipeline: 1 });
    await one(sql);
    const before = outcome(sql`select pg_sleep(0.05)`);
    await Bun.sleep(10);
    const posting = sql.begin((tx) => tx`select 1`);
    expect(await outcome(posting)).toBe("ok");
    expect(await before).toBe("ok");
  },
  limitMs,
);

test(
  "a cursor that is being read when its connection is lost does not write to the next connection",
  async () => {
    const { sql, cut } = client();
    const read = Promise.withResolvers<void>();
    const reading = outcome(
      sql`select generate_series(1, 100)`.cursor(10, async () => {
        await cut("close");
        await read.promise;
      }),
    );
    expect(await reading).toBe("CONNECTION_CLOSED");
    const next = outcome(sql`select pg_sleep(0.05)`);
    await Bun.sleep(30);
    read.resolve();
    expect(await next).toBe("ok");
    expect(await one(sql)).toBe(1);
  },
  limitMs,
);

test(
  "a reserved connection that is lost rejects its statements, and can still be released",
  async () => {
    const { sql, cut } = client();
    const reserved = await sql.reserve();
    await reserved`select 1`;
    await cut("close");
    expect(await outcome(reserved`select 2`)).toBe("CONNECTION_CLOSED");
    expect(await one(sql)).toBe(1);
    reserved.release();
    const again = await sql.reserve();
    expect(await one(again)).toBe(1);
    again.release();
  },
  limitMs,
);

test(
  "a caller that waits for a reserved connection gets one after a loss",
  async () => {
    const { sql, cut } = client();
    await one(sql);
    const slow = outcome(sql`select pg_sleep(10)`);
    await wire.sent("pg_sleep");
    const waiting = sql.reserve();
    await cut("close");
    expect(await slow).toBe("CONNECTION_CLOSED");
    const reserved = await waiting;
    expect(await one(reserved)).toBe(1);
    reserved.release();
  },
  limitMs,
);

test(
  "end() settles when the connection is lost during the last query",
  async () => {
    const { sql, cut } = client();
    await one(sql);
    const slow = outcome(sql`select pg_sleep(10)`);
    await wire.sent("pg_sleep");
    const ended = sql.end();
    await cut("close");
    expect(await slow).toBe("CONNECTION_CLOSED");
    expect(await outcome(ended)).toBe("ok");
  },
  limitMs,
);

test(
  "end() with a timeout settles a transaction whose server stopped answering",
  async () => {
    const { sql } = client();
    const posting = outcome(
      sql.begin(async (tx) => {
        wire.freeze();
        await tx`select ${1}::int`;
      }),
    );
    await Bun.sleep(50);
    await sql.end({ timeout: 0 });
    expect(await posting).toBe("CONNECTION_DESTROYED");
  },
  limitMs,
);

test(
  "cancelling a query throws nothing outside a promise if the server is unreachable",
  async () => {
    const { sql, cut } = client();
    await one(sql);
    const slow = sql`select pg_sleep(10)`;
    const slowOutcome = outcome(slow);
    await wire.sent("pg_sleep");
    wire.refuse();
    slow.cancel();
    await Bun.sleep(20);
    await cut("close");
    expect(await slowOutcome).toBe("CONNECTION_CLOSED");
  },
  limitMs,
);

test(
  "cancelling a query before its connection is open leaves the connection usable",
  async () => {
    const { sql } = client();
    const never = sql`select 1`;
    const neverOutcome = outcome(never);
    await Promise.resolve();
    never.cancel();
    expect(await neverOutcome).toBe("57014");
    await Bun.sleep(50);
    expect(await one(sql)).toBe(1);
  },
  limitMs,
);

/** A pool through the proxy, of one connection by default. */
function client(
  options: { fetch_types?: boolean; max?: number; max_pipeline?: number } = {},
): Client {
  let noticed = Promise.withResolvers<void>();
  const sql = postgres(wire.url, {
    max: 1,
    onnotice() {},
    ...options,
    onclose() {
      noticed.resolve();
      noticed = Promise.withResolvers<void>();
    },
  });
  const cut = async (how: Cut) => {
    const { promise } = noticed;
    wire.cut(how);
    await promise;
  };
  const made = { sql, cut };
  clients.push(made);
  return made;
}

/** "ok", or the code of the error. */
async function outcome(work: PromiseLike<unknown>): Promise<string> {
  try {
    await work;
    return "ok";
  } catch (error) {
    return (error as { code?: string }).code ?? String(error);
  }
}

async function one(sql: postgres.Sql | postgres.ReservedSql): Promise<unknown> {
  const [row] = await sql`select 1 as one`;
  return row?.["one"];
}

/** A TCP proxy in front of the database: `url` leads through it. */
async function openWire(databaseUrl: string) {
  const target = new URL(databaseUrl);
  const sides = new Map<net.Socket, net.Socket>();
  const awaited: { text: string; resolve(): void }[] = [];

  const server = net.createServer((near) => {
    near.on("error", () => {});
    if (self.cutAtOnce) return void near.destroy();
    const far = net.connect(Number(target.port || 5432), target.hostname);
    far.on("error", () => {});
    sides.set(near, far);
    near.on("data", (bytes) => {
      if (self.resetOn !== null && bytes.includes(self.resetOn)) return cut("reset");
      for (const { text, resolve } of awaited) if (bytes.includes(text)) resolve();
      far.write(bytes);
    });
    far.on("data", (bytes) => near.write(bytes));
    near.on("close", () => far.destroy());
    far.on("close", () => near.destroy());
  });

  function cut(how: Cut): void {
    for (const [near, far] of sides) {
      if (how === "reset") near.resetAndDestroy();
      else near.destroy();
      far.destroy();
    }
    sides.clear();
  }

  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = new URL(target);
  url.hostname = "127.0.0.1";
  url.port = String((server.address() as net.AddressInfo).port);

  const self = {
    url: url.href,
    /** Close every connection as soon as it is accepted. */
    cutAtOnce: false,
    /** Reset the connections when the client sends these bytes. */
    resetOn: null as string | null,
    cut,
    /** Settles when a client next sends this text. */
    sent: (text: string) => new Promise<void>((resolve) => awaited.push({ text, resolve })),
    /** Stop passing bytes on, in both directions. */
    freeze() {
      for (const side of [...sides.keys(), ...sides.values()]) side.removeAllListeners("data");
    },
    /** Accept no further connection; the existing ones stay. */
    refuse: () => void server.close(),
    async close() {
      cut("close");
      await new Promise<void>((resolve) => server.close(() => resolve()));
    },
  };
  return self;
}
