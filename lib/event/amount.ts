/**
 * Amounts: exact decimal numbers, held as a `bigint` count of 10^-9, the smallest fraction that an event
 * may carry. No binary fraction touches an amount between the digits of a line and `numeric`.
 */

/** The most decimals of a value, and so the scale of an amount's `bigint`. */
export const MAX_DECIMALS = 9;
/** How many units of 10^-9 make 1. */
export const UNITS = 10n ** BigInt(MAX_DECIMALS);
/** The most significant digits of a value, as written. */
export const MAX_SIGNIFICANT_DIGITS = 15;
/** A value is below 10^15, of either sign. */
export const MAX_INTEGER_DIGITS = 15;

const NUMBER = /^(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?$/;

/**
 * Parses a JSON number as written. Returns the amount in units of 10^-9, or the reason for the rejection
 * as a string. The limits apply to the digits as written: `JSON.parse` would already have rounded
 * 12345678901234567.89.
 */
export function parseAmount(written: string): bigint | string {
  const match = NUMBER.exec(written);
  if (!match) return `must be a JSON number smaller than 10^${MAX_INTEGER_DIGITS}`;
  const [, sign, integer = "", fraction = "", exponent = "0"] = match;
  const digits = (integer + fraction).replace(/^0+/, "");
  const scale = fraction.length - Number(exponent);
  if (digits.length > MAX_SIGNIFICANT_DIGITS)
    return `must be written with at most ${MAX_SIGNIFICANT_DIGITS} significant digits, has ${digits.length}`;
  if (scale > MAX_DECIMALS) return `must have at most ${MAX_DECIMALS} decimals`;
  if (digits === "") return 0n;
  if (digits.length - scale > MAX_INTEGER_DIGITS)
    return `must be smaller than 10^${MAX_INTEGER_DIGITS}`;
  const size = BigInt(digits) * 10n ** BigInt(MAX_DECIMALS - scale);
  return sign ? -size : size;
}

/** A decimal of Postgres, of any size, in units of 10^-9. */
export function parseDecimal(decimal: string): bigint {
  const [whole = "0", fraction = ""] = decimal.replace("-", "").split(".");
  const units = BigInt(whole + fraction.padEnd(MAX_DECIMALS, "0").slice(0, MAX_DECIMALS));
  return decimal.startsWith("-") ? -units : units;
}

/** Formats `whole` plus `billionths` * 10^-9, which have one sign, as formatAmount formats their sum. */
export function formatParts(whole: number, billionths: number): string {
  if (billionths === 0) return `${whole + 0}`; // without the sign of -0
  let decimals = MAX_DECIMALS;
  let rest = Math.abs(billionths);
  for (; rest % 10 === 0; rest /= 10) decimals--;
  const sign = billionths < 0 ? "-" : "";
  return `${sign}${Math.abs(whole)}.${`${rest}`.padStart(decimals, "0")}`;
}

/** Formats an amount in units of 10^-9 as a `numeric` literal without trailing zeros: `-12.5`. */
export function formatAmount(amount: bigint): string {
  const digits = (amount < 0n ? -amount : amount).toString().padStart(MAX_DECIMALS + 1, "0");
  const fraction = digits.slice(-MAX_DECIMALS).replace(/0+$/, "");
  return `${amount < 0n ? "-" : ""}${digits.slice(0, -MAX_DECIMALS)}${fraction && `.${fraction}`}`;
}
