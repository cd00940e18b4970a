/**
 * Bundles what runs in the browser. In the one-file program, `deploy/build.ts` puts the result in the place of
 * this file: a compiled program has no sources to bundle.
 */
import { join } from "node:path";

const FOLDER = join(import.meta.dir, "page");

/** The text of each file, by its path on the server. */
export async function bundlePage() {
  const { outputs } = await Bun.build({
    entrypoints: [join(FOLDER, "main.ts"), join(FOLDER, "page.css")],
    target: "browser",
    minify: true,
  });
  const output = (end: string) => outputs.find(({ path }) => path.endsWith(end))!.text();
  const file = (name: string) => Bun.file(join(FOLDER, name)).text();
  return {
    "/": await file("index.html"),
    "/page.js": await output(".js"),
    "/page.css": await output(".css"),
    "/page.svg": await file("page.svg"),
  };
}
