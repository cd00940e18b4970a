/**
 * What a command shows to the person who runs it: results on stdout and everything else on stderr. Long
 * work shows its progress: a bar on a terminal, otherwise a line every few seconds.
 */

// Loaded only when a bar is shown: it took a sixth of a client's start.
const bars = process.stderr.isTTY ? await import("cli-progress") : null;

const REPORT_MS = 5_000;

/** The exit codes of a program that a signal has stopped before its work was done. */
export const STOPPED = { SIGINT: 130, SIGTERM: 143 } as const;

/** How much of the total is done; the file may have grown. */
export function percent(bytes: number, totalBytes: number): number {
  return Math.floor((100 * bytes) / Math.max(1, totalBytes, bytes));
}

/** `1 event`, `2 events` */
export function counted(count: number, noun: string): string {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}

/** Writes a line to stderr. */
export function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** Writes a line of the result to stdout. */
export function print(line: string): void {
  process.stdout.write(`${line}\n`);
}

export type Progress = ReturnType<typeof showProgress>;

/** Shows the progress of `what`, which has `totalBytes` and begins at byte `fromBytes`. */
export function showProgress(what: string, totalBytes: number, fromBytes: number) {
  const startedMs = performance.now();
  let reportedMs = startedMs;
  const bar =
    bars &&
    new bars.SingleBar({
      stream: process.stderr,
      format: `${what} {bar} {percentage}% | {rate} events/s | {left} left`,
      hideCursor: true,
      clearOnComplete: true,
    });
  bar?.start(totalBytes, fromBytes, { rate: 0, left: "…" });

  return {
    /** `bytes` of the total are done, and `events` events since the start, if they are counted. */
    update(bytes: number, events = 0): void {
      const nowMs = performance.now();
      const elapsedMs = nowMs - startedMs;
      const rate = Math.round(events / Math.max(0.001, elapsedMs / 1000));
      if (bar && bars) {
        const leftMs = (elapsedMs * (totalBytes - bytes)) / Math.max(1, bytes - fromBytes);
        const left = bars.Format.TimeFormat(Math.round(leftMs / 1000), { autopaddingChar: "" }, 1);
        bar.update(bytes, { rate: rate.toLocaleString("en"), left });
      } else if (nowMs - reportedMs >= REPORT_MS) {
        reportedMs = nowMs;
        say(`${what}: ${percent(bytes, totalBytes)}%, ${events} events, ${rate} events/s`);
      }
    },
    stop(): void {
      bar?.stop();
    },
  };
}
