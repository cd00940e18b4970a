/**
 * What a program that stays says of itself, on stderr: JSON lines, or something to read where stderr is
 * a terminal. One line when something begins or changes; what goes on is counted, not repeated. Never
 * a body, never a secret.
 */
import pino from "pino";

export type Log = pino.Logger;

export function openLog(level: string): Log {
  const write = process.stderr.isTTY
    ? (line: string) => process.stderr.write(readable(line))
    : (line: string) => process.stderr.write(line);
  const options = {
    level,
    base: null,
    timestamp: pino.stdTimeFunctions.isoTime,
    formatters: { level: (label: string) => ({ level: label }) },
  };
  return pino(options, { write });
}

/** `12:30:05 warn  the message  field=value` */
function readable(line: string): string {
  const { level, time, msg, ...fields } = JSON.parse(line) as Record<string, unknown>;
  const more = Object.entries(fields).map(
    ([name, value]) => `  ${name}=${typeof value === "string" ? value : JSON.stringify(value)}`,
  );
  return `${String(time).slice(11, 19)} ${String(level).padEnd(5)} ${msg}${more.join("")}\n`;
}

/** Something that works or does not. */
export interface State {
  /** It does not: said once for each reason, and counted. */
  bad(reason: string): void;
  /** It does: said if it did not before, with how often it did not, and for how long. */
  good(): void;
}

/** So many reasons are said in one time of trouble: some have numbers in them. */
const MAX_REASONS = 10;

/** Says through `log` when something stops working, and `back` when it works again. */
export function watchState(log: Log, level: "warn" | "error", back: string): State {
  let failures = 0;
  let fromMs = 0;
  const said = new Set<string>();
  return {
    bad(reason) {
      if (failures++ === 0) fromMs = performance.now();
      if (said.has(reason) || said.size >= MAX_REASONS) return;
      said.add(reason);
      log[level](reason);
    },
    good() {
      if (failures === 0) return;
      log.info({ failures, seconds: Math.round((performance.now() - fromMs) / 100) / 10 }, back);
      failures = 0;
      said.clear();
    },
  };
}
