/** Which settings are valid, and what is said about one that is not. */
import { expect, test } from "bun:test";

import { maskSettings, parseDuration, readSettings, type SettingName } from "../../lib/config.ts";

const SECRET = "quokka-in-a-secret";

const INVALID: [name: SettingName, found: string][] = [
  ["PORT", "eighty"],
  ["PORT", "-1"],
  ["PORT", "65536"],
  ["PORT", "80.5"],
  ["PORT", "0x50"],
  ["PORT", "1e3"],
  ["PORT", "8000x"],
  ["PORT", " "],
  ["HOST", "not a host"],
  ["HOST", "http://127.0.0.1"],
  ["DATA_DIR", "da\0ta"],
  ["EVENT_TYPES", "add_revenue"],
  ["EVENT_TYPES", "a:+,a:-"],
  ["SERVER_URL", "nonsense"],
  ["SERVER_URL", "ftp://127.0.0.1"],
  ["AUTH_SECRET", `${SECRET} with spaces`],
  ["AUTH_SECRET", `${SECRET}é`],
  ["AUTH_SECRET", `${SECRET}\n`],
  ["AUTH_SECRET", `${SECRET},,${SECRET}`],
  ["AUTH_SECRET", ","],
  ["JWKS_URL", `ftp://user:${SECRET}@127.0.0.1/keys`],
  ["DATABASE_URL", SECRET],
  ["DATABASE_URL", `mysql://daybook:${SECRET}@127.0.0.1/daybook`],
  ["DATABASE_URL", `http://daybook:${SECRET}@127.0.0.1/daybook`],
];
for (const [name, found] of INVALID)
  test(`${name}=${JSON.stringify(found)} is invalid: one line has its name, what was found and what is required`, () => {
    const { invalid } = readSettings([name], { [name]: found });
    expect(invalid).toEqual([expect.stringMatching(new RegExp(`^${name} is .+: use .+$`, "s"))]);
    const secret = /SECRET|TOKEN|_URL$/.test(name) && name !== "SERVER_URL";
    if (secret) expect(invalid[0]).not.toContain(SECRET);
    else expect(invalid[0]).toContain(found);
  });

const NAMES = ["HOST", "AUTH_SECRET"] as const;
const LONG = "sixteen-or-more!";
for (const HOST of [
  "0.0.0.0",
  "::",
  "192.0.2.1",
  "example.com",
  "127.0.0.1.example.com",
  "localhost.me",
])
  test(`HOST ${HOST} requires a secret of your own`, () => {
    for (const AUTH_SECRET of ["secret", "", undefined, `${LONG},secret`, `secret,${LONG}`])
      expect(readSettings(NAMES, { HOST, AUTH_SECRET }).invalid).toEqual([
        expect.stringMatching(/^AUTH_SECRET\b.*HOST/),
      ]);
    for (const AUTH_SECRET of [LONG.slice(1), `${LONG},own`])
      expect(readSettings(NAMES, { HOST, AUTH_SECRET }).invalid).toEqual([
        expect.stringMatching(/^AUTH_SECRET is too short.*HOST/),
      ]);
    const others = { READ_SECRET: "short" };
    const names = [...NAMES, "READ_SECRET"] as const;
    expect(readSettings(names, { HOST, AUTH_SECRET: LONG, ...others }).invalid).toHaveLength(1);
    expect(readSettings(NAMES, { HOST, AUTH_SECRET: `${LONG},${LONG}` }).invalid).toEqual([]);
  });

for (const HOST of ["127.0.0.1", "127.0.0.2", "::1", "localhost", "", undefined])
  test(`HOST ${HOST} is loopback and accepts the default secret`, () =>
    expect(readSettings(NAMES, { HOST }).invalid).toEqual([]));

test.each([
  ["90", 90_000],
  ["90s", 90_000],
  ["5m", 300_000],
  ["2h", 7_200_000],
  ["30d", 2_592_000_000],
  ["soon", undefined],
  ["", undefined],
  ["-5m", undefined],
  ["1.5h", undefined],
])("the duration %j is %p ms", (text, ms) => {
  expect(parseDuration(text)).toBe(ms as number);
});

test("a setting is parsed, an empty one is unset, and the settings cannot change", () => {
  const env = { PORT: "0", AUTH_SECRET: "a,b", JOURNAL_KEEP_DAYS: "1.5", LOG_LEVEL: "" };
  const names = ["PORT", "AUTH_SECRET", "READ_SECRET", "JOURNAL_KEEP_DAYS", "LOG_LEVEL"] as const;
  const { settings, invalid } = readSettings(names, env);
  expect(invalid).toEqual([]);
  expect(settings).toEqual({
    PORT: 0,
    AUTH_SECRET: ["a", "b"],
    READ_SECRET: undefined,
    JOURNAL_KEEP_DAYS: 1.5,
    LOG_LEVEL: "info",
  });
  expect(Object.isFrozen(settings)).toBe(true);
});

test("JWT_SECRET and JWKS_URL exclude each other, and TLS_CERT requires TLS_KEY", () => {
  const names = ["JWT_SECRET", "JWKS_URL", "TLS_CERT", "TLS_KEY"] as const;
  const env = {
    JWT_SECRET: "s".repeat(32),
    JWKS_URL: "http://127.0.0.1/keys",
    TLS_CERT: "cert.pem",
  };
  expect(readSettings(names, env).invalid).toEqual([
    "set JWT_SECRET or JWKS_URL, not both",
    "TLS_KEY is not set: set both TLS_CERT and TLS_KEY",
  ]);
});

test.each(["s".repeat(31), `${"s".repeat(31)} `, " ".repeat(40), `${"s ".repeat(31)}`])(
  "JWT_SECRET %j is too short, and the message says how to make one",
  (JWT_SECRET) => {
    const { invalid } = readSettings(["JWT_SECRET"], { JWT_SECRET });
    expect(invalid).toEqual([expect.stringMatching(/^JWT_SECRET is invalid.*openssl rand/)]);
    expect(
      readSettings(["JWT_SECRET"], { JWT_SECRET: `${JWT_SECRET}${"s".repeat(32)}` }).invalid,
    ).toEqual([]);
  },
);

test("a secret that grants writing cannot be one that only grants reading", () => {
  const names = ["AUTH_SECRET", "READ_SECRET"] as const;
  const { invalid } = readSettings(names, { AUTH_SECRET: "a,b", READ_SECRET: "c,b" });
  expect(invalid).toEqual([expect.stringContaining("both READ_SECRET and AUTH_SECRET")]);
  expect(readSettings(names, { AUTH_SECRET: "a,b", READ_SECRET: "c" }).invalid).toEqual([]);
});

test("keys that verify tokens come over https, or from this machine", () => {
  const invalid = (JWKS_URL: string) => readSettings(["JWKS_URL"], { JWKS_URL }).invalid.length;
  expect(["https://issuer.test/k", "http://localhost/k", "http://[::1]:8/k"].map(invalid)).toEqual([
    0, 0, 0,
  ]);
  expect(
    ["http://issuer.test/k", "http://10.0.0.1/k", "http://127.0.0.1.evil.test/"].map(invalid),
  ).toEqual([1, 1, 1]);
});

test("a log shows of a secret only that it is set", () => {
  const shown = maskSettings({ PORT: 0, AUTH_SECRET: [SECRET], DATABASE_URL: undefined });
  expect(shown).toEqual({ PORT: 0, AUTH_SECRET: "(set)", DATABASE_URL: undefined });
});
