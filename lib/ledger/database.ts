/**
 * The way to Postgres: connections that are replaced when they are lost, the schema, and a bound on how
 * long anybody waits.
 */
import postgres from "postgres";

import SCHEMA from "../../schema.sql" with { type: "text" };
import { type DriverOptions, parseDatabaseUrl, type Session } from "./url.ts";

export type Sql = postgres.Sql;
export type Transaction = postgres.TransactionSql;
export type PostgresError = postgres.PostgresError;
/** Either of the two. */
export type Statements = postgres.ISql;

/** `this_version` of schema.sql. */
export const LEDGER_VERSION = 2;

/** Postgres ends a transaction whose client has sent nothing for this long, and releases its locks. */
const IDLE_MS = 10_000;
const SCHEMA_TIMEOUT_MS = 10_000;
/** Outlasts the timeouts of Postgres, so that Postgres can say itself what took too long. */
const DEADLINE_MS = 15_000;
/** A connection that is given up has this long for what others are doing on it. */
const END_S = 1;
/** For what a request waits for. */
export const READ_DEADLINE_MS = 2_000;

/**
 * The database could not do it. If `isTransient`, the same may succeed later (it is down, restarts or is
 * busy). Otherwise it refuses, and a person must look. The message is one line without a secret.
 */
export class Unavailable extends Error {
  constructor(
    message: string,
    readonly isTransient: boolean,
  ) {
    super(`database: ${message}`);
  }
}

/**
 * Postgres refuses what a row contains: a constraint, a domain, a trigger. That is not an outage, and the
 * same rows will be refused again. The message is Postgres' own, without the values.
 */
export class RowRefused extends Unavailable {
  constructor(readonly reason: string) {
    super(reason, false);
  }
}

/**
 * The ledger cannot be used as it is: a table could not hold exact balances, or another version of this
 * program made it what it is. The message says how to change that.
 */
export class LedgerRefused extends Unavailable {
  constructor(message: string) {
    super(message, false);
  }
}

/** Thrown by `work` of `Database.use` when the cause is not the database: it is passed on unchanged. */
export class CannotProceed extends Error {}

export type Database = ReturnType<typeof openDatabase>;

/** Connections to one of the hosts. `sql` are those that are used, or tried, until it is given up. */
interface Pool {
  sql: Sql | null;
  isReady: boolean;
  isGivenUp: boolean;
  ready: Promise<Sql>;
}

/**
 * Opens up to `max` connections to a database. `url` is called for each new pool, because an embedded
 * Postgres may have moved. `pg_stat_activity` shows the connections as `daybook NAME`.
 */
