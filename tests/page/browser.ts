/** A real Chromium, from the system's packages, that reaches no host but this machine. */
import { chromium } from "playwright-core";

import { tempDir } from "../support/programs.ts";

export const CHROMIUM = "chromium";

/** Opens a browser. `foreign` lists the requests for other hosts; none is let through. */
export async function openBrowser() {
  const home = tempDir();
  const browser = await chromium.launch({
    executablePath: Bun.which(CHROMIUM) as string,
    // Root has no sandbox; the rest keeps Chromium from looking for its maker's hosts.
    args: [
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
    ],
    env: { ...process.env, HOME: home.path } as Record<string, string>,
    timeout: 60_000,
  });
  const foreign: string[] = [];
  return {
    foreign,
    /** A page of its own: no other shares its storage. `faults` lists what its console says is wrong. */
    async page(options: Parameters<typeof browser.newContext>[0] = {}) {
      const context = await browser.newContext({
        viewport: { width: 1280, height: 900 },
        ...options,
      });
      context.setDefaultTimeout(30_000);
      await context.route(
        (url) => url.hostname !== "127.0.0.1",
        (route) => {
          foreign.push(route.request().url());
          return route.abort();
        },
      );
      const page = await context.newPage();
      const faults: string[] = [];
      page.on("pageerror", (error) => faults.push(String(error)));
      page.on("console", (message) => {
        if (/Content.Security.Policy|TrustedHTML|TypeError/.test(message.text()))
          faults.push(message.text());
      });
      return Object.assign(page, { faults });
    },
    async [Symbol.asyncDispose]() {
      await browser.close();
      home[Symbol.dispose]();
    },
  };
}
