/**
 * `processor.ts --history USER`: every event of a user, read from the journals and files that the ledger
 * knows, with the balance after it, and why it did not count where it did not. Source after source:
 * journals by their first frame, then files, each in the order of its lines. Nothing is written anywhere.
 */
import { formatAmount, parseDecimal } from "../event/amount.ts";
import {
  type Change,
  decodeEvent,
  InvalidEvent,
  MAX_JOURNALED_BYTES,
  openScanner,
  scannedChange,
} from "../event/event.ts";
import { eachEvent } from "../event/lines.ts";
import { selectBalance } from "../ledger/balances.ts";
import { parseKey } from "../ledger/checkpoints.ts";
import type { Transaction } from "../ledger/database.ts";
import { readReason, readSnapshotOf } from "../ledger/history.ts";
import {
  listRecountable,
  openExclusions,
  type Recountable,
  withRecountLock,
} from "../ledger/reconcile.ts";
import { printPatiently, visible } from "../progress.ts";
import {
  describeMissing,
  locateSources,
  readSource,
  type Reconciliation,
  type Source,
} from "./recount.ts";

/** The history that is asked for; times in milliseconds since 1970. */
export interface Asked {
  user: string;
  fromMs: number;
  toMs: number;
}

/** An event of the user, or what the segments that were removed from a source had added. */
interface Entry {
  source: string;
  /** `null` for the events of a file: nobody noted it. */
  atMs: number | null;
  /** Of a journal; for a file, the number of the line. */
  place: number | null;
  change: Change | null;
  /** By how much it changed the balance. */
  amount: bigint;
  why: string | null;
}

/**
 * Prints the history. Returns 1 if it does not add up to the balance, or a source is not here; else 0. Printing must
 * not block, because Postgres ends a transaction that is idle for too long.
 */
export async function history(run: Reconciliation & { asked: Asked }): Promise<number> {
  const { database, paths, say, asked } = run;
  return withRecountLock(database, say, async (tx) => {
    const recountable = await listRecountable(tx);
    const { sources, missing } = await locateSources(recountable, paths);
    for (const one of missing) say(describeMissing(one));
    const ordered = await inOrder(sources);
    let balance = 0n;
    const isBefore = ({ atMs }: Entry) => (atMs ?? asked.fromMs) < asked.fromMs;
    const isAfter = ({ atMs }: Entry) => (atMs ?? asked.fromMs) >= asked.toMs;
    if (asked.fromMs > 0) {
      for await (const entry of entries(tx, recountable, ordered, asked.user))
        if (isBefore(entry)) balance += entry.amount;
      await printPatiently(
        shown({ at: new Date(asked.fromMs).toISOString(), balance: formatAmount(balance) }),
      );
    }
    let after = 0n;
    for await (const entry of entries(tx, recountable, ordered, asked.user)) {
      if (isBefore(entry)) continue;
      if (isAfter(entry)) after += entry.amount;
      else await printPatiently(shown(describe(entry, (balance += entry.amount))));
    }
    const sum = formatAmount(balance + after);
    const [row] = await selectBalance(tx, asked.user);
    const found = row?.revenue ?? null;
    await printPatiently(shown({ sum, balance: found }));
    if (sum !== (found ?? "0"))
      say(`the sum of what is here, ${sum}, is not the balance, ${found ?? "none"}`);
    return missing.length > 0 || sum !== (found ?? "0") ? 1 : 0;
  });
}

/** Journals by their first frame, then files by their names. */
async function inOrder(sources: Source[]): Promise<Source[]> {
  const startOf = async (source: Source) => {
    if (!("journal" in source)) return Infinity;
    return (await source.journal.read(source.journal.start))[0]?.atMs ?? Infinity;
  };
  const starts = new Map<Source, number>();
  for (const source of sources) starts.set(source, await startOf(source));
  const keyOf = ({ checkpoint: { key } }: Source) => key;
  return sources.toSorted(
    (a, b) =>
      (starts.get(a) as number) - (starts.get(b) as number) || (keyOf(a) < keyOf(b) ? -1 : 1),
  );
}

