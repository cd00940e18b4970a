/** Files that are not lines of events are recognized by their first bytes, and the named command converts them. */
import { expect, test } from "bun:test";
import { gzipSync, zstdCompressSync } from "node:zlib";

import { foreignFormat } from "../../lib/event/formats.ts";
import { DamagedInput, explainForeign, openInput, openStreamInput } from "../../lib/event/input.ts";
import type { Read } from "../../lib/event/lines.ts";
import { line } from "../support/events.ts";
import { FOREIGN } from "../support/formats.ts";

const EVENTS = [line("ann", 1), line("ben é", 2)].map((text) => JSON.parse(text));

test.each(FOREIGN)("%s is named, and its command gives the events", async (name, bytes) => {
  const foreign = foreignFormat(bytes);
  expect(foreign?.format).toBe(name);
  const explained = explainForeign(foreign!, { path: "-", compression: null });
  const command = /convert it: cat - \| (.*) > -\.jsonl$/.exec(explained)?.[1] as string;
  const tools = command.split(" | ").map((part) => part.trim().split(" ")[0] as string);
  if (!tools.every((tool) => !/^(jq|iconv|xz|bzip2|funzip)$/.test(tool) || Bun.which(tool))) return;
  const child = Bun.spawn(["sh", "-c", command], { stdin: Buffer.from(bytes), stderr: "inherit" });
  const lines = (await new Response(child.stdout).text()).replace("\ufeff", "").trim().split("\n");
  expect(lines.map((text) => JSON.parse(text))).toEqual(EVENTS);
});

const FILE = "userId,name,value\nann,add_revenue,1\n";
const zip = (name: string) =>
  Buffer.concat([Buffer.from("504b0304".padEnd(60, "0"), "hex"), Buffer.from(name + FILE)]);

test.each([
  [zip("[Content_Types].xml"), "a spreadsheet (.xlsx, .ods); save it as CSV"],
  [zip("xl/workbook.xml"), "a spreadsheet (.xlsx, .ods); save it as CSV"],
  [zip("mimetypeapplication/vnd.oasis.opendocument.spreadsheet"), "a spreadsheet (.xlsx, .ods)"],
  [zip("events.jsonl"), "a zip archive; convert it: cat f | funzip > f.jsonl"],
  [Buffer.from(`PAR1${FILE}PAR1`), "Parquet; convert it with DuckDB: copy (from 'FILE.parquet')"],
  [Buffer.from("d0cf11e0a1b11ae1", "hex"), "an old Excel workbook (.xls); save it as CSV"],
  [Buffer.from("fffe00007b000000", "hex"), "UTF-32; convert it: cat f | iconv -f UTF-32 -t UTF-8"],
  [Buffer.from("0000feff0000007b", "hex"), "UTF-32; convert it: cat f | iconv -f UTF-32 -t UTF-8"],
  [Buffer.from("7b00000022000000", "hex"), "UTF-32LE; convert it: cat f | iconv -f UTF-32LE"],
  [Buffer.from("0000007b00000022", "hex"), "UTF-32BE; convert it: cat f | iconv -f UTF-32BE"],
])("%p is named, with a way to convert it", (bytes, explained) => {
  const foreign = foreignFormat(bytes)!;
  expect(explainForeign(foreign, { path: "f", compression: null })).toStartWith(
    `this is not one event a line, but ${explained}`,
  );
});

test.each(["Ä,name,value\nann,add_revenue,1\n", '"Größe in m"|b\r\n1|2\r\n', "用户;値\n1;2\n"])(
  "%j is CSV, whatever letters the first name has",
  (text) => {
    expect(foreignFormat(Buffer.from(text))?.format).toBe("CSV");
  },
);

test.each([
  ["", "nothing"],
  [line("ann", 1), "an event"],
  [line("ann", 1).trim(), "an event without newline"],
  [`\ufeff \n${line("ann", 1)}`, "a BOM and a blank line"],
  ['{"userId":"a', "a cut event"],
  [`{"userId":"a",\n${line("ann", 1)}`, "a cut line before an event"],
  [`{"userId":"a\n${line("ann", 1)}`, "a line cut in a string before an event"],
  [`{"note":\n${line("ann", 1)}${line("ben", 2)}`, "a line cut behind a colon"],
  [`[1,2]\n${line("ann", 1)}`, "an array before an event"],
  [`[oops\n${line("ann", 1)}`, "something like an array before an event"],
  [`userId,name,value\n${line("ann", 1)}`, "a line of names before an event"],
  [`${line("ann", 1).trim()}\r${line("ben", 2)}${line("cid", 2)}`, "one bare CR in lines"],
  [`${line("ann", 1).trim()}${line("ben", 2)}${line("cid", 2)}`, "one newline missing"],
  [line("ann", 1).replaceAll(",", ",\r"), "CR as white space"],
  ["nonsense, more nonsense\n", "prose"],
  ["bad\n", "a bad line"],
  [Buffer.from("a\0b\n"), "NULs in a line"],
  [line("\ud83d\ude00é", 1), "text beyond ASCII"],
])("%p, %s, is lines of events", (text) => {
  expect(foreignFormat(Buffer.from(text as string))).toBeNull();
});

const reader =
  (bytes: Uint8Array): Read =>
  async (from, to) =>
    bytes.subarray(from, to);
const text = Buffer.from(Array.from({ length: 50_000 }, (_, i) => line(`user${i}`, i)).join(""));
const cut = (bytes: Uint8Array, parts: number) => [
  bytes.subarray(0, Math.floor(bytes.length / parts)),
  bytes.subarray(Math.floor(bytes.length / parts)),
];