export function openDatabase(url: () => string, name: string, max: number) {
  let pool: Pool | null = null;
  /** The number of the host that is tried next: the one after that which failed. */
  let next = 0;

  return {
    /**
     * The result of `work`, which is given connections to a database that has the schema. Throws
     * CannotProceed if `work` does, and Unavailable for everything else that fails, after `deadlineMs` at
     * the latest: the driver's promise for a lost connection may never settle.
     */
    async use<T>(work: (sql: Sql) => PromiseLike<T>, deadlineMs = DEADLINE_MS): Promise<T> {
      let timer: Timer | undefined;
      const used = (pool ??= openPool());
      try {
        let pending: PromiseLike<T> & { cancel?(): void };
        const deadline = new Promise<never>((_, reject) => {
          timer = setTimeout(() => {
            pending?.cancel?.(); // a single statement has no timeout of its own: it would wait in Postgres
            reject(new Error(`no answer within ${deadlineMs / 1000} s`));
          }, deadlineMs);
        });
        const result = used.ready.then((sql) => (pending = work(sql)));
        result.catch(() => {}); // nobody awaits it after the deadline
        return await Promise.race([result, deadline]);
      } catch (error) {
        if (error instanceof CannotProceed) throw error;
        const unavailable = describe(error);
        // Only the refusal of a row shows that the connection works. After anything else it is replaced:
        // it may lead to a server that has become a standby, or have settings that have changed since.
        if (!(unavailable instanceof RowRefused && used.isReady)) forget(used);
        throw unavailable;
      } finally {
        clearTimeout(timer);
      }
    },
    async close(): Promise<void> {
      await pool?.sql?.end({ timeout: END_S }).catch(() => {});
      pool = null;
    },
  };

  function openPool(): Pool {
    const opened: Pool = { sql: null, isReady: false, isGivenUp: false, ready: null! };
    opened.ready = tryHosts(opened);
    opened.ready.catch(() => {});
    return opened;
  }

  /**
   * Connects to the first of the hosts that can be used. Not the driver: while none of several answers, it
   * tries them for ever, even after its end.
   */
  async function tryHosts(opened: Pool): Promise<Sql> {
    const { hosts, session } = parseDatabaseUrl(url());
    for (let tries = 1; ; tries++) {
      const sql = (opened.sql = connect(hosts[next % hosts.length]!, name, max));
      try {
        await prepareFor(sql, session);
        await applySchema(sql);
        opened.isReady = true;
        return sql;
      } catch (error) {
        if (tries === hosts.length || opened.isGivenUp) throw error;
        sql.end({ timeout: 0 }).catch(() => {});
        next++;
      }
    }
  }

  /** Drops the pool that failed, and no other: a newer one may work already. */
  function forget(failed: Pool) {
    if (failed.isGivenUp) return;
    failed.isGivenUp = true;
    failed.sql?.end({ timeout: END_S }).catch(() => {});
    next++;
    if (pool === failed) pool = null;
  }
}

/** Throws LedgerRefused if the ledger cannot be used. One that does not answer is left for later. */
export async function requireLedger(database: Database, deadlineMs: number): Promise<void> {
  try {
    await database.use(async () => {}, deadlineMs);
  } catch (error) {
    if (error instanceof LedgerRefused) throw error;
  }
}

/**
 * The result of `work`, in a transaction. Postgres cancels each of its statements after `timeoutMs`, and
 * ends it when its client has gone. These limits are set in the transaction, for it alone: behind a pooler
 * the connection is somebody else's next, and PgBouncer refuses them at connect.
 */
export function transact<T>(
  sql: Sql,
  timeoutMs: number,
  work: (tx: Transaction) => Promise<T>,
): Promise<T> {
  return sql.begin("isolation level read committed", async (tx) => {
    await setLimits(tx, timeoutMs, IDLE_MS);
    return work(tx);
  }) as Promise<T>;
}

/**
 * Also overrides what is set on the role. `transaction_timeout` exists in Postgres 17 or later. `jit` is off, because
 * compiling the statement that posts took 2 s of the 3 s of each batch of 100,000 claims.
 */
export async function setLimits(tx: Transaction, statementMs: number, idleMs: number) {
  await tx.unsafe(`
    select set_config('statement_timeout', '${statementMs}', true),
      set_config('idle_in_transaction_session_timeout', '${idleMs}', true),
      set_config('lock_timeout', '0', true), set_config('jit', 'off', true),
      case when current_setting('transaction_timeout', true) is not null
        then set_config('transaction_timeout', '0', true) end`);
}

/**
 * Prepares no statements where a pooler is between: the next transaction may run on another connection,
 * which does not know them. Elsewhere they are worth it: posting a few users takes 1.3 ms, and 3.4 without;
 * a read 27 µs, and 43. A pooler shows in that the connection's process id, which it makes up, is not that
 * of the backend. Throws Unavailable if the server is not what `session` asks for.
 */
