/** What is an event, and what it changes. */
import { expect, test } from "bun:test";

import { Value } from "@sinclair/typebox/value";
import fc from "fast-check";

import { decodeEvent, MAX_EVENT_BYTES, InvalidEvent } from "../../lib/event/event.ts";
import { EventShape } from "../../lib/server/openapi.ts";
import { IS_LONG } from "../support/random.ts";

const RUNS = IS_LONG ? 20_000 : 1_000;

const decode = (line: string | Uint8Array) => decodeEvent(Buffer.from(line as string));
const invalid = (line: string | Uint8Array) => {
  const decoded = decode(line);
  return decoded instanceof InvalidEvent ? { kind: decoded.kind, reason: decoded.reason } : null;
};

const good = { userId: "user1", name: "add_revenue", value: 98 };

test("an event changes a balance by its value, with the sign of its name", () => {
  expect(decode(JSON.stringify(good))).toEqual({
    userId: "user1",
    name: "add_revenue",
    sign: 1,
    amount: 98_000_000_000n,
    id: undefined,
  });
  expect(decode(JSON.stringify({ ...good, name: "subtract_revenue" }))).toEqual({
    userId: "user1",
    name: "subtract_revenue",
    sign: -1,
    amount: -98_000_000_000n,
    id: undefined,
  });
});

test.each(["__proto__", "constructor", "😀", "a\nb", '"\\', "é".repeat(128), " "])(
  "%j is a valid user id",
  (userId) => {
    expect(decode(JSON.stringify({ ...good, userId }))).toMatchObject({ userId });
  },
);

test.each([
  ["[]", "event"],
  ["null", "event"],
  ['"text"', "event"],
  ["{}", "event"],
  ["{", "json"],
  ["{} {}", "json"],
  ["[".repeat(40_000) + "]".repeat(40_000), "size"],
  ["[".repeat(30_000) + "]".repeat(30_000), "json"],
  [`${JSON.stringify(good)}${" ".repeat(MAX_EVENT_BYTES)}`, "size"],
])("%#: a line that is not an event is rejected with its kind", (line, kind) => {
  expect(invalid(line)?.kind).toBe(kind as "json");
});

test.each([
  [{ userId: "" }, "userId"],
  [{ userId: "a\0b" }, "userId"],
  [{ userId: "\ud800" }, "userId"],
  [{ userId: "é".repeat(129) }, "userId"],
  [{ userId: 5 }, "userId"],
  [{ name: "refund" }, "name"],
  [{ value: "98" }, "value"],
  [{ value: null }, "value"],
  [{ value: 0.1 + 0.2 }, "value"],
  [{ id: "" }, "id"],
  [{ id: 7 }, "id"],
  [{ id: null }, "id"],
  [{ id: "é".repeat(65) }, "id"],
  [{ id: "a\0" }, "id"],
])("%j is rejected, and the reason names %s", (change, field) => {
  expect(invalid(JSON.stringify({ ...good, ...change }))?.reason).toStartWith(`${field} must`);
});

test.each(["userId", "name", "value"])(
  "without %s, the reason says that it is missing",
  (field) => {
    const [reason, ...others] = invalid(
      JSON.stringify({ ...good, [field]: undefined }),
    )!.reason.split("; ");
    expect(reason).toBe(`${field} is missing`);
    expect(others).toEqual([expect.stringMatching(/^it must be /)]);
  },
);

test("an event is rejected with all of its faults at once", () => {
  const event = { userId: "é".repeat(129), name: "refund", value: "1", id: "" };
  const faults = invalid(JSON.stringify(event))?.reason.split("; ");
  expect(faults?.map((fault) => fault.split(" ")[0])).toEqual(["userId", "name", "value", "id"]);
});

test("the value is the event's own, not a nested one; of a repeated key, the last one counts", () => {
  const nested = '{"value":1,"userId":"u","name":"add_revenue","more":{"value":12345678901234567}}';
  expect(decode(nested)).toMatchObject({ amount: 1_000_000_000n });
  const twice = '{"value":12345678901234567,"userId":"u","name":"add_revenue","value":2}';
  expect(decode(twice)).toMatchObject({ amount: 2_000_000_000n });
});

test("limits apply to the digits as written, not to those that a double can hold", () => {
  for (const value of [
    "1.0000000000000000001",
    "100000000000000000.5e-5",
    "0.10000000000000000001",
  ])
    expect(invalid(`{"userId":"u","name":"add_revenue","value":${value}}`)?.reason).toStartWith(
      "value must",
    );
});

