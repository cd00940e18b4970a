/** Plots that follow the theme and the width, can be read with the keyboard, and say exact values below. */
import uPlot from "uplot";

export interface Line {
  label: string;
  /** As [light, dark]. */
  color: readonly [string, string];
  isBar?: boolean;
  width?: number;
}

export type Columns = [number[], ...(number | null)[][]];

const dark = matchMedia("(prefers-color-scheme: dark)");
const still: uPlot[] = [];
dark.addEventListener("change", () => still.forEach((plot) => plot.redraw()));

export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  return document.getElementById(id) as T;
}

export function colorOf({ color: [light, darker] }: Line): string {
  return dark.matches ? darker : light;
}

/** `2026-11-26 16:20:11 UTC`, with the local time as its title. */
export function timeElement(seconds: number): HTMLTimeElement {
  const time = document.createElement("time");
  return setTime(time, seconds);
}

export function setTime(time: HTMLTimeElement, seconds: number): HTMLTimeElement {
  const date = new Date(seconds * 1000);
  time.dateTime = date.toISOString();
  time.textContent = `${time.dateTime.slice(0, 19).replace("T", " ")} UTC`;
  time.title = `${date.toLocaleString()} local`;
  return time;
}

/**
 * A plot in the element `id`, of the last `seconds` where they are given. `values` are the exact values of point `index`, in the order of `lines`. They
 * stand below the plot for the point under the pointer or the arrow keys, else for the last one.
 */
export function openPlot(
  id: string,
  lines: Line[],
  values: (index: number) => string[],
  seconds?: number,
) {
  const place = byId(id);
  const readout = byId(`${id}-readout`);
  const soft = () => getComputedStyle(document.body).getPropertyValue("color");
  const axis = {
    stroke: soft,
    grid: { stroke: () => (dark.matches ? "#343a42" : "#e4e7eb"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  const plot = new uPlot(
    {
      width: place.clientWidth || 300,
      height: place.clientHeight,
      legend: { show: false },
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      cursor: { drag: { x: false, y: false }, y: false },
      scales: {
        x: { range: (plot, first, last) => xRange(plot, first, last, seconds) },
        y: {
          range: (_, low, high) =>
            uPlot.rangeNum(Math.min(0, low ?? 0), Math.max(high ?? 0, 1), 0.1, true),
        },
      },
      axes: [
        { ...axis, values: TIMES, size: 28, incrs: WHOLE_MINUTES },
        { ...axis, size: 64 },
      ],
      series: [{}, ...lines.map(seriesOf)],
      hooks: { setCursor: [read], setData: [read] },
    },
    [[], ...lines.map(() => [])] as unknown as uPlot.AlignedData,
    place,
  );
  still.push(plot);
  new ResizeObserver(() => {
    if (place.clientWidth > 0)
      plot.setSize({ width: place.clientWidth, height: place.clientHeight });
  }).observe(place);
  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const last = (plot.data[0]?.length ?? 0) - 1;
    if (!step || last < 0) return;
    event.preventDefault();
    const index = Math.min(last, Math.max(0, (plot.cursor.idx ?? last) + step));
    plot.setCursor({ left: plot.valToPos(plot.data[0]![index]!, "x"), top: 10 });
  });
  return {
    set: (columns: Columns) => plot.setData(columns as uPlot.AlignedData),
    close() {
      still.splice(still.indexOf(plot), 1);
      plot.destroy();
    },
  };

  /** Also called while the plot is made. */
  function read(plot: uPlot) {
    const index = plot.cursor.idx ?? plot.data[0].length - 1;
    const at = plot.data[0][index];
    if (at === undefined) return readout.replaceChildren("Nothing yet.");
    const exact = values(index);
    const parts = lines.map((line, i) => {
      const part = document.createElement("span");
      const mark = document.createElement("i");
      mark.style.background = colorOf(line);
      part.append(mark, `${line.label} ${exact[i] ?? "–"}`);
      return part;
    });
    readout.replaceChildren(timeElement(at), ...parts);
  }
}

/** The last `seconds`; else all points, and half the way to the next ones, where bars end. */
function xRange(plot: uPlot, first: number, last: number, seconds?: number): uPlot.Range.MinMax {
  if (seconds) return [last - seconds, last];
  const half = ((plot.data[0][1] ?? 0) - (plot.data[0][0] ?? 0)) / 2;
  return [first - half, last + half];
}

/** What may lie between two labels, in seconds. */
const WHOLE_MINUTES = [1, 2, 5, 10, 15, 30, 60, 180, 360, 720, 1440, 7 * 1440, 30 * 1440].map(
  (minutes) => minutes * 60,
);

const TIMES = (plot: uPlot, splits: number[]): string[] => {
  const [first = 0, last = 0] = [plot.scales["x"]?.min ?? 0, plot.scales["x"]?.max ?? 0];
  return splits.map((seconds) => {
    const text = new Date(seconds * 1000).toISOString();
    return last - first > 2 * 86_400 ? text.slice(5, 10) : text.slice(11, 16);
  });
};

function seriesOf(line: Line): uPlot.Series {
  const color = () => colorOf(line);
  if (!line.isBar)
    return { label: line.label, stroke: color, width: line.width ?? 1.5, points: { show: false } };
  return {
    label: line.label,
    fill: color,
    stroke: color,
    width: 0,
    points: { show: false },
    paths: uPlot.paths.bars!({ size: [0.7, 40, 1] }),
  };
}
