/** Files of events with known balances, and their rejected lines. */
import { readFileSync, writeFileSync } from "node:fs";

/** A bad line of a file: its number, the byte it begins at, and what it says. */
interface BadLine {
  line: number;
  at: number;
  text: string;
}

/** Writes a file of `lines` events, one in a hundred of them bad, and says what must come of it. */
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
  // `value` has no more digits than a double is exact for.
  const balances = Object.fromEntries([...cents].map(([user, sum]) => [user, `${sum / 100}`]));
  return { good, bad, balances };
}

/** FILE.rejected.jsonl, without the reasons. */
export function readRejected(file: string): BadLine[] {
  const lines = readFileSync(`${file}.rejected.jsonl`, "utf8").trimEnd().split("\n");
  return lines.map((record) => {
    const { line, at, text } = JSON.parse(record) as BadLine;
    return { line, at, text };
  });
}

/** Bad lines that FILE.rejected.jsonl lacks, has once too often, or should not have. */
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
