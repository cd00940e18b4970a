/**
 * Runs the processor in a Worker and restarts it when it dies. The reason is the driver: an error that
 * it throws outside every promise ends the Worker and not the process, and a promise that it never
 * settles shows as a Worker that ends silently.
 */
import { closeSync, openSync } from "node:fs";
import { join } from "node:path";

import type { SettingsOf } from "../config.ts";
import { JOURNAL_FILE } from "../journal/writer.ts";
import { type Lock, waitForLock } from "../lock.ts";

/** A processor that waits for another one to end says so after this long. */
const STAND_BY_MS = 500;
const MIN_PAUSE_MS = 100;
const MAX_PAUSE_MS = 2_000;
const STOP_MS = 3_000;
const WORKER_DESCRIPTORS = 16;

/** What a processor has to do: post `files` and end, or follow the journal when there are none. */
export interface Job {
  settings: Omit<SettingsOf<"processor">, "METRICS_PORT">;
  files: string[];
  /** The journal of the server beside it, in a stream. */
  own?: string;
  /** Whether it reports its lag. */
  isMonitored?: boolean;
  /** A ledger that is refused at the start is waited for. Otherwise it ends the job. */
  waitsForLedger?: boolean;
}

/** Why lines are quarantined: no event, refused by Postgres, or under the id of another event. */
export const QUARANTINE_REASONS = ["invalid", "refused", "conflict"] as const;
export type Quarantined = Record<(typeof QUARANTINE_REASONS)[number], number>;

/** What the processor reports. `done`, `stopped` and `failed` are final. */
export type Report =
  | { type: "say"; line: string; level?: "warn" | "error" }
  | { type: "opened"; file: string; bytes: number; from: number }
  /** How far the file is folded: the next batches. */
  | { type: "folded"; fileOffset: number }
  | {
      type: "posted";
      /** Events that count. Those that came before are beside them. */
      events: number;
      quarantined: Quarantined;
      duplicates: number;
      bytes: number;
      /** How far the file is posted, in bytes of the file as it is on the disk. */
      fileOffset?: number;
      users: number;
      /** Duration of the transaction. */
      ms: number;
    }
  /** How far posting is behind all journals: unposted bytes, and the age of the oldest of them. */
  | { type: "lag"; bytes: number; seconds: number }
  /** Why posting waits; `null`: it does not, or no longer. `isPaused`: until a person changes something. */
  | { type: "waiting"; why: string | null; isPaused: boolean }
  /** Bytes remain that are not a whole event yet. */
  | { type: "leftOver"; line: string }
  | { type: "done" | "stopped" }
  /** The end of the file is seen: these bytes are all that is posted of it. */
  | { type: "end"; bytes: number }
  /** `isRefused`: the ledger cannot be used as it is. */
  | { type: "failed"; line: string; isRefused: boolean };

/**
 * Waits until no other processor follows the journal in `dataDir`. Returns the lock that keeps others
 * waiting, or `null` when `stop` is aborted first.
 */
export async function acquireProcessorLock(
  dataDir: string,
  stop: AbortSignal,
  say: (line: string) => void,
): Promise<Lock | null> {
  const timer = setTimeout(say, STAND_BY_MS, "standing by: another processor follows this journal");
  try {
    const lock = await waitForLock(join(dataDir, "processor.lock"), stop);
    if (lock) say(`following ${join(dataDir, JOURNAL_FILE)}`);
    return lock;
  } finally {
    clearTimeout(timer);
  }
}

/** Starts `job`, and restarts it until it is done, fails or is stopped. */
export function supervise(job: Job, report: (report: Report) => void) {
  const { promise: ended, resolve: end } = Promise.withResolvers<void>();
  let worker: Worker | null = null;
  let isStopping = false;
  let isFinished = false;
  let pauseMs = MIN_PAUSE_MS;
  start();

  return {
    /** Settles when the job is done or has failed, or after `stop`. */
    ended,
    /** Lets the posting in progress finish, for at most 3 s. */
    async stop(): Promise<void> {
      isStopping = true;
      worker?.postMessage("stop");
      const timer = setTimeout(() => {
        worker?.terminate();
        end();
      }, STOP_MS);
      await ended;
      clearTimeout(timer);
    },
  };

  function start() {
    if (!hasDescriptors())
      return void setTimeout(() => (isStopping ? end() : start()), MAX_PAUSE_MS);
    worker = new Worker(new URL("./worker.ts", import.meta.url));
    worker.postMessage(job);
    worker.onmessage = ({ data }: MessageEvent<Report>) => {
      pauseMs = MIN_PAUSE_MS;
      isFinished ||= ["done", "stopped", "failed"].includes(data.type);
      report(data);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      report({ type: "say", level: "error", line: `processor: ${errorOf(event.message)}` });
    };
    worker.addEventListener("close", () => {
      if (isFinished || isStopping) return end();
      report({ type: "say", level: "error", line: "processor: died; restarting it" });
      job = { ...job, waitsForLedger: true };
      setTimeout(() => (isStopping ? end() : start()), pauseMs);
      pauseMs = Math.min(pauseMs * 2, MAX_PAUSE_MS);
    });
  }
}

/** Whether a Worker can open what it loads. Without a descriptor for it, Bun ends the whole process. */
function hasDescriptors(): boolean {
  const opened: number[] = [];
  try {
    while (opened.length < WORKER_DESCRIPTORS) opened.push(openSync("/dev/null", "r"));
    return true;
  } catch {
    return false;
  } finally {
    for (const descriptor of opened) closeSync(descriptor);
  }
}

/** The error alone: Bun's message also has the source lines around it, a caret, and the stack. */
function errorOf(message: string): string {
  const [, error] = /^ *\^\n(.*)$/m.exec(message) ?? [];
  return error ?? (message.split("\n")[0] as string);
}
