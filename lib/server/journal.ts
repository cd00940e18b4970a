/** Which journal a server writes. */
import { accessSync, constants, statSync } from "node:fs";
import { dirname, join, resolve } from "node:path";

import type { SettingsOf } from "../config.ts";
import { reasonOf } from "../errors.ts";
import { disk, leavingRoom } from "../journal/disk.ts";
import { type Journal, JOURNAL_FILE, openJournal } from "../journal/writer.ts";
import { readServer } from "./announce.ts";

/** Why DATA_DIR cannot be used: the nearest part of it that exists must be a folder, in which files can be created. */
export function checkDataDir({ DATA_DIR, JOURNAL_URL }: SettingsOf<"app">): string[] {
  if (JOURNAL_URL) return [];
  const invalid = (path: string, why: string) => [
    `DATA_DIR is "${DATA_DIR}": use a folder that this user may write; ${path}: ${why}`,
  ];
  for (let path = resolve(DATA_DIR); ; path = dirname(path))
    try {
      if (!statSync(path).isDirectory()) return invalid(path, "not a folder");
      accessSync(path, constants.W_OK | constants.X_OK);
      return [];
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOENT") return invalid(path, reasonOf(error));
    }
}

/** The journal: in a stream, or in files; an embedded Postgres on the same disk keeps some room for itself. */
export async function openServerJournal(
  settings: SettingsOf<"app">,
  say: (line: string) => void,
): Promise<Journal> {
  const { DATA_DIR: directory, DATABASE_URL, JOURNAL_SEGMENT_BYTES: segmentBytes } = settings;
  if (settings.JOURNAL_URL) {
    const file = join(directory, JOURNAL_FILE);
    if (await Bun.file(file).exists())
      say(
        `${file} is not written to any more; bun run processor.ts ${file} posts what is left of it`,
      );
    const { openStreamJournal } = await import("../journal/stream-writer.ts");
    return openStreamJournal(settings.JOURNAL_URL, say);
  }
  const shared = DATABASE_URL ? disk : leavingRoom(disk);
  const opening = openJournal({ directory, say, disk: shared, segmentBytes });
  return opening.catch((error: Error) => {
    const last = error.message.includes("written by another process") && readServer(directory);
    throw last ? new Error(`${error.message}; the last server here was ${last}`) : error;
  });
}
