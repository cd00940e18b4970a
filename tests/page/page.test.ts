/** The page in a real Chromium, over real servers. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

import type { Page } from "playwright-core";

import { event, line } from "../support/events.ts";
import { openLedger } from "../support/ledger.ts";
import { isInstalled, startApp, until, untilBalance } from "../support/programs.ts";
import { CHROMIUM, openBrowser } from "./browser.ts";

setDefaultTimeout(180_000);

const hasChromium = isInstalled(CHROMIUM);
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const WAIT_MS = 40_000;
const IMAGE = "<img src=x onerror=alert(1)>";

/** Waits until the text of `selector` fits. */
async function untilText(page: Page, selector: string, wanted: RegExp) {
  let found = "";
  const fits = async () => wanted.test((found = (await page.textContent(selector)) ?? ""));
  await until(fits, WAIT_MS).catch(() => {
    throw new Error(`${selector} has ${JSON.stringify(found)}, expected ${wanted}`);
  });
}

async function search(page: Page, user: string, balance: string) {
  await page.fill("#user", user);
  await page.press("#user", "Enter");
  await until(async () => (await page.textContent("#balance")) === user + balance, WAIT_MS);
}

/** How many pixels of a plot are painted. */
function painted(page: Page, id: string): Promise<number> {
  return page.evaluate((id) => {
    const canvas = document.querySelector<HTMLCanvasElement>(`#${id} canvas`)!;
    const { data } = canvas.getContext("2d")!.getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, i) => i % 4 === 3 && value > 0).length;
  }, id);
}

test.if(hasChromium)(
  "an event of a moment ago is in the rate, the plots and the balance; nothing is loaded from elsewhere",
  async () => {
    await using ledger = await openLedger();
    await using app = await ledger.start();
    await using browser = await openBrowser();
    const page = await browser.page();
    let bytes = 0;
    page.on("response", async (response) => {
      const { pathname } = new URL(response.url());
      if (/^\/(page\.\w+)?$/.test(pathname))
        bytes += (await response.request().sizes()).responseBodySize;
    });
    await page.goto(app.url);
    await untilText(page, "#empty-command", /^curl .*liveEvent/);
    await page.waitForSelector("#empty");
    await untilText(page, "#health", /^Healthy\.$/);
    // As the command says, in a shell.
    const command = (await page.textContent("#empty-command"))!;
    expect(await Bun.spawn(["sh", "-c", `${command} -sf`], { stdout: "ignore" }).exited).toBe(0);
    await until(() => page.isHidden("#empty"), WAIT_MS);
    expect((await app.postLines(line("user1") + "[]\n")).status).toBe(201);
    for (const value of [1, 2]) await app.post(event("ben", value, { id: "a" }));
    await search(page, "user1", "99.5");
    await untilText(page, "#now-rejected", /^1$/);
    await untilText(page, "#totals", /In the ledger: 3\./);
    await untilText(page, "#revenue-readout", /add_revenue 100\.5 \(3\).*net 100\.5/);
    await untilText(page, "#largest", /^user199\.5ben1$/);
    await untilText(page, "#quarantine", /its id belongs to another event/);
    for (const id of ["rates", "revenue", "lag", "sync"])
      await until(async () => (await painted(page, id)) > 500, WAIT_MS);
    expect((await app.post(event("user1", -0.25))).status).toBe(201);
    await until(async () => (await page.textContent("#balance")) === "user199.25", WAIT_MS);
    await page.focus("#rates");
    for (let i = 0; i < 3; i++) await page.keyboard.press("ArrowLeft");
    await untilText(page, "#rates-readout", /UTC.*accepted .*posted .*rejected/);
    expect(browser.foreign).toEqual([]);
    expect(page.faults).toEqual([]);
    expect(bytes).toBeGreaterThan(10_000);
    expect(bytes).toBeLessThan(150_000);
  },
);

