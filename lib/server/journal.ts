/** Which journal a server writes. */
import { join } from "node:path";

import { requireDataDir, type SettingsOf } from "../config.ts";
import { disk, leavingRoom } from "../journal/disk.ts";
import { type Journal, JOURNAL_FILE, openJournal } from "../journal/writer.ts";
import { readServer } from "./announce.ts";

/** The journal: in a stream, or in files; an embedded Postgres on the same disk keeps some room for itself. Throws InvalidSetting. */
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
  requireDataDir(directory, "write");
  const shared = DATABASE_URL ? disk : leavingRoom(disk);
  const opening = openJournal({ directory, say, disk: shared, segmentBytes });
  return opening.catch((error: Error) => {
    const last = error.message.includes("written by another process") && readServer(directory);
    throw last ? new Error(`${error.message}; the last server here was ${last}`) : error;
  });
}
