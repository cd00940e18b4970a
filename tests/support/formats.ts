/** Two events in formats that are not one event a line. */
import { line } from "./events.ts";

const lines = [line("ann", 1), line("ben é", 2)];
const text = lines.join("");
const events = lines.map((each) => JSON.parse(each) as Record<string, unknown>);

function utf16(text: string, order: "LE" | "BE"): Buffer {
  const bytes = Buffer.from(text, "utf16le");
  return order === "LE" ? bytes : bytes.swap16();
}

function csv(separator: string, newline = "\n"): Buffer {
  const rows = events.map((event) => Object.values(event).join(separator));
  return Buffer.from([Object.keys(events[0]!).join(separator), ...rows, ""].join(newline));
}

/** The name that the message has for the format, and its bytes. */
export const FOREIGN: [format: string, bytes: Buffer][] = [
  ["UTF-16", utf16(`\ufeff${text}`, "LE")],
  ["UTF-16", utf16(`\ufeff${text}`, "BE")],
  ["UTF-16LE", utf16(text, "LE")],
  ["UTF-16BE", utf16(text, "BE")],
  ["a JSON array", Buffer.from(JSON.stringify(events))],
  ["a JSON array", Buffer.from(`\ufeff${JSON.stringify(events, null, 2)}\n`)],
  ["a JSON array", Buffer.from(`[\n${lines.map((each) => each.trim()).join(",\n")}\n]\n`)],
  [
    "pretty-printed JSON",
    Buffer.from(events.map((each) => JSON.stringify(each, null, 2)).join("\n")),
  ],
  ["JSON objects without newlines between them", Buffer.from(text.replaceAll("\n", ""))],
  ["JSON objects without newlines between them", Buffer.from(`${text.replaceAll("\n", " ")}\n`)],
  ["lines that end with a bare CR", Buffer.from(text.replaceAll("\n", "\r"))],
  ["CSV", csv(",")],
  ["CSV", csv(";", "\r\n")],
  ["CSV", csv("\t")],
  ["CSV", csv("|")],
  ["CSV", Buffer.concat([Buffer.from("\ufeff"), csv(",")])],
  ["CSV", Buffer.concat([Buffer.from("\ufeff"), csv(";", "\r\n"), Buffer.from("\r\n")])],
  ...["xz", "bzip2"].flatMap((tool): [string, Buffer][] =>
    Bun.which(tool)
      ? [
          [
            `compressed with ${tool}`,
            Bun.spawnSync([tool, "-c"], { stdin: Buffer.from(text) }).stdout,
          ],
        ]
      : [],
  ),
];
