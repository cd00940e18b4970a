/** What a soak watches: samples of processes and tables, whether a measure grew, and a plot. */
import { readdirSync, readFileSync } from "node:fs";

import type postgres from "postgres";

/** A measure may grow by this share between the second and the last quarter of a soak… */
const MAX_GROWTH = 0.05;
/** …or by this much: one more connection of ten is not a leak. */
const MAX_MORE = { MiB: 2, count: 2, KiB: 64, "bytes/row": 1 } as const;
/** Fewer samples in a quarter say nothing. */
const MIN_SAMPLES = 5;

export type Unit = keyof typeof MAX_MORE;
/** One look at a measure: seconds since the start, and the figure. */
export type Sample = readonly [atS: number, value: number];

export interface Verdict {
  name: string;
  unit: Unit;
  /** The medians of the second and of the last quarter; `null` without enough samples. */
  second: number | null;
  last: number | null;
  state: "steady" | "grew" | "too few samples";
}

/** Compares the medians of the second and the last quarter of `lengthS` seconds. */
export function judge(
  name: string,
  unit: Unit,
  samples: readonly Sample[],
  lengthS: number,
): Verdict {
  const quarter = (index: number) =>
    median(
      samples
        .filter(([atS]) => Math.min(3, Math.floor((atS / lengthS) * 4)) === index)
        .map(([, value]) => value),
    );
  const [second, last] = [quarter(1), quarter(3)];
  if (second === null || last === null)
    return { name, unit, second, last, state: "too few samples" };
  const grew = last - second > Math.max(second * MAX_GROWTH, MAX_MORE[unit]);
  return { name, unit, second, last, state: grew ? "grew" : "steady" };
}

function median(values: number[]): number | null {
  if (values.length < MIN_SAMPLES) return null;
  return values.toSorted((a, b) => a - b)[values.length >> 1] as number;
}

/** Memory, descriptors and threads of a process; `null` once it has ended. */
export function readProcess(pid: number) {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    const field = (name: string) =>
      Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(status)?.[1]);
    const mib = field("VmRSS") / 1024;
    if (!(mib > 0)) return null; // a zombie has no memory
    return { mib, threads: field("Threads"), descriptors: countFiles(`/proc/${pid}/fd`) };
  } catch {
    return null;
  }
}

/** Whether a process holds a lock on a file: of the processors of one journal, only the one that posts does. */
export function holdsLock(pid: number): boolean {
  return readFileSync("/proc/locks", "utf8").includes(` ${pid} `);
}

/**
 * The memory of Postgres: of all its processes together, in which what they share counts once (PSS), but without
 * its shared memory, whose size is fixed at the start and whose pages are touched one after the other. Also how
 * many processes these are, and their descriptors.
 */
export function readPostgres(postmaster: number) {
  const children = readFileSync(`/proc/${postmaster}/task/${postmaster}/children`, "utf8");
  let [kib, processes, descriptors] = [0, 0, 0];
  for (const pid of [postmaster, ...children.split(" ").filter(Boolean)])
    try {
      const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
      const field = (name: string) =>
        Number(new RegExp(`^${name}:\\s+(\\d+)`, "m").exec(rollup)?.[1] ?? 0);
      kib += field("Pss") - field("Pss_Shmem");
      descriptors += countFiles(`/proc/${pid}/fd`);
      processes++;
    } catch {
      // a backend that has ended
    }
  return { mib: kib / 1024, processes, descriptors };
}

/** How many files are in a folder and below it; 0 without the folder. */
export function countFiles(path: string, recursive = false): number {
  try {
    return readdirSync(path, { recursive }).length;
  } catch {
    return 0;
  }
}

/** Bytes of each table with its indexes, and its rows. */
export async function readTables(sql: postgres.Sql) {
  const tables = [
    "users_revenue",
    "ids",
    "checkpoints",
    "snapshots",
    "points",
    "quarantine",
    "segments",
  ];
  const parts = tables.map(
    (name) =>
      `select '${name}' as name, pg_total_relation_size('${name}')::float8 as bytes,
         (select count(*) from ${name})::float8 as rows`,
  );
  return [...(await sql.unsafe(parts.join(" union all ")))] as unknown as {
    name: string;
    bytes: number;
    rows: number;
  }[];
}

const [WIDTH, HEIGHT, COLUMNS] = [380, 130, 3];

/** One panel for each measure; the quarters that are compared are shaded. */
export function plot(
  measures: Map<string, { unit: Unit; samples: Sample[] }>,
  verdicts: readonly Verdict[],
  lengthS: number,
): string {
  const panels = [...measures].map(([name, { unit, samples }], index) => {
    const verdict = verdicts.find((each) => each.name === name);
    const most = Math.max(...samples.map(([, value]) => value)) || 1;
    const x = (atS: number) => ((atS / lengthS) * (WIDTH - 20)).toFixed(1);
    const y = (value: number) => (HEIGHT - 30 - (value / most) * (HEIGHT - 60)).toFixed(1);
    const points = samples.map(([atS, value]) => `${x(atS)},${y(value)}`).join(" ");
    const shade = (from: number) =>
      `<rect x="${x(lengthS * from)}" y="30" width="${(WIDTH - 20) / 4}" height="${HEIGHT - 60}" fill="#eee"/>`;
    const figures = `${format(verdict?.second)} → ${format(verdict?.last)} ${unit}`;
    const place = `${10 + (index % COLUMNS) * WIDTH} ${10 + Math.floor(index / COLUMNS) * HEIGHT}`;
    const colour = verdict?.state === "grew" ? "#c00" : "#06c";
    return `<g transform="translate(${place})">${shade(0.25)}${shade(0.75)}
<text y="12">${name}</text><text y="25" fill="#666">${figures}, at most ${format(most)}</text>
<polyline points="${points}" fill="none" stroke="${colour}"/></g>`;
  });
  const height = 20 + Math.ceil(panels.length / COLUMNS) * HEIGHT;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${20 + COLUMNS * WIDTH}" height="${height}" font-family="sans-serif" font-size="11">
<rect width="100%" height="100%" fill="#fff"/>
${panels.join("\n")}
</svg>
`;
}

export function format(value: number | null | undefined): string {
  return value == null ? "?" : value.toFixed(value < 100 ? 1 : 0);
}
