/**
 * Amounts: exact decimal numbers, kept as a `bigint` count of 10^-9 (the smallest part an event
 * may carry). No binary fraction is on the way from the digits of a line to `numeric`.
 */

/** Decimals that an amount may have, and so the scale of its `bigint`. */
export const DECIMALS = 9;
/** Units of an amount in 1. */
export const UNITS = 10n ** BigInt(DECIMALS);
/** Significant digits that a value may be written with. */
export const SIGNIFICANT_DIGITS = 15;
/** A value is smaller than 10^15 in size. */
export const INTEGER_DIGITS = 15;

/** 10^0 to 10^24: from one unit of 10^-9 to the largest value. */
const POWERS = Array.from({ length: INTEGER_DIGITS + DECIMALS + 1 }, (_, i) => 10n ** BigInt(i));

const NUMBER = /^(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?$/;

/**
 * Reads a JSON number as it is written and returns its amount in units of 10^-9, or, as a string,
 * the reason why it is not one. The limits hold for the digits as written: `JSON.parse` has
 * already rounded 12345678901234567.89 by the time that it could be asked.
 */
export function parseAmount(written: string): bigint | string {
  const match = NUMBER.exec(written);
  if (!match) return "must be a JSON number";
  const [, sign, integer = "", fraction = "", exponent = "0"] = match;
  const digits = (integer + fraction).replace(/^0+/, "");
  const scale = fraction.length - Number(exponent);
  if (digits.length > SIGNIFICANT_DIGITS)
    return `must be written with at most ${SIGNIFICANT_DIGITS} significant digits, has ${digits.length}`;
  if (scale > DECIMALS) return `must have at most ${DECIMALS} decimals`;
  if (digits === "") return 0n;
  if (digits.length - scale > INTEGER_DIGITS) return `must be smaller than 10^${INTEGER_DIGITS}`;
  const size = BigInt(digits) * (POWERS[DECIMALS - scale] as bigint);
  return sign ? -size : size;
}

/** Writes an amount as Postgres reads a `numeric`: `-12.5`, without trailing zeros. */
export function formatAmount(amount: bigint): string {
  const digits = (amount < 0n ? -amount : amount).toString().padStart(DECIMALS + 1, "0");
  const fraction = digits.slice(-DECIMALS).replace(/0+$/, "");
  return `${amount < 0n ? "-" : ""}${digits.slice(0, -DECIMALS)}${fraction && `.${fraction}`}`;
}
