/**
 * Recognizes, by its first bytes, a file that does not hold lines of events. A bad line must not take its whole
 * file with it: as long as a line is a JSON object, the file is lines of events.
 */

/** How many bytes tell what a file is. */
export const HEAD_BYTES = 64 * 1024;

/**
 * `filter`: the command that converts its standard input to lines of events. `advice`: where no such
 * command is common, what to do instead.
 */
export type Foreign = { format: string; filter: string } | { format: string; advice: string };

const MAGIC: [bytes: string, format: string, filter: string][] = [
  ["504b0304", "a zip archive", "funzip"],
  ["425a68", "compressed with bzip2", "bzip2 -dc"],
  ["fd377a585a00", "compressed with xz", "xz -dc"],
  ["fffe0000", "UTF-32", "iconv -f UTF-32 -t UTF-8"],
  ["0000feff", "UTF-32", "iconv -f UTF-32 -t UTF-8"],
  ["fffe", "UTF-16", "iconv -f UTF-16 -t UTF-8"],
  ["feff", "UTF-16", "iconv -f UTF-16 -t UTF-8"],
];
const CONVERTED: [bytes: string, format: string, advice: string][] = [
  [
    "50415231",
    "Parquet",
    `convert it with DuckDB: copy (from 'FILE.parquet') to 'FILE.jsonl' (format json)`,
  ],
  ["d0cf11e0", "an old Excel workbook (.xls)", "save it as CSV (UTF-8), and send that"],
];
/** The first entry of the zip archive that a workbook is: after a header of 30 bytes. */
const WORKBOOK =
  /^(\[Content_Types\]\.xml|_rels\/|docProps\/|xl\/|mimetypeapplication\/vnd\.oasis)/;
const ONE_A_LINE = "jq -c .";

/** The format of a file with these first bytes; `null` for lines of events, good or bad. */
export function foreignFormat(head: Uint8Array): Foreign | null {
  const hex = Buffer.from(head.subarray(0, 8)).toString("hex");
  if (hex.startsWith("504b0304") && WORKBOOK.test(Buffer.from(head.subarray(30, 80)).toString()))
    return {
      format: "a spreadsheet (.xlsx, .ods)",
      advice: "save it as CSV (UTF-8), and send that",
    };
  for (const [bytes, format, advice] of CONVERTED)
    if (hex.startsWith(bytes)) return { format, advice };
  for (const [bytes, format, filter] of MAGIC) if (hex.startsWith(bytes)) return { format, filter };
  return wideText(head) ?? otherText(new TextDecoder().decode(head).trimStart());
}

/** UTF-16 or UTF-32 without a byte order mark: of the first two characters, the upper bytes are NUL. */
function wideText(head: Uint8Array): Foreign | null {
  const pattern = Array.from(head.subarray(0, 4), (byte) => (byte === 0 ? "0" : "x")).join("");
  const encodings: Record<string, string> = {
    x0x0: "UTF-16LE",
    "0x0x": "UTF-16BE",
    x000: "UTF-32LE",
    "000x": "UTF-32BE",
  };
  const encoding = encodings[pattern];
  return encoding ? { format: encoding, filter: `iconv -f ${encoding} -t UTF-8` } : null;
}

function otherText(text: string): Foreign | null {
  const lines = text.split("\n").filter((line) => line.trim() !== "");
  const [first = ""] = lines;
  if (text.startsWith("[")) return isArray(text) ? jsonArray : null;
  if (lines.some(isObject)) return null;
  if (/\S\r+[^\r\n]/.test(first) && isObject(first.slice(0, first.indexOf("\r"))))
    return { format: "lines that end with a bare CR", filter: "tr '\\r' '\\n'" };
  if (text.startsWith("{")) {
    const end = endOfJson(text);
    if (end === null) return null;
    const value = text.slice(0, end);
    if (/\n\s*\S/.test(value)) return { format: "pretty-printed JSON", filter: ONE_A_LINE };
    return lines.length === 1 && /^[ \t]*\{/.test(text.slice(end))
      ? { format: "JSON objects without newlines between them", filter: ONE_A_LINE }
      : null;
  }
  return separatedValues(text);
}

const jsonArray = { format: "a JSON array", filter: "jq -c '.[]'" };

/** An array over several lines, or one that is all there is. `[1]` before an event is a bad line. */
function isArray(text: string): boolean {
  const end = endOfJson(text);
  if (end === null) return false;
  return text.slice(0, end).includes("\n") || text.slice(end).trim() === "";
}

const NAME = `"?[\\p{L}\\p{N}_][\\p{L}\\p{M}\\p{N}_ .-]*"?`;
/** Two names or more; the group is the first separator. */
const NAMES = new RegExp(`^${NAME}([,;\t|])${NAME}(?:[,;\t|]${NAME})*$`, "u");

/** CSV and its kin: a first line of names, and lines with as many separators. */
function separatedValues(text: string): Foreign | null {
  const [names = "", ...rows] = text.split(/\r\n|\r|\n/).filter((line) => line !== "");
  const [, separator] = NAMES.exec(names) ?? [];
  if (!separator) return null;
  const row = rows[0];
  if (!row || row.split(separator).length < names.split(separator).length) return null;
  const shown = separator === "\t" ? "\\t" : separator;
  return {
    format: "CSV",
    filter:
      `tr -d '"\\r' | jq -Rnc '(input | ltrimstr("\\ufeff") / "${shown}") as $n | ` +
      `inputs | select(. != "") / "${shown}" | [$n, .] | ` +
      `transpose | map({(.[0]): .[1]}) | add | .value |= tonumber'`,
  };
}

function isObject(line: string): boolean {
  if (!line.trimStart().startsWith("{")) return false;
  try {
    return typeof JSON.parse(line) === "object";
  } catch {
    return false;
  }
}

const TOKEN = /\s+|"(?:[^"\\\n]|\\[^\n])*(?:"|$)|-?\d[\d.eE+-]*|[a-z]+|[[\]{},:]/y;

/**
 * The index after the JSON value at the start of `text`, or its length if the value continues beyond it;
 * `null` where the text is not JSON.
 */
function endOfJson(text: string): number | null {
  const open: string[] = [];
  let awaits = "value";
  for (TOKEN.lastIndex = 0; TOKEN.lastIndex < text.length;) {
    const token = TOKEN.exec(text)?.[0];
    if (token === undefined) return null;
    if (/^\s/.test(token)) continue;
    const inside = open.at(-1);
    const isEnd = token === (inside === "{" ? "}" : "]") && inside !== undefined;
    if (isEnd && /first|comma/.test(awaits)) open.pop();
    else if (awaits === "comma" && token === ",") {
      awaits = inside === "{" ? "key" : "value";
      continue;
    } else if (awaits === "colon" && token === ":") {
      awaits = "value";
      continue;
    } else if (/key/.test(awaits)) {
      if (!token.startsWith('"')) return null;
      awaits = "colon";
      continue;
    } else if (!/value/.test(awaits) || /^[\]},:]/.test(token)) return null;
    else if (token === "{" || token === "[") {
      open.push(token);
      awaits = token === "{" ? "first key" : "first value";
      continue;
    }
    if (open.length === 0) return TOKEN.lastIndex;
    awaits = "comma";
  }
  return text.length;
}
