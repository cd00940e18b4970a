/** Events as text, files of events with known balances, and their rejected lines. */
import { readFileSync, writeFileSync } from "node:fs";

/** An event as JSON. A `value` that is text is written as it is: `"0.10"` keeps its zero. */
export function event(userId: string, value: number | string = 1, more: object = {}): string {
  const { name = "add_revenue", ...fields } = more as { name?: string };
  const rest = JSON.stringify(fields).slice(1, -1);
  const user = JSON.stringify(userId);
  return `{"userId":${user},"name":"${name}","value":${value}${rest && `,${rest}`}}`;
}

/** An event as a line of a file or of a body. */
export function line(userId: string, value: number | string = 1, more: object = {}): string {
  return `${event(userId, value, more)}\n`;
}

/** A bad line of a file: its number, the offset of its first byte, and its text. */
interface BadLine {
  line: number;
  at: number;
  text: string;
}

/**
 * Writes a file of `lines` events, one in a hundred of them bad. Returns the good and the bad lines, and
 * the balances that the good ones add up to.
 */
export function writeEvents(path: string, lines: number, random: () => number) {
  const cents = new Map<string, number>();
  const good: string[] = [];
  const bad: BadLine[] = [];
  const parts: string[] = [];
  const note = "n".repeat(800);
  let at = 0;
  for (let line = 1; line <= lines; line++) {
    const user = `user${Math.floor(random() * (lines / 50))}`;
    const value = Math.floor(random() * 100_000);
    const name = random() < 0.4 ? "subtract_revenue" : "add_revenue";
    const event = { userId: user, name, value: value / 100, note: note.slice(random() * 800) };
    let text = JSON.stringify(event);
    if (random() < 0.01) {
      text = [text.slice(0, 30), text.replace("_", "-"), `bad ${line}`][line % 3] as string;
      bad.push({ line, at, text });
    } else {
      good.push(`${text}\n`);
      cents.set(user, (cents.get(user) ?? 0) + (name === "add_revenue" ? value : -value));
    }
    parts.push(`${text}\n`);
    at += text.length + 1;
  }
  writeFileSync(path, parts.join(""));
  // A double is exact for as many digits as `value` has.
  const balances = Object.fromEntries([...cents].map(([user, sum]) => [user, `${sum / 100}`]));
  return { good, bad, balances };
}

/** The lines of FILE.rejected.jsonl, without the reasons. */
export function readRejected(file: string): BadLine[] {
  const lines = readFileSync(`${file}.rejected.jsonl`, "utf8").trimEnd().split("\n");
  return lines.map((record) => {
    const { line, at, text } = JSON.parse(record) as BadLine;
    return { line, at, text };
  });
}

/** How FILE.rejected.jsonl differs from the bad lines: missing, listed twice, or not bad at all. */
export function rejectedFaults(file: string, bad: readonly BadLine[]): string[] {
  const wanted = new Set(bad.map((line) => JSON.stringify(line)));
  const found = new Set<string>();
  const faults: string[] = [];
  for (const line of readRejected(file).map((record) => JSON.stringify(record))) {
    if (found.has(line)) faults.push(`twice: ${line}`);
    else if (!wanted.has(line)) faults.push(`not bad: ${line}`);
    found.add(line);
  }
  for (const line of wanted) if (!found.has(line)) faults.push(`missing: ${line}`);
  return faults;
}

/**
 * Ids of users with one hash (FNV-1a): each is a row of blocks, and the two forms of a block lead
 * from one state of the hash to the same next one. The state before a block depends on those before it.
 */
export function collidingIds(count: number): Buffer[] {
  const blocks: [string, string][] = [];
  for (let start = 0x811c9dc5; 2 ** blocks.length < count;) {
    const seen = new Map<number, string>();
    for (let i = 36 ** 4; ; i++) {
      const form = i.toString(36);
      let state = start;
      for (let at = 0; at < form.length; at++)
        state = Math.imul(state ^ form.charCodeAt(at), 0x01000193);
      const other = seen.get(state);
      seen.set(state, form);
      if (other === undefined) continue;
      blocks.push([other, form]);
      start = state;
      break;
    }
  }
  return Array.from({ length: count }, (_, i) =>
    Buffer.from(blocks.map((forms, bit) => forms[(i >> bit) & 1]).join("")),
  );
}
