/** Screenshots of the page over a ledger with some history, dark and light, wide and narrow: `bun run screenshots [FOLDER]`. */
import { join } from "node:path";

import { openDatabase } from "../../lib/ledger/database.ts";
import { openCluster } from "../../lib/postgres/cluster.ts";
import { event, line } from "../support/events.ts";
import { startApp, tempDir, untilBalance } from "../support/programs.ts";
import { openBrowser } from "./browser.ts";

const SECONDS = 90;
/** An hour of revenue, and balances. */
const HISTORY = `
  insert into points select 'journal:earlier', 'minute', date_trunc('minute', now()) - n * interval '1 minute', name,
    (200 + 80 * sin(n / 5.0))::int,
    sign * round((900 + 420 * sin(n / 5.0) + 160 * cos(n * 1.7))::numeric * share, 2)
  from generate_series(1, 58) as n,
    (values ('add_revenue', 1, 1), ('subtract_revenue', -1, 0.35)) as name (name, sign, share);
  insert into users_revenue
    select 'user' || n, round((1e6 / (n + 3))::numeric, 2) from generate_series(1, 5000) as n`;
const folder = process.argv[2] ?? "screenshots";

using home = tempDir();
const dataDir = home.file("data");
{
  await using first = await startApp({ dataDir });
  await untilBalance(first, "nobody", null); // the ledger is there
  const cluster = await openCluster(join(dataDir, "postgres"), () => {});
  const database = openDatabase(cluster.url, "screenshots", 1);
  await database.use(async (sql) => void (await sql.unsafe(HISTORY)));
  await database.close();
  await cluster.close();
}
await using app = await startApp({ dataDir });
for (const value of [5, 6]) await app.post(event("ann", value, { id: "order-17" }));
let second = 0;
const load = setInterval(async () => {
  const count = Math.round(300 + 150 * Math.sin(++second / 9));
  const lines = Array.from({ length: count }, (_, i) => line(`user${i % 90}`, 0.05)).join("");
  await app.postLines(lines + (second % 9 === 0 ? "[]\n" : ""));
}, 1_000);
await Bun.sleep(SECONDS * 1_000);

await using browser = await openBrowser();
for (const colorScheme of ["light", "dark"] as const)
  for (const [name, width, height] of [
    ["wide", 1280, 900],
    ["narrow", 375, 800],
  ] as const) {
    const page = await browser.page({ colorScheme, viewport: { width, height } });
    await page.goto(app.url);
    await page.locator("#largest tr").first().waitFor();
    await page.locator("#revenue canvas").waitFor();
    await page.locator("#user").fill("user17");
    await page.locator("#user").press("Enter");
    await page.locator("#balance b").waitFor();
    await page.locator("#quarantine td.line").first().waitFor();
    await page.waitForTimeout(1_500);
    await page.screenshot({ path: join(folder, `${name}-${colorScheme}.png`), fullPage: true });
    await page.close();
  }
clearInterval(load);
