/**
 * Runs the processor in a Worker and starts it again when it dies. The driver's faults are the
 * reason: what it throws outside of every promise ends the Worker and not the process, and a
 * promise that it forgets shows as a Worker that ends without a word.
 */

/** What a processor has to do: post `files` and end, or follow the journal when there are none. */
export interface Job {
  dataDir: string;
  databaseUrl: string | null;
  idDays: number;
  /** Full files of the journal are kept for so long; `null`: for ever. */
  keepDays: number | null;
  /** The kinds of events, as EVENT_TYPES has them. */
  eventTypes: string;
  files: string[];
}

/** What it tells on the way. `failed` is final. */
export type Report =
  | { type: "say"; line: string; level?: "warn" | "error" }
  | { type: "opened"; file: string; bytes: number; from: number }
  | {
      type: "posted";
      events: number;
      quarantined: number;
      /** Events among them that had come before. */
      duplicates: number;
      bytes: number;
      users: number;
      /** How long the posting took. */
      ms: number;
    }
  | { type: "done" }
  | { type: "failed"; line: string };

export interface Supervised {
  /** Settles when the job is done or has failed, or after `stop`. */
  readonly ended: Promise<void>;
  /** Lets the posting that is under way finish, for at most 3 s. */
  stop(): Promise<void>;
}

const FIRST_PAUSE_MS = 100;
const MAX_PAUSE_MS = 2_000;
const STOP_MS = 3_000;

export function supervise(job: Job, report: (report: Report) => void): Supervised {
  const { promise: ended, resolve: end } = Promise.withResolvers<void>();
  let worker: Worker;
  let stopping = false;
  let finished = false;
  let pauseMs = FIRST_PAUSE_MS;
  start();

  return {
    ended,
    async stop() {
      stopping = true;
      worker.postMessage("stop");
      const timer = setTimeout(() => {
        worker.terminate();
        end();
      }, STOP_MS);
      await ended;
      clearTimeout(timer);
    },
  };

  function start() {
    worker = new Worker(new URL("./worker.ts", import.meta.url));
    worker.postMessage(job);
    worker.onmessage = ({ data }: MessageEvent<Report>) => {
      pauseMs = FIRST_PAUSE_MS;
      finished ||= data.type === "done" || data.type === "failed";
      report(data);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      report({ type: "say", level: "error", line: `processor: ${whatWasThrown(event.message)}` });
    };
    worker.addEventListener("close", () => {
      if (finished || stopping) return end();
      report({ type: "say", level: "error", line: "processor: died; starting it again" });
      setTimeout(() => (stopping ? end() : start()), pauseMs);
      pauseMs = Math.min(pauseMs * 2, MAX_PAUSE_MS);
    });
  }
}

/** Bun gives the lines of the source around it, a caret below them, the error, and the stack. */
function whatWasThrown(message: string): string {
  const [, error] = /^ *\^\n(.*)$/m.exec(message) ?? [];
  return error ?? (message.split("\n")[0] as string);
}
