/** How far long work has come: a bar on a terminal, else a line now and then; on stderr. */

// Loaded only where it is shown: it took a sixth of a client's start.
const bars = process.stderr.isTTY ? await import("cli-progress") : null;

const PLAIN_LINE_EVERY_MS = 5_000;

export interface Progress {
  /** `bytes` of the total are done, which were `events` events since the start, if they are counted. */
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

  let saidMs = startedMs;
  return {
    update(bytes, events = 0) {
      if (performance.now() - saidMs < PLAIN_LINE_EVERY_MS) return;
      saidMs = performance.now();
      const percent = Math.floor((100 * bytes) / Math.max(1, totalBytes, bytes)); // it may have grown
      process.stderr.write(`${what}: ${percent}%, ${events} events, ${rate(events)} events/s\n`);
    },
    stop() {},
  };
}