test("bytes that are not UTF-8 are rejected, and so is a byte order mark: it belongs to the file", () => {
  expect(invalid(Buffer.from([0x7b, 0xff, 0x7d]))).toEqual({
    kind: "json",
    reason: "not UTF-8 text",
  });
  expect(invalid(`\ufeff${JSON.stringify(good)}`)?.kind).toBe("json");
});

/** Lines as programs write them, and lines that are nearly so. */
const nearly = fc
  .record({
    userId: fc.oneof(fc.string({ unit: "binary", maxLength: 90 }), fc.constant("user1")),
    name: fc.oneof(fc.constantFrom("add_revenue", "subtract_revenue"), fc.string()),
    value: fc.oneof(
      fc.double({ noNaN: true, noDefaultInfinity: true }),
      fc.integer(),
      fc.stringMatching(/^-?[0-9]{1,17}(\.[0-9]{1,11})?(e-?[0-9]{1,2})?$/),
    ),
    spaces: fc.constantFrom("", " ", "  ", "\t"),
    extra: fc.constantFrom(
      "",
      ',"more":1',
      ',"value":7',
      ',"name":"x"',
      ",",
      ',"id":"x"',
      ', "id": "é"',
      ',"id":""',
      ',"id":5',
    ),
    flip: fc.option(fc.record({ at: fc.nat(200), to: fc.integer({ min: 32, max: 126 }) }), {
      freq: 3,
    }),
  })
  .map(({ userId, name, value, spaces, extra, flip }) => {
    const fields = `"userId":${spaces}${JSON.stringify(userId)},${spaces}"name":${JSON.stringify(name)},"value":${value}`;
    const bytes = Buffer.from(`{${fields}${extra}${spaces}}`);
    if (flip && flip.at < bytes.length) bytes[flip.at] = flip.to;
    return bytes.toString();
  });

test("the scanner and the full decoder agree on every line", () => {
  fc.assert(
    fc.property(nearly, (line) => {
      // Line breaks after the brace leave the JSON as it is, but the scanner does not accept them.
      const slow = decode(line.replace("{", "{\n\n"));
      expect(decode(line)).toEqual(slow);
    }),
    { numRuns: RUNS },
  );
});

test("every accepted event has the shape that the API's description promises", () => {
  fc.assert(
    fc.property(nearly, (line) => {
      if (!(decode(line) instanceof InvalidEvent))
        expect(Value.Check(EventShape, JSON.parse(line))).toBe(true);
    }),
    { numRuns: RUNS },
  );
});

test("an event is accepted exactly when an independent implementation of the contract accepts it", () => {
  fc.assert(
    fc.property(nearly, (line) => {
      expect(!(decode(line) instanceof InvalidEvent)).toBe(isEventByTheContract(line));
    }),
    { numRuns: RUNS },
  );
});

/** The contract, implemented by other means: JSON.parse, and a search for the digits in the text. */
function isEventByTheContract(line: string): boolean {
  let event: Record<string, unknown>;
  try {
    event = JSON.parse(line);
  } catch {
    return false;
  }
  if (typeof event !== "object" || event === null || Array.isArray(event)) return false;
  const { userId, name, value } = event;
  if (typeof userId !== "string" || typeof value !== "number") return false;
  const bytes = new TextEncoder().encode(userId).length;
  if (bytes < 1 || bytes > 256 || /\0|\p{Cs}/u.test(userId)) return false;
  const { id } = event;
  if (id !== undefined && (typeof id !== "string" || id === "" || id.length > 128)) return false;
  if (name !== "add_revenue" && name !== "subtract_revenue") return false;
  const text = [...line.matchAll(/"value":\s*(-?[0-9.eE+-]+)/g)].at(-1)?.[1] ?? "";
  const [mantissa = "", power = "0"] = text.replace("-", "").toLowerCase().split("e");
  const [whole = "", part = ""] = (text.startsWith("-") ? mantissa : mantissa).split(".");
  const exponent = text.includes("e-") ? -Number(power.replace("-", "")) : Number(power);
  const significant = `${whole}${part}`.replace(/^0*/, "");
  return (
    significant.length <= 15 &&
    part.length - exponent <= 9 &&
    (significant === "" || significant.length - part.length + exponent <= 15)
  );
}
