/**
 * What a command shows to the person who runs it: results on stdout and everything else on stderr. Long
 * work shows its progress: a bar on a terminal, otherwise a line every few seconds.
 */
import { writeSync } from "node:fs";

const REPORT_MS = 5_000;
const REDRAW_MS = 100;
const BAR_WIDTH = 20;
const CLEAR_LINE = "\r\x1b[K";
const FULL_PIPE_PAUSE_MS = 2;
/** A bar needs a terminal that can clear a line. */
const canDraw = process.stderr.isTTY === true && process.env["TERM"] !== "dumb";
/**
 * Draws the bar that is shown. It changes no mode of the terminal (no hidden cursor, no line that does not
 * wrap), so that nothing has to be restored, however the program ends.
 */
let draw: (() => void) | null = null;

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

/** What a terminal obeys instead of showing it (C0, DEL, C1), what reverses text, and further ends of a line. */
const HIDDEN = /[\p{Cc}\p{Cs}\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]/gu;

/**
 * The text as one line that shows every character: a line of a file, a file's name, a server's answer. It
 * is escaped as in JSON, so that a line of NDJSON stays the same value.
 */
export function visible(text: string): string {
  return text.replaceAll(
    HIDDEN,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** Writes a line to stderr, above the bar. */
export function say(line: string): void {
  write(process.stderr.fd, `${draw ? CLEAR_LINE : ""}${visible(line)}\n`);
  draw?.();
}

/** Writes a message of several lines to stderr. */
export function sayLines(message: string): void {
  for (const line of message.split("\n")) say(line);
}

/** Writes a line of the result to stdout. */
export function print(line: string): void {
  if (draw) process.stderr.write(CLEAR_LINE);
  write(process.stdout.fd, `${visible(line)}\n`);
}

/** Like `print`, but does not block while a slow reader, such as a pager, lets the pipe fill up. */
export async function printPatiently(line: string): Promise<void> {
  let bytes: Uint8Array = Buffer.from(`${visible(line)}\n`);
  while ((bytes = writeSome(process.stdout.fd, bytes)).length > 0)
    await Bun.sleep(FULL_PIPE_PAUSE_MS);
}

/**
 * Returns once all of it is written, however slowly it is read: what `process.stdout` buffers for a pipe takes
 * memory, and is lost when the process ends. Of 1.8 MB, 65 kB arrived. Nothing is said where nobody reads.
 */
function write(fd: number, text: string): void {
  let bytes: Uint8Array = Buffer.from(text);
  while ((bytes = writeSome(fd, bytes)).length > 0) Bun.sleepSync(FULL_PIPE_PAUSE_MS);
}

/** What could not be written yet, because nobody has read what was written before. */
function writeSome(fd: number, bytes: Uint8Array): Uint8Array {
  try {
    return bytes.subarray(writeSync(fd, bytes));
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EAGAIN" ? bytes : new Uint8Array();
  }
}

export type Progress = ReturnType<typeof showProgress>;

/** Shows the progress of `what`, which has `totalBytes` and begins at byte `fromBytes`. */
export function showProgress(what: string, totalBytes: number, fromBytes: number) {
  const startedMs = performance.now();
  let reportedMs = startedMs;
  let [shown, drawnMs] = [barOf({ what, share: 0, rate: 0, left: "…" }), startedMs];
  let later: Timer | null = null;
  const drawLater = () => {
    later = null;
    drawnMs = performance.now();
    drawThis();
  };
  const drawThis = () => void process.stderr.write(CLEAR_LINE + fit(shown, terminalWidth()));
  if (canDraw) {
    draw = drawThis;
    process.on("SIGWINCH", drawThis);
    draw();
  }

  return {
    /** `bytes` of the total are done, and `events` events since the start, if they are counted. */
    update(bytes: number, events = 0): void {
      const nowMs = performance.now();
      const elapsedMs = nowMs - startedMs;
      const rate = Math.round(events / Math.max(0.001, elapsedMs / 1000));
      if (canDraw) {
        const leftMs = (elapsedMs * (totalBytes - bytes)) / Math.max(1, bytes - fromBytes);
        const share = bytes / Math.max(1, totalBytes, bytes);
        shown = barOf({ what, share, rate, left: duration(Math.max(0, leftMs)) });
        // What comes too soon is drawn a little later: perhaps nothing comes after it for a while.
        later ??= setTimeout(drawLater, Math.max(0, drawnMs + REDRAW_MS - nowMs));
      } else if (nowMs - reportedMs >= REPORT_MS) {
        reportedMs = nowMs;
        const percents = percent(bytes, totalBytes);
        say(`${what}: ${percents}%, ${counted(events, "event")}, ${counted(rate, "event")}/s`);
      }
    },
    stop(): void {
      process.off("SIGWINCH", drawThis);
      clearTimeout(later ?? undefined);
      if (draw !== drawThis) return;
      draw = null;
      process.stderr.write(CLEAR_LINE);
    },
  };
}

function barOf(shown: { what: string; share: number; rate: number; left: string }): string {
  const { what, share, rate, left } = shown;
  const done = Math.floor(share * BAR_WIDTH);
  const bar = "█".repeat(done) + "░".repeat(BAR_WIDTH - done);
  const percents = Math.floor(share * 100);
  // The name comes last, so that a narrow terminal cuts it and not the figures.
  return `${bar} ${percents}% | ${rate.toLocaleString("en")} events/s | ${left} left | ${what}`;
}

/** One column stays free: a line that fills the last one wraps on some terminals. */
function fit(line: string, columns: number): string {
  let [text, width] = ["", 0];
  for (const character of visible(line)) {
    width += Bun.stringWidth(character);
    if (width >= columns) break;
    text += character;
  }
  return text;
}

/** As it is now: `columns` is only what it was when the program started, or last changed its size. */
function terminalWidth(): number {
  return process.stderr.getWindowSize()[0] || 80;
}

/** `42s`, `3m5s`, `2h10m` */
function duration(ms: number): string {
  const seconds = Math.round(ms / 1000);
  const [minutes, hours] = [Math.floor(seconds / 60), Math.floor(seconds / 3600)];
  if (hours > 0) return `${hours}h${minutes % 60}m`;
  return minutes > 0 ? `${minutes}m${seconds % 60}s` : `${seconds}s`;
}
