/** Times as people write them: ISO 8601. */
const TIME = /^\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?$/i;

export const TIME_RULE = "must be a time like 2026-11-26 or 2026-11-26T15:04Z";

/** Milliseconds since 1970, of a time in UTC where it names no zone; `undefined` for what is not a time. */
export function parseTime(text: string): number | undefined {
  const hasZone = text.length <= 10 || /(Z|[+-]\d\d:?\d\d)$/i.test(text.slice(10));
  const ms = TIME.test(text) ? Date.parse(hasZone ? text : `${text}Z`) : Number.NaN;
  return Number.isNaN(ms) ? undefined : ms;
}
