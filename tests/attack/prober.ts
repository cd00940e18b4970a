/**
 * Asks for `/healthz` of the server at argv[2], whose process is argv[3], again and again, and notes the longest
 * wait. For each line on standard input it prints the longest wait since the line before, in milliseconds, with
 * that of a request under way. A process of its own, so that it does not wait for the attacker. What the server or
 * this process waited for a processor, because other programs had them, is left out.
 */
import { readFileSync } from "node:fs";
import { connect, type TLSSocket } from "node:tls";
import { connect as connectPlain, type Socket } from "node:net";

const PAUSE_MS = 2;
const { hostname, port, protocol } = new URL(process.argv[2] as string);

let longestMs = 0;
let asked: number[] | null = null;

/** The time, and how long the main threads of the server and of this process have waited for a processor. */
function now(): number[] {
  const delays = [process.argv[3], "self"].map((pid) => {
    const [, delayNs] = readFileSync(`/proc/${pid}/schedstat`, "utf8").split(" ");
    return Number(delayNs) / 1e6;
  });
  return [performance.now(), ...delays];
}

function waitedMs(): number {
  const [wall = 0, ...delays] = now().map((ms, i) => ms - (asked?.[i] ?? ms));
  return Math.max(0, wall - Math.max(...delays));
}

function open(): Socket | TLSSocket {
  const address = { host: hostname, port: Number(port) };
  const socket =
    protocol === "https:"
      ? connect({ ...address, rejectUnauthorized: false })
      : connectPlain(address);
  const ask = () => {
    asked ??= now(); // a new connection after a broken one asks the same again
    socket.write("GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
  };
  let text = "";
  socket.on("data", (bytes) => {
    text += bytes;
    if (!/\{"status":"ok".*\}/.test(text)) return;
    text = "";
    longestMs = Math.max(longestMs, waitedMs());
    asked = null;
    setTimeout(ask, PAUSE_MS);
  });
  socket.on("error", () => {});
  socket.on("close", () => setTimeout(open, 10));
  ask();
  return socket;
}

open();
for await (const _ of console) {
  console.log(Math.max(longestMs, waitedMs()).toFixed(1));
  longestMs = 0;
  if (asked !== null) asked = now();
}
process.exit(0);