test.if(hasChromium)(
  "users and lines are text, among 100,000; nothing shifts; axe finds nothing serious, dark or light, at 375 pixels",
  async () => {
    await using ledger = await openLedger();
    await using app = await ledger.start();
    await untilBalance(app, "nobody", null);
    await ledger.select(
      "insert into users_revenue select 'user' || n, n from generate_series(1, 100000) as n",
    );
    await ledger.select(`insert into users_revenue values ('${IMAGE}', 1000000), ('..', 2000000)`);
    await ledger.select(
      `insert into quarantine values ('journal:x', 1, '${IMAGE}', '<script>alert(1)</script>', now())`,
    );
    await using browser = await openBrowser();
    for (const colorScheme of ["light", "dark"] as const) {
      const page = await browser.page({ colorScheme, viewport: { width: 375, height: 700 } });
      await page.goto(app.url);
      await search(page, IMAGE, "1000000");
      await search(page, "..", "2000000");
      await search(page, "user77777", "77777");
      await untilText(page, "#largest", /^\.\.2000000<img src=x onerror=alert\(1\)>1000000user/);
      await untilText(page, "#quarantine", /<img .*<script>alert\(1\)<\/script>/);
      await until(async () => (await painted(page, "rates")) > 500, WAIT_MS);
      expect(await page.locator("img").count()).toBe(0);
      expect(await page.evaluate(() => document.documentElement.scrollWidth)).toBe(375);
      await page.evaluate(AXE);
      const found = await page.evaluate(() =>
        (window as unknown as { axe: typeof import("axe-core") }).axe.run(),
      );
      const serious = found.violations.filter(({ impact }) =>
        /serious|critical/.test(impact ?? ""),
      );
      expect(serious.map(({ id, nodes }) => [id, nodes.map(({ html }) => html)])).toEqual([]);
      await page.evaluate(() => {
        const list = ((window as unknown as { shifts: number[] }).shifts = [] as number[]);
        new PerformanceObserver((entries) => {
          for (const entry of entries.getEntries())
            list.push((entry as unknown as { value: number }).value);
        }).observe({ type: "layout-shift" });
      });
      for (const value of [1, 20_000, 300_000]) await app.post(event("user1", value));
      await search(page, "user1", colorScheme === "light" ? "320002" : "640003");
      expect(await page.evaluate(() => (window as unknown as { shifts: number[] }).shifts)).toEqual(
        [],
      );
      expect(page.faults).toEqual([]);
      await page.close();
    }
  },
);

test.if(hasChromium)(
  "the page says that a secret is wrong, and the right one stays in the tab and out of every URL",
  async () => {
    await using ledger = await openLedger({ READ_SECRET: "read-secret" });
    await using app = await ledger.start();
    await using browser = await openBrowser();
    const page = await browser.page();
    const urls: string[] = [];
    page.on("request", (request) => urls.push(request.url()));
    await page.goto(app.url);
    await page.waitForSelector("#login");
    await page.fill("#credential", "wrong");
    await page.press("#credential", "Enter");
    await untilText(page, "#login-error", /wrong/);
    await page.fill("#credential", "read-secret");
    await page.press("#credential", "Enter");
    await untilText(page, "#health", /^Healthy\.$/);
    await page.reload();
    await untilText(page, "#health", /^Healthy\.$/);
    expect(await page.isHidden("#login")).toBe(true);
    expect(urls.filter((url) => url.includes("secret") || url.includes("wrong"))).toEqual([]);
  },
);

test.if(hasChromium)(
  "the page says that the server was killed, and finds its successor",
  async () => {
    await using ledger = await openLedger();
    await using first = await ledger.start();
    await using browser = await openBrowser();
    const page = await browser.page();
    await page.goto(first.url);
    await untilText(page, "#health", /^Healthy\.$/);
    first.kill();
    await first.exit();
    await untilText(page, "#health", /^The server has not answered since 20\d\d-.* UTC\./);
    const { port } = new URL(first.url);
    await using second = await startApp({
      dataDir: ledger.dataDir,
      databaseUrl: ledger.url,
      env: { ...ledger.env, PORT: port },
    });
    await untilText(page, "#health", /^Healthy\.$/);
    expect((await second.post(event("ann", 7))).status).toBe(201);
    await search(page, "ann", "7");
  },
);

test("the page's files are asked for by ETag, and under a strict policy", async () => {
  await using ledger = await openLedger();
  await using app = await ledger.start({ READ_SECRET: "read-secret" }, ["--no-processor"]);
  for (const path of ["/", "/page.js", "/page.css", "/page.svg"]) {
    const { status, headers } = await fetch(app.url + path);
    expect([path, status, headers.get("content-encoding")]).toEqual([path, 200, "gzip"]);
    const policy = headers.get("content-security-policy");
    expect(policy).toContain("default-src 'none'; script-src 'self'");
    expect(policy).not.toContain("unsafe");
    const again = await fetch(app.url + path, {
      headers: { "if-none-match": headers.get("etag")! },
    });
    expect(again.status).toBe(304);
    const plain = await fetch(app.url + path, { headers: { "accept-encoding": "identity" } });
    expect(plain.headers.get("content-encoding")).toBeNull();
  }
});
