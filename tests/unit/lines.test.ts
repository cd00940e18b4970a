import { expect, test } from "bun:test";
import { writeFileSync } from "node:fs";

import fc from "fast-check";

import { MAX_EVENT_BYTES } from "../../lib/event/event.ts";
import { type Block, eachLine, readBlocks, readFile, readStream } from "../../lib/event/lines.ts";
import { tempDir } from "../support/programs.ts";

function linesOf(bytes: Uint8Array) {
  const lines: { text: string; at: number; number: number }[] = [];
  eachLine(bytes, (line, at, number) =>
    lines.push({ text: Buffer.from(line).toString(), at, number }),
  );
  return lines;
}

test("lines end with LF or CRLF, blank ones are counted but not visited", () => {
  expect(linesOf(Buffer.from("a\r\n\n \t\r\n  b \nc"))).toEqual([
    { text: "a", at: 0, number: 1 },
    { text: "b", at: 10, number: 4 },
    { text: "c", at: 13, number: 5 },
  ]);
});

test("a line that is too long is not trimmed: what ends it must not pass for a line of its own", () => {
  const long = `${" ".repeat(MAX_EVENT_BYTES + 10)}{}\n`;
  expect(linesOf(Buffer.from(long))).toEqual([{ text: long, at: 0, number: 1 }]);
});

test("lines are those that splitting the text finds", () => {
  fc.assert(
    fc.property(fc.stringMatching(/^[ab \r\n]{0,60}$/), (text) => {
      const parts = text.split("\n");
      const wanted = parts.map((part) => part.trim()).filter((part) => part !== "");
      const bytes = Buffer.from(text);
      expect(linesOf(bytes).map((line) => line.text)).toEqual(wanted);
    }),
    { numRuns: 2_000 },
  );
});

test("blocks are the file, cut where lines end; a line that is too long comes in parts that are", async () => {
  using dir = tempDir();
  const long = "x".repeat(1_000_000);
  for (const end of ["", "last", "last\n"]) {
    const text = `first\n${"line\n".repeat(60_000)}${long}\nlast\n${long}${end}`;
    writeFileSync(dir.file("f"), text);
    const blocks: Block[] = [];
    for await (const block of readBlocks(readFile(Bun.file(dir.file("f"))), 0, 1))
      blocks.push(block);

    expect(Buffer.concat(blocks.map(({ bytes }) => bytes)).toString()).toBe(text);
    let at = 0;
    for (const { bytes, from, to, tooLong, whole } of blocks) {
      expect([from, to]).toEqual([at, at + bytes.length]);
      at = to;
      expect(whole).toBe(true);
      if (tooLong) expect(bytes.length).toBeGreaterThan(MAX_EVENT_BYTES);
      else expect(bytes.at(-1)).toBe(10);
    }
    expect(blocks.filter(({ tooLong }) => tooLong === "first part").length).toBe(2);
  }
});

test("what follows the last newline comes last, and is not whole", async () => {
  const read = readStream(new Blob(["one\ntwo\n{"]).stream());
  const blocks: [string, boolean][] = [];
  for await (const { bytes, whole } of readBlocks(read, 0, 1))
    blocks.push([Buffer.from(bytes).toString(), whole]);
  expect(blocks).toEqual([
    ["one\ntwo\n", true],
    ["{", false],
  ]);
});
