/**
 * The kinds of metrics for Prometheus, and those that every program with a processor has. Every label has
 * few values, whatever is sent. What each request adds is kept in Maps, and becomes a metric when it is
 * scraped: observing with labels costs prom-client more than all the rest of a request's counting.
 */
import {
  collectDefaultMetrics,
  Counter,
  Gauge,
  Histogram,
  type Metric,
  Registry,
} from "prom-client";

import { version } from "../package.json";

/** Default metrics that Bun has no values for, or that break Prometheus' naming rules. */
const OMITTED = /^nodejs_(?!eventloop_lag_seconds)|^process_heap_bytes/;
const POSTING_BUCKETS = [0.005, 0.02, 0.1, 0.5, 2, 10];

/** A batch that this process has posted; its transaction took `ms`. */
type Posting = Record<"events" | "duplicates" | "users" | "ms", number> & {
  /** By reason. */
  quarantined: Record<string, number>;
};

export type Meters = ReturnType<typeof openMeters>;

/** The metrics of a program, each with the prefix `daybook_`. */
export function openMeters() {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry, eventLoopMonitoringPrecision: 100 });
  for (const { name } of registry.getMetricsAsArray())
    if (OMITTED.test(name)) registry.removeSingleMetric(name);
  const build = { name: "daybook_build_info", help: "1, for the versions.", registers };
  new Gauge({ ...build, labelNames: ["version", "bun"] }).set({ version, bun: Bun.version }, 1);
  return {
    contentType: registry.contentType,
    scrape: () => registry.metrics(),

    counter: (name: string, help: string) =>
      new Counter({ name: `daybook_${name}_total`, help, registers }),

    histogram: (name: string, help: string, buckets: number[]) =>
      new Histogram({ name: `daybook_${name}`, help, buckets, registers }),

    /** `read` is called for each scrape; while it returns `null`, there is no value. */
    gauge(name: string, help: string, read: () => number | boolean | null): void {
      const collect = function (this: Gauge) {
        const value = read();
        if (value === null) this.remove();
        else this.set(Number(value));
      };
      new Gauge({ name: `daybook_${name}`, help, registers, collect });
    },

    /** A counter with labels that costs no more than a number in a Map. */
    counted(name: string, help: string, labelNames: string[]) {
      const counts = new Map<string, number>();
      new Counter({
        name: `daybook_${name}_total`,
        help,
        labelNames,
        registers,
        collect() {
          this.reset();
          for (const [key, count] of counts) this.labels(...key.split(" ")).inc(count);
        },
      });
      return (count: number, ...labels: string[]) => {
        const key = labels.join(" ");
        counts.set(key, (counts.get(key) ?? 0) + count);
      };
    },

    /** A histogram of seconds with one label that costs no more than a few numbers in a Map. */
    timed(name: string, help: string, label: string, buckets: readonly number[]) {
      const series = new Map<string, { counts: number[]; sum: number }>();
      const metric = { name: `daybook_${name}`, help, type: "histogram", aggregator: "sum" };
      const get = async () => ({ ...metric, values: [...series].flatMap(valuesOf) });
      registry.registerMetric({ ...metric, get, reset() {} } as unknown as Metric);
      return (value: string, seconds: number) => {
        let one = series.get(value);
        if (!one) series.set(value, (one = { counts: [...buckets, 0].fill(0), sum: 0 }));
        let bucket = 0;
        while (bucket < buckets.length && seconds > (buckets[bucket] as number)) bucket++;
        one.counts[bucket]!++;
        one.sum += seconds;
      };

      function valuesOf([value, { counts, sum }]: [string, { counts: number[]; sum: number }]) {
        let total = 0;
        const labels = { [label]: value };
        const sample = (suffix: string, labels: object, value: number) => {
          return { metricName: `${metric.name}_${suffix}`, labels, value };
        };
        return [
          ...counts.map((count, i) =>
            sample("bucket", { ...labels, le: buckets[i] ?? "+Inf" }, (total += count)),
          ),
          sample("sum", labels, sum),
          sample("count", labels, total),
        ];
      }
    },
  };
}

/** Counts the postings of this process. */
export function countPostings({ counter, counted, histogram }: Meters) {
  const events = counter("events_posted", "Events posted by this process.");
  const duplicates = counter("events_duplicate", "Events not counted: they came before.");
  const users = counter("posting_users", "Balances changed by postings of this process.");
  const seconds = histogram("posting_duration_seconds", "Duration of a posting.", POSTING_BUCKETS);
  const help = "Lines quarantined by this process, by reason.";
  const quarantined = counted("events_quarantined", help, ["reason"]);
  const reasons = ["invalid", "refused", "conflict"];
  for (const reason of reasons) quarantined(0, reason);
  return (posting: Posting): void => {
    events.inc(posting.events);
    duplicates.inc(posting.duplicates);
    users.inc(posting.users);
    seconds.observe(posting.ms / 1000);
    for (const reason of reasons) quarantined(posting.quarantined[reason] ?? 0, reason);
  };
}
