/** Files cut into lines, and into blocks of lines. */
import { expect, test } from "bun:test";

import fc from "fast-check";

import { MAX_EVENT_BYTES } from "../../lib/event/event.ts";
import { type Block, eachLine, readBlocks, readStream } from "../../lib/event/lines.ts";

function linesOf(bytes: Uint8Array) {
  const lines: { text: string; index: number; number: number }[] = [];
  eachLine(bytes, (line, index, number) =>
    lines.push({ text: Buffer.from(line).toString(), index, number }),
  );
  return lines;
}

test("lines end with LF or CRLF; blank lines are counted but not visited", () => {
  expect(linesOf(Buffer.from("a\r\n\n \t\r\n  b \nc"))).toEqual([
    { text: "a", index: 0, number: 1 },
    { text: "b", index: 10, number: 4 },
    { text: "c", index: 13, number: 5 },
  ]);
});

test("a line that is too long is not trimmed: its end must not pass for an event", () => {
  const long = `${" ".repeat(MAX_EVENT_BYTES + 10)}{}\n`;
  expect(linesOf(Buffer.from(long))).toEqual([{ text: long, index: 0, number: 1 }]);
});

test("a line may have 64 KiB without its LF or CRLF; its blanks count, all other CRs too", () => {
  const fits = `{}${" ".repeat(MAX_EVENT_BYTES - 2)}`;
  for (const end of ["", "\n", "\r\n"])
    expect(linesOf(Buffer.from(fits + end))).toEqual([{ text: "{}", index: 0, number: 1 }]);
  for (const end of [" ", " \n", "\r", "\r\r\n", " \r\n"]) {
    const long = fits + end;
    expect(linesOf(Buffer.from(long))).toEqual([{ text: long, index: 0, number: 1 }]);
  }
});

test("the lines are those of a text that is split at newlines", () => {
  fc.assert(
    fc.property(fc.stringMatching(/^[ab \r\n]{0,60}$/), (text) => {
      const parts = text.split("\n");
      const expected = parts.map((part) => part.trim()).filter((part) => part !== "");
      const bytes = Buffer.from(text);
      expect(linesOf(bytes).map((line) => line.text)).toEqual(expected);
    }),
    { numRuns: 2_000 },
  );
});

test("blocks are the file, cut at the ends of lines; every part of a line that is too long is itself too long", async () => {
  const long = "x".repeat(1_000_000);
  for (const end of ["", "last", "last\n"]) {
    const text = `first\n${"line\n".repeat(60_000)}${long}\nlast\n${long}${end}`;
    const file = Buffer.from(text);
    const read = async (from: number, to: number) => file.subarray(from, to);
    const blocks: Block[] = [];
    for await (const block of readBlocks(read, 0, 1)) blocks.push(block);

    expect(Buffer.concat(blocks.map(({ bytes }) => bytes)).toString()).toBe(text);
    let offset = 0;
    for (const { bytes, from, to, tooLong, whole } of blocks) {
      expect([from, to]).toEqual([offset, offset + bytes.length]);
      offset = to;
      expect(whole).toBe(true);
      if (tooLong) expect(bytes.length).toBeGreaterThan(MAX_EVENT_BYTES);
      else expect(bytes.at(-1)).toBe(10);
    }
    expect(blocks.filter(({ tooLong }) => tooLong === "first part").length).toBe(2);
  }
});

test("the bytes behind the last newline are the last block, and not whole", async () => {
  const read = readStream(new Blob(["one\ntwo\n{"]).stream());
  const blocks: [string, boolean][] = [];
  for await (const { bytes, whole } of readBlocks(read, 0, 1))
    blocks.push([Buffer.from(bytes).toString(), whole]);
  expect(blocks).toEqual([
    ["one\ntwo\n", true],
    ["{", false],
  ]);
});