/** Everything of the user: first what snapshots hold, then the events of each source. */
async function* entries(
  tx: Transaction,
  recountable: Recountable[],
  sources: Source[],
  user: string,
): AsyncGenerator<Entry> {
  for (const { key } of recountable) {
    const revenue = await readSnapshotOf(tx, key, user);
    if (revenue === null) continue;
    const amount = parseDecimal(revenue);
    yield { source: key, atMs: 0, place: null, change: null, amount, why: null };
  }
  for (const source of sources) yield* eventsOf(tx, source, user);
}

async function* eventsOf(tx: Transaction, source: Source, user: string): AsyncGenerator<Entry> {
  const { key, removedTo: from, position: to } = source.checkpoint;
  const exclusions = await openExclusions(tx, { key, from, to });
  const isFile = parseKey(key).generation !== null;
  let lines = 0;
  for await (const group of readSource(tx, source))
    for (const { bytes, from, to, atMs, all = bytes } of group) {
      await exclusions.load(to);
      for (const { change, index, number } of findEvents(bytes, user)) {
        const position = from + index;
        const why = exclusions.has(position) ? await readReason(tx, key, position) : null;
        const amount = why === null ? change.amount : 0n;
        const place = isFile ? lines + number : position;
        yield { source: key, atMs, place, change, amount, why };
      }
      lines += isFile ? countLines(all) : 0;
    }
  await exclusions.close();
}

/** The events of `user` in these lines. The scanner finds them without decoding the others'. */
function findEvents(bytes: Uint8Array, user: string) {
  const found: { change: Change; index: number; number: number }[] = [];
  const scanner = openScanner();
  const wanted = Buffer.from(user);
  eachEvent(
    bytes,
    scanner,
    (index, number) => {
      const { userFrom, userTo } = scanner;
      if (userTo - userFrom !== wanted.length || wanted.compare(bytes, userFrom, userTo) !== 0)
        return;
      found.push({ change: scannedChange(scanner, bytes), index, number });
    },
    (line, index, number) => {
      const change = decodeEvent(line, MAX_JOURNALED_BYTES);
      if (!(change instanceof InvalidEvent) && change.userId === user)
        found.push({ change, index, number });
    },
    MAX_JOURNALED_BYTES,
  );
  return found;
}

function countLines(bytes: Uint8Array): number {
  let lines = 0;
  for (let at = bytes.indexOf(10); at >= 0; at = bytes.indexOf(10, at + 1)) lines++;
  return lines;
}

function describe({ source, atMs, place, change, amount, why }: Entry, balance: bigint) {
  const at = atMs ? new Date(atMs).toISOString() : null;
  const where = { source, [parseKey(source).generation === null ? "position" : "line"]: place };
  if (!change) return { source, snapshot: formatAmount(amount), balance: formatAmount(balance) };
  const { id = null, name, sign, amount: own } = change;
  const value = formatAmount(sign < 0 ? -own : own);
  return { at, ...where, id, name, value, balance: formatAmount(balance), ...(why ? { why } : {}) };
}

/** A line of columns on a terminal, else of NDJSON. */
function shown(fields: Record<string, string | number | null>): string {
  if (!process.stdout.isTTY) return JSON.stringify(fields);
  const text = (value: string | number | null) => visible(`${value ?? "-"}`);
  const { at, position, line, id, name, value, balance, ...rest } = fields;
  if (name === undefined)
    return Object.entries(fields)
      .map(([key, value]) => `${key} ${text(value)}`)
      .join("  ");
  return [
    text(at as string).padEnd(24),
    text((position ?? line) as number).padStart(12),
    text(name as string).padEnd(18),
    text(value as string).padStart(16),
    text(balance as string).padStart(18),
    text(id as string),
    ...Object.values(rest).map(text),
  ].join("  ");
}
