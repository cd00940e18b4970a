/**
 * The log of a program that keeps running, on stderr: JSON lines, or readable ones where stderr is a
 * terminal. A change is logged once; what continues is counted, not repeated. It never holds a request
 * body or a secret.
 */
import pino from "pino";

import { version } from "../package.json";
import { visible } from "./progress.ts";

export type Log = pino.Logger;

/**
 * Opens the log. Its first line names the version, for reports of faults. It is written before the second, so that a
 * start that fails says nothing else.
 */
export function openLog(level: string): Log {
  const { isTTY } = process.stderr;
  let isBegun = false;
  const write = (line: string) => {
    if (!isBegun) {
      isBegun = true;
      log.info(`daybook ${version} on Bun ${Bun.version}`);
    }
    process.stderr.write(isTTY ? readable(line) : line);
  };
  const options = {
    level,
    base: null,
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
  };
  const log = pino(options, { write });
  return log;
}

/** `12:30:05 warn  the message  field=value` */
function readable(line: string): string {
  const { level, time, msg, ...fields } = JSON.parse(line) as Record<string, unknown>;
  const more = Object.entries(fields).map(
    ([name, value]) => `  ${name}=${typeof value === "string" ? value : JSON.stringify(value)}`,
  );
  const text = `${String(time).slice(11, 19)} ${String(level).padEnd(5)} ${msg}${more.join("")}`;
  return `${visible(text)}\n`;
}

/** Tells the log when something stops working, and when it works again. */
export type Health = ReturnType<typeof watchHealth>;

/** Reasons logged in one period of trouble: some hold numbers and so never repeat. */
const MAX_REASONS = 10;

/** `recovery` is the message once it works again. */
export function watchHealth(log: Log, level: "warn" | "error", recovery: string) {
  let failures = 0;
  let sinceMs = 0;
  const logged = new Set<string>();
  return {
    /** Logs each reason once, and counts the failures. */
    failing(reason: string): void {
      if (failures++ === 0) sinceMs = performance.now();
      if (logged.has(reason) || logged.size >= MAX_REASONS) return;
      logged.add(reason);
      log[level](reason);
    },
    /** After a failure, logs how many there were and for how long. */
    recovered(): void {
      if (failures === 0) return;
      const seconds = Math.round((performance.now() - sinceMs) / 100) / 10;
      log.info({ failures, seconds }, recovery);
      failures = 0;
      logged.clear();
    },
  };
}