async function prepareFor(sql: Sql, session: Session): Promise<void> {
  const rows = await sql.unsafe<{ pid: number; read_only: string; is_standby: boolean }[]>(`
    select pg_backend_pid() as pid, pg_is_in_recovery() as is_standby,
      current_setting('transaction_read_only') as read_only`);
  const [found] = rows;
  if (found?.pid !== rows.state.pid) sql.options.prepare = false;
  if (session === "primary" && found?.is_standby)
    throw new Unavailable("the server is a standby, and a primary is required", true);
  if (session === "read-write" && found?.read_only === "on")
    throw new Unavailable(
      "the server can only be read, and one that can be written is required",
      true,
    );
}

/** Creates or upgrades the ledger, and checks it. */
async function applySchema(sql: Sql): Promise<void> {
  // Statements that are sent together are one transaction.
  const limit = `set local statement_timeout = ${SCHEMA_TIMEOUT_MS}`;
  await sql.unsafe(`${limit};\n${SCHEMA}`).catch((error) => {
    if ((error as { code?: string }).code !== INSUFFICIENT_PRIVILEGE) throw error;
    const { message } = error as Error;
    throw new LedgerRefused(
      `this role may not create or upgrade the ledger (${message}). Run, as the owner of the ledger: ` +
        'psql "$DATABASE_URL" -f schema.sql',
    );
  });
}

function connect(host: DriverOptions, name: string, max: number): Sql {
  return postgres({
    ...host,
    max,
    idle_timeout: 60,
    max_lifetime: 600, // an address may lead elsewhere by then: reads would stay at what is a standby now
    backoff: () => 0.1,
    // Without it each new connection first reads the types, which takes a quarter of its set-up. Arrays
    // are passed as text.
    fetch_types: false,
    onnotice: () => {},
    // Nothing else: a pooler refuses parameters that it does not know.
    connection: { application_name: `daybook ${name}`, ...host.connection },
  } as postgres.Options<Record<string, postgres.PostgresType>>);
}

/**
 * SQLSTATE classes that are transient: connection, transaction state (25006: the server has become a
 * standby, or may only be read for now), rollback, resources, locks, intervention, system.
 */
const TRANSIENT = /^(08|25|40|53|55|57|58)|^XX000$/;

/** SQLSTATE classes that say nothing about a row. All others concern what it contains: see schema.sql. */
export const NOT_A_ROW =
  /^(0[0138ABFLPZ]|02|10|2[014568BDF]|3[489BDF]|4[02]|5[34578]|72|DB|F0|HV|XX)/;

const INSUFFICIENT_PRIVILEGE = "42501";
/** Raised by the functions in schema.sql that check the ledger. */
const LEDGER_REFUSED = "DB001";

/** The error of a statement that has changed fewer balances than it should. */
const ROW_SKIPPED = "daybook.row_skipped";

/** What kind of failure an error of the driver is. */
export function describe(error: unknown): Unavailable {
  if (error instanceof Unavailable) return error;
  const { message, code } = error as { message?: string; code?: string };
  const sqlState = error instanceof postgres.PostgresError ? (code ?? "") : null;
  const text = (message || code || String(error)).split("\n")[0] as string;
  if (text.includes(ROW_SKIPPED)) return new RowRefused("a trigger of users_revenue skips the row");
  if (sqlState === LEDGER_REFUSED) return new LedgerRefused(text);
  if (sqlState !== null && !NOT_A_ROW.test(sqlState)) return new RowRefused(text);
  return new Unavailable(text, sqlState === null || TRANSIENT.test(sqlState));
}

/** Texts or numbers as Postgres writes an array: one parameter, whatever the number of elements. */
export function arrayLiteral(elements: Iterable<string | number | null>): string {
  const quote = (text: string) => `"${text.replace(/["\\]/g, "\\$&")}"`;
  return `{${Array.from(elements, (one) => (typeof one === "string" ? quote(one) : `${one}`)).join()}}`;
}

/** An array for each of the named columns of `rows`. */
export function columns<Name extends string>(
  rows: readonly Record<Name, string | number | null>[],
  ...names: Name[]
): string[] {
  return names.map((name) => arrayLiteral(rows.map((row) => row[name])));
}
