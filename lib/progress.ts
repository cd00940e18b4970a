/**
 * What a command tells the person who runs it: results on stdout, all else on stderr, and the progress
 * of long work as a bar on a terminal, else a line now and then.
 */

// Loaded only where a bar is shown: it took a sixth of a client's start.
const bars = process.stderr.isTTY ? await import("cli-progress") : null;

const REPORT_MS = 5_000;

/** Writes a line to stderr. */
export function say(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** Writes a line of the result to stdout. */
export function print(line: string): void {
  process.stdout.write(`${line}\n`);
}

export interface Progress {
  /** `bytes` of the total are done, `events` events of them since the start where these are counted. */
  update(bytes: number, events?: number): void;
  stop(): void;
}

export function showProgress(what: string, totalBytes: number, fromBytes: number): Progress {
  const startedMs = performance.now();
  const rate = (events: number) =>
    Math.round(events / Math.max(0.001, (performance.now() - startedMs) / 1000));

  if (bars) {
    const bar = new bars.SingleBar({
      stream: process.stderr,
      format: `${what} {bar} {percentage}% | {rate} events/s | {left} left`,
      hideCursor: true,
      clearOnComplete: true,
    });
    bar.start(totalBytes, fromBytes, { rate: 0, left: "…" });
    return {
      update(bytes, events = 0) {
        const elapsedMs = performance.now() - startedMs;
        const leftMs = (elapsedMs * (totalBytes - bytes)) / Math.max(1, bytes - fromBytes);
        const left = bars.Format.TimeFormat(Math.round(leftMs / 1000), { autopaddingChar: "" }, 1);
        bar.update(bytes, { rate: rate(events).toLocaleString("en"), left });
      },
      stop: () => bar.stop(),
    };
  }

  let reportedMs = startedMs;
  return {
    update(bytes, events = 0) {
      if (performance.now() - reportedMs < REPORT_MS) return;
      reportedMs = performance.now();
      const percent = Math.floor((100 * bytes) / Math.max(1, totalBytes, bytes)); // the file may have grown
      say(`${what}: ${percent}%, ${events} events, ${rate(events)} events/s`);
    },
    stop() {},
  };
}
