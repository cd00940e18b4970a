/** Revenue over time: bars by event name, stacked away from zero, and the net line; exact below. */
import { formatAmount, UNITS } from "../../event/amount.ts";
import { byId, type Columns, type Line, openPlot, timeElement } from "./plots.ts";
import { read } from "./server.ts";

interface Point {
  at: string;
  name: string;
  events: number;
  amount: string;
}

const STEPS: Record<string, { seconds: number; count: number }> = {
  minute: { seconds: 60, count: 60 },
  hour: { seconds: 3_600, count: 48 },
  day: { seconds: 86_400, count: 90 },
};
const NET: Line = { label: "net", color: ["#1c2024", "#f2f4f7"] };
const COLORS = [
  ["#2f7fb8", "#63aee3"],
  ["#c9752b", "#eda566"],
  ["#4d8f55", "#86c78e"],
  ["#8a63b5", "#bd9be3"],
  ["#b5527c", "#e291b4"],
  ["#75797f", "#a4a9b0"],
] as const;

export function openRevenue() {
  let shown = "";
  let plot: ReturnType<typeof openPlot> | null = null;
  let exact: string[][] = [];

  return {
    /** Reads the points of `step` again. */
    async update(step: string) {
      const { seconds, count } = STEPS[step]!;
      const end = (Math.floor(Date.now() / 1000 / seconds) + 1) * seconds;
      const from = end - count * seconds;
      const time = (at: number) => new Date(at * 1000).toISOString();
      const query = new URLSearchParams({ step, from: time(from), to: time(end) });
      const { points } = await read<{ points: Point[] }>(`/revenue?${query}`);
      const names = [...new Set(points.map(({ name }) => name))].sort();
      const key = JSON.stringify([step, names]);
      if (key !== shown || !plot) {
        plot?.close();
        // The longest bars are drawn first, and what is nearer to zero over them.
        const bars = names.map((label, i) => ({
          label,
          color: COLORS[i % COLORS.length]!,
          isBar: true,
        }));
        plot = openPlot("revenue", [...bars.toReversed(), NET], (index) => exact[index] ?? []);
        shown = key;
      }
      plot.set(
        stack(
          points,
          names,
          Array.from({ length: count }, (_, i) => from + i * seconds),
        ),
      );
    },
  };

  /** The columns of the plot; notes the exact values. */
  function stack(points: Point[], names: string[], times: number[]): Columns {
    const index = new Map(times.map((at, i) => [at, i]));
    const sums = times.map(() => names.map(() => ({ amount: 0n, events: 0 })));
    for (const { at, name, amount, events } of points) {
      const sum = sums[index.get(Date.parse(at) / 1000) ?? -1]?.[names.indexOf(name)];
      if (!sum) continue;
      sum.amount += units(amount);
      sum.events += events;
    }
    const net = sums.map((row) => row.reduce((total, { amount }) => total + amount, 0n));
    exact = sums.map((row, i) => [
      ...row.map(({ amount, events }) => `${formatAmount(amount)} (${events})`).reverse(),
      formatAmount(net[i]!),
    ]);
    const stacked = sums.map((row) => {
      const reached = { up: 0, down: 0 };
      return row.map(({ amount }) => {
        const value = Number(amount) / Number(UNITS);
        if (value === 0) return null;
        return value > 0 ? (reached.up += value) : (reached.down += value);
      });
    });
    const bars = names.map((_, n) => stacked.map((row) => row[n] ?? null)).reverse();
    return [times, ...bars, net.map((amount) => Number(amount) / Number(UNITS))];
  }
}

/** Says since when there are points, on a ledger that is older. */
export function noteSince(since: string | null) {
  byId("revenue-note").replaceChildren(
    ...(since
      ? ["What was posted before ", timeElement(Date.parse(since) / 1000), " is not shown. "]
      : []),
    "By the time at which the server stored the events; in brackets their number.",
  );
}

/** A decimal of the ledger in units of 10^-9: sums exceed what an event may hold. */
function units(text: string): bigint {
  const [whole = "0", fraction = ""] = text.replace("-", "").split(".");
  const size = BigInt(whole) * UNITS + BigInt(fraction.padEnd(9, "0").slice(0, 9));
  return text.startsWith("-") ? -size : size;
}
