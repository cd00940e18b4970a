/** Times as people write them: ISO 8601. */
const TIME = /^\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?$/i;

export const TIME_RULE = "must be a time like 2026-11-26 or 2026-11-26T15:04Z";

/** The years that four digits hold, but for the year 0, which Postgres does not have. */
export const FIRST_MS = Date.parse("0001-01-01T00:00Z");
export const LAST_MS = Date.parse("9999-12-31T23:59:59.999Z");

/** Milliseconds since 1970, of a time in UTC where it names no zone; `undefined` for what is not a time. */
export function parseTime(text: string): number | undefined {
  const hasZone = text.length <= 10 || /(Z|[+-]\d\d:?\d\d)$/i.test(text.slice(10));
  const ms = TIME.test(text) ? Date.parse(hasZone ? text : `${text}Z`) : Number.NaN;
  return ms >= FIRST_MS && ms <= LAST_MS && isDay(text.slice(0, 10)) ? ms : undefined;
}

/** `Date.parse` takes 30 February for 2 March. */
function isDay(date: string): boolean {
  return new Date(date).toJSON()?.startsWith(date) ?? false;
}
