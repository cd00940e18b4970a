/** What a terminal would obey, or show in another order, is shown as it is. */
import { expect, test } from "bun:test";

import { visible } from "../../lib/progress.ts";

test("every control character, bidirectional control, line end and lone surrogate is escaped, and nothing else", () => {
  const bidi = [0x61c, 0x200e, 0x200f, 0x202a, 0x202b, 0x202c, 0x202d, 0x202e];
  const isolates = [0x2066, 0x2067, 0x2068, 0x2069];
  const escaped = new Set([...bidi, ...isolates, 0x2028, 0x2029]);
  for (let code = 0; code < 0x11000; code++) {
    const isHidden =
      escaped.has(code) ||
      code < 32 ||
      (code >= 127 && code < 160) ||
      (code >= 0xd800 && code < 0xe000);
    const text = String.fromCodePoint(code);
    const shown = isHidden ? `\\u${code.toString(16).padStart(4, "0")}` : text;
    expect(visible(text)).toBe(shown);
  }
});

test("a line of JSON stays the same value", () => {
  const value = { "\u202e\x7f": "\x1b[2J\x9b\u2028 \ud800 😀 \\ ü" };
  const text = visible(JSON.stringify(value));
  expect(JSON.parse(text)).toEqual(value);
  expect(text).not.toMatch(/[\x7f\x9b\u202e]/);
});
