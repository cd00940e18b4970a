/** The page: follows `/live`, and reads the rest while somebody looks. */
import type { Message } from "../live.ts";
import { openLists } from "./lists.ts";
import { byId, type Columns, openPlot, setTime } from "./plots.ts";
import { noteSince, openRevenue } from "./revenue.ts";
import { credential, Denied, request } from "./server.ts";

const KEPT_SECONDS = 600;
/** The server sends a message each second. */
const SILENT_MS = 6_000;
const RETRY_MS = 1_000;
const REVENUE_EVERY_MS = 2_000;

interface Row {
  values: Record<"accepted" | "posted" | "lag" | "syncP50" | "syncP99", number | null>;
  rejected: Record<string, number>;
}

const rows = new Map<number, Row>();
let lastHeard = Date.now();
let stop: AbortController | null = null;
let plots: ReturnType<typeof openPlots> | null = null;
const lists = openLists();
const revenue = openRevenue();
let revenueDueMs = 0;

const COLORS = {
  pale: ["#9cc4e4", "#3d6f96"],
  blue: ["#2f7fb8", "#63aee3"],
  green: ["#4d8f55", "#86c78e"],
  red: ["#b3392c", "#ff9a8d"],
} as const;

function openPlots() {
  const at = (index: number) => [...rows.values()][index];
  const shown = (value: number | null | undefined) => ((value ?? null) === null ? "–" : `${value}`);
  const column = (read: (row: Row) => number | null) => Array.from(rows.values(), read);
  const rates = openPlot(
    "rates",
    [
      { label: "accepted", color: COLORS.pale, width: 4 },
      { label: "posted", color: COLORS.green },
      { label: "rejected", color: COLORS.red },
    ],
    (i) => {
      const row = at(i);
      return row ? [row.values.accepted, row.values.posted, sum(row.rejected)].map(shown) : [];
    },
    KEPT_SECONDS,
  );
  const lag = openPlot(
    "lag",
    [{ label: "lag", color: COLORS.blue }],
    (i) => [shown(at(i)?.values.lag)],
    KEPT_SECONDS,
  );
  const sync = openPlot(
    "sync",
    [
      { label: "half are faster than", color: COLORS.green },
      { label: "99 of 100", color: COLORS.blue },
    ],
    (i) => [shown(at(i)?.values.syncP50), shown(at(i)?.values.syncP99)],
    KEPT_SECONDS,
  );
  return () => {
    const times = [...rows.keys()];
    const { accepted, posted } = {
      accepted: column(({ values }) => values.accepted),
      posted: column(({ values }) => values.posted),
    };
    rates.set([times, accepted, posted, column(({ rejected }) => sum(rejected))] as Columns);
    lag.set([times, column(({ values }) => values.lag)]);
    sync.set([
      times,
      column(({ values }) => values.syncP50),
      column(({ values }) => values.syncP99),
    ]);
  };
}

/** Follows the server until the page is hidden or the credential is refused; connects again when it is lost. */
async function follow() {
  stop?.abort();
  const own = (stop = new AbortController());
  while (!own.signal.aborted && !document.hidden) {
    try {
      await listen(own.signal);
    } catch (error) {
      if (own.signal.aborted) return;
      if (error instanceof Denied) return ask(error.message);
    }
    if (own.signal.aborted) return;
    say("bad", `The server has not answered since ${utc(lastHeard)}. Trying again…`);
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function listen(signal: AbortSignal) {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), SILENT_MS);
  try {
    const response = await request("/live", AbortSignal.any([signal, silence.signal]));
    byId("login").hidden = true;
    byId("content").hidden = false;
    const reader = response.body!.getReader();
    const decoder = new TextDecoder();
    for (let text = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), SILENT_MS);
      text += decoder.decode(value, { stream: true });
      for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2))
        show(JSON.parse(text.slice("data: ".length, end)) as Message);
    }
  } finally {
    clearTimeout(timer);
  }
}

