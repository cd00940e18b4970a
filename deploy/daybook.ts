/**
 * The one-file program: `build.ts` compiles this file. Each command is one of the programs, with the same options,
 * settings and exit codes.
 */
import { version } from "../package.json";
import { VALIDATE_COMMAND } from "../lib/server/event-schema.ts";

const COMMANDS: Record<string, () => Promise<{ run(): unknown }>> = {
  serve: () => import("../app.ts"),
  send: () => import("../client.ts"),
  process: () => import("../processor.ts"),
  [VALIDATE_COMMAND]: () => import("../lib/server/validator.ts"),
};

const USAGE = `usage: daybook serve | send [FILE…] | process [FILE…]

  serve     accepts events over HTTP, posts them to balances in Postgres, and serves the balances
  send      sends files of events to a server
  process   posts events to the balances, or checks and corrects them

daybook COMMAND --help lists the options, settings and exit codes of each.
`;

const [command = "", ...args] = process.argv.slice(2);
process.argv.splice(2, 1);
const program = Object.hasOwn(COMMANDS, command) ? COMMANDS[command] : undefined;
if (program) {
  const { run } = await program();
  await run(); // Bun waits for it even where nothing else keeps the process alive
} else if (["--help", "-h", "help"].includes(command)) process.stdout.write(USAGE);
else if (command === "--version") process.stdout.write(`daybook ${version}\n`);
else {
  if (command)
    process.stderr.write(`unknown command: ${JSON.stringify([command, ...args].join(" "))}\n`);
  process.stderr.write(USAGE);
  process.exitCode = 2;
}
