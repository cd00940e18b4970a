/**
 * Waits for a file to change without asking all the time: the operating system says so (measured:
 * 1 ms), and a slow look now and then covers file systems that say nothing (network, some mounts).
 */
import { watch } from "node:fs";

const LOOK_ANYWAY_MS = 1000;
/** Bun's watch swallows a change within 2 ms of another (198 of 300 tries): look once more. */
const LOOK_AGAIN_MS = 5;
const WITHOUT_WATCH_MS = 50;

export interface DirectoryWatch {
  /** Returns when something in the directory changed since the last call, or after a second. */
  next(): Promise<void>;
  close(): void;
}

export function watchDirectory(directory: string): DirectoryWatch {
  let dirty = true;
  let lookAgain = false;
  let wake: (() => void) | null = null;
  let waitMs = LOOK_ANYWAY_MS;
  const noWatch = () => {
    waitMs = WITHOUT_WATCH_MS;
  };
  let watcher: ReturnType<typeof watch> | null = null;
  try {
    watcher = watch(directory, () => {
      dirty = true;
      wake?.();
    });
    watcher.on("error", noWatch);
  } catch {
    noWatch(); // out of inotify watches
  }

  return {
    async next() {
      if (!dirty) {
        await new Promise<void>((resolve) => {
          const timer = setTimeout(resolve, lookAgain ? LOOK_AGAIN_MS : waitMs);
          wake = () => {
            clearTimeout(timer);
            resolve();
          };
        });
        wake = null;
      }
      lookAgain = dirty;
      dirty = false;
    },
    close: () => {
      watcher?.close();
      wake?.();
    },
  };
}
