/** What a server prints about itself once it listens, and what it leaves for a second one on its DATA_DIR to print. */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

import { maskSettings, type SettingsOf } from "../config.ts";
import type { Log } from "../log.ts";
import { print } from "../progress.ts";

/** Beside the lock, for people: which process holds it, and where it answers. */
const SERVER_FILE = "server.txt";

function noteServer(dataDir: string, origin: string): void {
  try {
    writeFileSync(join(dataDir, SERVER_FILE), `process ${process.pid} at ${origin}\n`);
  } catch {
    // On a full disk a server starts without it.
  }
}

/** Only text: after a kill it is that of a process that has ended. */
export function readServer(dataDir: string): string | null {
  try {
    const text = readFileSync(join(dataDir, SERVER_FILE), "utf8");
    return /^process \d{1,10} at https?:\/\/[\w.:[\]-]{1,255}$/m.exec(text)?.[0] ?? null;
  } catch {
    return null;
  }
}

/** Says where the server listens and what to do next; the first line on stdout is for programs. */
export function announce(origin: string, settings: SettingsOf<"app">, log: Log): void {
  noteServer(settings.DATA_DIR, origin);
  print(`listening on ${origin}`);
  log.info(`listening on ${origin}`);
  const server = origin === "http://127.0.0.1:8000" ? "" : `SERVER_URL=${origin} `;
  log.info(`send events with: ${server}bun run client.ts events.jsonl; see them at ${origin}/`);
  // A person at a terminal has set them, or has set none.
  const level = process.stderr.isTTY ? "debug" : "info";
  log[level]({ settings: maskSettings(settings) }, "settings");
}
