/** Which tool the options of `processor.ts` ask for, and what for. */
import type { Options } from "../config.ts";
import { visible } from "../progress.ts";
import { parseTime, TIME_RULE } from "../time.ts";
import type { ToolName } from "./tools.ts";

/** The command line is wrong: exit code 2. */
export class InvalidUse extends Error {}

const TOOLS = [
  "verify",
  "rebuild",
  "check",
  "quarantine",
  "retire",
  "history",
  "backup",
  "restore",
] as const;

/** The tool that the options ask for, `null` for none. Throws InvalidUse. */
export function toolOf(options: Options): ToolName | null {
  const { repair, yes, quarantine } = options;
  const [tool, ...others] = TOOLS.filter((name) => (options[name] ?? false) !== false);
  if (others.length > 0)
    throw new InvalidUse(`use only one of ${TOOLS.map((name) => `--${name}`).join(", ")}`);
  for (const name of ["from", "to"])
    if (options[name] !== undefined && tool !== "history")
      throw new InvalidUse(`--${name} requires --history`);
  if (repair && tool !== "check") throw new InvalidUse("--repair requires --check");
  if (yes && !["rebuild", "retire", "restore"].includes(tool ?? ""))
    throw new InvalidUse("--yes requires --rebuild, --retire or --restore");
  for (const name of ["backup", "restore"])
    if (options[name] === "") throw new InvalidUse(`--${name} requires a folder`);
  if (tool === "check") return repair ? "repair" : "check";
  if (tool !== "quarantine") return tool ?? null;
  if (quarantine === "list" || quarantine === "retry" || quarantine === "dismiss")
    return quarantine;
  const known = "use --quarantine, --quarantine=retry or --quarantine=dismiss";
  throw new InvalidUse(`--quarantine=${visible(quarantine as string)} is unknown: ${known}`);
}

/** What the options ask a tool for. Throws InvalidUse. */
export function readAsked({ yes, retire, history, from, to, backup, restore }: Options) {
  const read = (name: string, text: Options[string], otherwise: number) => {
    const ms = text === undefined ? otherwise : parseTime(String(text));
    if (ms === undefined) throw new InvalidUse(`--${name}=${visible(String(text))}: ${TIME_RULE}`);
    return ms;
  };
  const toMs = read("to", to, Number.POSITIVE_INFINITY);
  return {
    yes: yes === true,
    gone: (retire ?? []) as string[],
    asked: { user: String(history ?? ""), fromMs: read("from", from, 0), toMs },
    folder: String(backup ?? restore ?? ""),
  };
}
