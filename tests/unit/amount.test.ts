/** Amounts: exact, within limits that apply to the digits as written. */
import { expect, test } from "bun:test";

import fc from "fast-check";

import { formatAmount, parseAmount } from "../../lib/event/amount.ts";

const digits = (max: number) => fc.stringMatching(new RegExp(`^[0-9]{0,${max}}$`));

/** A JSON number in any notation, with its parts. */
const written = fc
  .record({
    minus: fc.boolean(),
    integer: fc.oneof(fc.constant("0"), fc.stringMatching(/^[1-9][0-9]{0,16}$/)),
    fraction: digits(12),
    exponent: fc.oneof(fc.constant(null), fc.integer({ min: -20, max: 20 })),
    e: fc.constantFrom("e", "E", "e+"),
  })
  .map((parts) => {
    const { minus, integer, fraction, exponent, e } = parts;
    const power = exponent === null ? "" : exponent < 0 ? `e${exponent}` : `${e}${exponent}`;
    return { ...parts, text: `${minus ? "-" : ""}${integer}${fraction && `.${fraction}`}${power}` };
  });

test("an amount equals its digits in integer arithmetic, or is rejected by the limits", () => {
  fc.assert(
    fc.property(written, ({ minus, integer, fraction, exponent, text }) => {
      // In units of 10^-40, every generated number is an integer.
      const significant = (integer + fraction).replace(/^0+/, "").length;
      const units =
        BigInt(integer + fraction) * 10n ** BigInt(40 - fraction.length + (exponent ?? 0));
      const allowed =
        significant <= 15 && fraction.length - (exponent ?? 0) <= 9 && units < 10n ** 55n;
      const amount = parseAmount(text);
      if (!allowed) expect(amount).toBeString();
      else expect(amount).toBe((minus ? -units : units) / 10n ** 31n);
    }),
    { numRuns: 2_000 },
  );
});

test("an amount is unchanged after it is formatted and parsed again", () => {
  const limit = 10n ** 24n - 1n;
  fc.assert(
    fc.property(fc.bigInt({ min: -limit, max: limit }), (amount) => {
      const text = formatAmount(amount);
      expect(text).toMatch(/^(0|-?(0|[1-9]\d*)(\.\d*[1-9])?)$/);
      const [whole = "", fraction = ""] = text.replace("-", "").split(".");
      const size = BigInt(whole + fraction.padEnd(9, "0"));
      expect(text.startsWith("-") ? -size : size).toBe(amount);
    }),
  );
});

test.each([
  ["98", 98_000_000_000n],
  ["-72.5", -72_500_000_000n],
  ["1.5e3", 1_500_000_000_000n],
  ["0.000000001", 1n],
  ["-0", 0n],
  ["0e5", 0n],
  ["999999999999999", 999_999_999_999_999_000_000_000n],
  ["1e14", 10n ** 23n],
])("%s is parsed exactly", (text, amount) => {
  expect(parseAmount(text)).toBe(amount);
});

test.each([
  ["12345678901234567.89", "must be written with at most 15 significant digits, has 19"],
  ["1234567890123456", "must be written with at most 15 significant digits, has 16"],
  ["1.234567890123450", "must be written with at most 15 significant digits, has 16"],
  ["0.0000000001", "must have at most 9 decimals"],
  ["1e-10", "must have at most 9 decimals"],
  ["1e15", "must be smaller than 10^15"],
  ["1e400", "must be smaller than 10^15"],
  ["1e999999999999999999999", "must be smaller than 10^15"],
  ['"5"', "must be a JSON number smaller than 10^15"],
  ["", "must be a JSON number smaller than 10^15"],
])("%s is rejected: %s", (text, reason) => {
  expect(parseAmount(text)).toBe(reason);
});