function show(message: Message) {
  lastHeard = Date.now();
  keep(message);
  say(message.health.isHealthy ? "good" : "bad", message.health.sentence);
  (plots ??= openPlots())();
  const last = [...rows.values()].at(-1);
  const put = (id: string, value: number | null | undefined) =>
    (byId(`now-${id}`).textContent = (value ?? null) === null ? "–" : value!.toLocaleString("en"));
  put("accepted", last?.values.accepted);
  put("posted", last?.values.posted);
  put("lag", last?.values.lag);
  put("sync", [...rows.values()].findLast(({ values }) => values.syncP99 !== null)?.values.syncP99);
  put("quarantined", message.quarantined);
  const reasons: Record<string, number> = {};
  for (const { rejected } of rows.values())
    for (const [reason, count] of Object.entries(rejected))
      reasons[reason] = (reasons[reason] ?? 0) + count;
  put("rejected", sum(reasons));
  byId("reasons").textContent = `Rejected in ten minutes: ${
    Object.entries(reasons)
      .map(([reason, count]) => `${reason} ${count}`)
      .join(", ") || "none"
  }.`;
  byId("totals").textContent =
    `Accepted since ${utc(Date.parse(message.startedAt))}: ${message.accepted.toLocaleString("en")}. ` +
    `In the ledger: ${(message.posted ?? 0).toLocaleString("en")}.`;
  noteSince(message.postedSince);
  lists.update(message);
  if (performance.now() >= revenueDueMs) void showRevenue();
}

async function showRevenue() {
  revenueDueMs = performance.now() + REVENUE_EVERY_MS;
  const step = document.querySelector<HTMLInputElement>("[name=step]:checked")!.value;
  await revenue.update(step).catch(() => {}); // the sentence of health says why
}

function keep({ seconds }: Message) {
  for (const [i, at] of seconds.at.entries()) {
    const rejected = Object.entries(seconds.rejected).map(
      ([reason, counts]) => [reason, counts[i] ?? 0] as const,
    );
    rows.set(at!, {
      values: {
        accepted: seconds.accepted[i]!,
        posted: seconds.posted[i]!,
        lag: seconds.lag[i]!,
        syncP50: seconds.syncP50[i]!,
        syncP99: seconds.syncP99[i]!,
      },
      rejected: Object.fromEntries(rejected.filter(([, count]) => count > 0)),
    });
  }
  if (seconds.at.length > 1) {
    // Behind a balancer, another server may bring seconds from before those that are there.
    const sorted = [...rows].toSorted(([a], [b]) => a - b);
    rows.clear();
    for (const [at, row] of sorted) rows.set(at, row);
  }
  const last = Math.max(...rows.keys());
  for (const at of rows.keys()) if (at <= last - KEPT_SECONDS) rows.delete(at);
}

function ask(why: string) {
  say("waiting", "Waiting for a credential.");
  credential.clear();
  byId("content").hidden = true;
  byId("login").hidden = false;
  byId("login-error").textContent = why;
  byId("credential").focus();
}

function say(state: string, sentence: string) {
  const health = byId("health");
  health.dataset["state"] = state;
  if (health.textContent !== sentence) health.textContent = sentence;
}

function sum(counts: Record<string, number>): number {
  return Math.round(Object.values(counts).reduce((a, b) => a + b, 0) * 100) / 100;
}

function utc(ms: number): string {
  return `${new Date(ms).toISOString().slice(0, 19).replace("T", " ")} UTC`;
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const input = byId<HTMLInputElement>("credential");
  credential.set(input.value.trim());
  input.value = "";
  void follow();
});
for (const radio of document.querySelectorAll("[name=step]"))
  radio.addEventListener("change", () => void showRevenue());
document.addEventListener("visibilitychange", () =>
  document.hidden ? stop?.abort() : void follow(),
);
const tell = () => setTime(byId("clock") as HTMLTimeElement, Date.now() / 1000);
setInterval(tell, 1_000);
tell();
void follow();