test.each([
  ["gzip", gzipSync],
  ["zstd", zstdCompressSync],
] as const)("%s is read whole, also in several parts and back again", async (name, compress) => {
  const [one, two] = cut(text, 3).map((part) => compress(part));
  for (const bytes of [compress(text), Buffer.concat([one!, two!])]) {
    const { compression, read } = await openInput(reader(bytes));
    expect(compression).toBe(name);
    expect(text.equals(await read(0, text.length + 1))).toBe(true);
    expect(await read(1_000_000, 1_000_010)).toEqual(text.subarray(1_000_000, 1_000_010));
    expect(await read(5, 10)).toEqual(text.subarray(5, 10));
    const stream = await openStreamInput(new Blob([bytes]).stream());
    expect(text.equals(await stream.read(0, text.length + 1))).toBe(true);
  }
});

test.each([
  ["gzip", gzipSync],
  ["zstd", zstdCompressSync],
] as const)(
  "%s that is cut short, altered or followed by something else is damaged",
  async (_, compress) => {
    const whole = compress(text);
    const altered = Buffer.from(whole);
    altered[Math.floor(whole.length / 2)]! ^= 0xff;
    const damaged = [
      ...[10, whole.length - 1, whole.length - 3, whole.length - 20].map((to) =>
        whole.subarray(0, to),
      ),
      Buffer.concat([whole, whole.subarray(0, 30)]),
      Buffer.concat([whole, Buffer.from("something else")]),
      altered,
    ];
    for (const bytes of damaged) {
      const { read } = await openInput(reader(bytes));
      await expect(read(0, text.length + 1)).rejects.toThrow(DamagedInput);
    }
  },
);

const BLOCK_BYTES = 256 * 1024; // what is read of a file at once
const zstdLine = zstdCompressSync(line("ann", 1));
const flipped = Buffer.from(zstdLine);
flipped[1]! ^= 1;
/** The decompressor is done with a block before the next one is there, as with a file on a disk. */
const slowReader =
  (bytes: Uint8Array): Read =>
  async (from, to) =>
    Bun.sleep(1).then(() => bytes.subarray(from, to));
/** A skippable frame and a whole one, then `rest`, `before` bytes before the end of a block. */
function nearBlockEnd(before: number, rest: Uint8Array[], blocks = 1) {
  const skippable = Buffer.alloc(blocks * BLOCK_BYTES - before - zstdLine.length);
  skippable.writeUInt32LE(0x184d2a5f, 0);
  skippable.writeUInt32LE(skippable.length - 8, 4);
  return Buffer.concat([skippable, zstdLine, ...rest]);
}
const manyLines = Array.from({ length: 500 }, () => zstdLine);

test.each([
  ...[0, 1, 2, 3, 4, 5].map((n) => [`${n} bytes before`, nearBlockEnd(n, [flipped, ...manyLines])]),
  ...[1, 4].map((n) => [`at ${n} blocks`, nearBlockEnd(0, [Buffer.from("ju"), ...manyLines], n)]),
  ...["j", "ju", "(", "P*", "\0"].map((junk) => [
    JSON.stringify(junk),
    Buffer.concat([zstdLine, Buffer.from(junk)]),
  ]),
] as [string, Buffer<ArrayBuffer>][])(
  "what follows a frame and is none is damage, wherever it is in a block: %s",
  async (_, bytes) => {
    const { read } = await openInput(slowReader(bytes));
    await expect(read(0, 1_000_000)).rejects.toThrow(DamagedInput);
    const stream = await openStreamInput(new Blob([bytes]).stream());
    await expect(stream.read(0, 1_000_000)).rejects.toThrow(DamagedInput);
  },
);

test("a frame that begins at any place of a block is read", async () => {
  for (let before = 0; before < 9; before++) {
    const bytes = nearBlockEnd(before, manyLines);
    const { read } = await openInput(reader(bytes));
    expect((await read(0, 1_000_000)).length).toBe(501 * line("ann", 1).length);
  }
});

test("NULs after gzip are ignored, but a member behind them is not lost without a word", async () => {
  const member = gzipSync(line("ann", 1));
  for (const nuls of [1, 10, BLOCK_BYTES - member.length, 3 * BLOCK_BYTES]) {
    const padded = Buffer.concat([member, Buffer.alloc(nuls)]);
    const { read } = await openInput(reader(padded));
    expect((await read(0, 1_000_000)).length).toBe(line("ann", 1).length);
    const hole = Buffer.concat([padded, member]);
    const { read: readHole } = await openInput(reader(hole));
    await expect(readHole(0, 1_000_000)).rejects.toThrow(DamagedInput);
  }
});

test("NULs at the end of a file are not read; those within are", async () => {
  const event = Buffer.from(line("ann", 1));
  for (const nuls of [1, 300, 3_000_000]) {
    const tail = Buffer.concat([event, Buffer.alloc(nuls)]);
    const { read, countNuls } = await openInput(reader(tail));
    expect((await read(0, 1_000_000)).toString()).toBe(event.toString());
    expect((await read(event.length, 1_000_000)).length).toBe(0);
    expect(await countNuls(event.length, tail.length)).toBe(nuls);
    const hole = Buffer.concat([tail, event]);
    const within = await openInput(reader(hole));
    expect((await within.read(0, 1_000_000)).length).toBe(Math.min(1_000_000, hole.length));
    expect(await within.countNuls(0, hole.length)).toBe(0);
  }
});
