/** Balances and quarantine. User ids and lines are always text. */
import type { Message } from "../live.ts";
import { byId, timeElement } from "./plots.ts";
import { credential, read } from "./server.ts";

const LARGEST = 10;
const LINES = 50;
const LARGEST_EVERY_MS = 5_000;

interface Balance {
  user_id: string;
  revenue: string;
}

interface Lines {
  lines: { source: string; position: number; reason: string; line: string; at: string }[];
  next: string | null;
}

export function openLists() {
  let largestDueMs = 0;
  let user: string | null = null;
  let isReading = false;
  let quarantined: number | null = null;
  let next: string | null = null;
  byId("search").addEventListener("submit", (event) => {
    event.preventDefault();
    user = byId<HTMLInputElement>("user").value;
    byId("balance").textContent = "…";
    void showBalance();
  });
  byId("older").addEventListener("click", () => void showLines(next));
  byId("empty-command").textContent = firstEvent();

  return {
    /** Once a second; what is not due is left for later. */
    update(message: Message) {
      byId("empty").hidden = !(
        message.posted === 0 &&
        message.accepted === 0 &&
        byId("largest").childElementCount === 0
      );
      if (user !== null) void showBalance();
      if (performance.now() >= largestDueMs) void showLargest();
      if (message.quarantined !== quarantined) void showLines(null);
      quarantined = message.quarantined;
    },
  };

  async function showLargest() {
    largestDueMs = performance.now() + LARGEST_EVERY_MS;
    const answer = await read<{ users: Balance[]; at: string }>(
      `/userEvents?order=revenue&limit=${LARGEST}`,
    ).catch(() => null);
    if (!answer) return;
    byId("largest").replaceChildren(
      ...answer.users.map((one) => row([one.user_id], [one.revenue, "number"])),
    );
    byId("largest-note").replaceChildren("Read at ", timeElement(Date.parse(answer.at) / 1000));
  }

  /** At most one request at a time, and one a second. */
  async function showBalance() {
    if (isReading || user === null) return;
    isReading = true;
    const asked = user;
    const answer = await read<{ users: Balance[] }>(
      `/userEvents?user_id=${encodeURIComponent(asked)}`,
    ).catch(() => null);
    isReading = false;
    if (!answer || asked !== user) return;
    const [found] = answer.users;
    const name = document.createElement("span");
    name.textContent = asked;
    const value = document.createElement("b");
    value.textContent = found ? found.revenue : "no event posted";
    byId("balance").replaceChildren(name, value);
  }

  async function showLines(cursor: string | null) {
    const query = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    const answer = await read<Lines>(`/quarantine?limit=${LINES}${query}`).catch(() => null);
    if (!answer) return void (quarantined = null); // again in a second
    next = answer.next;
    byId("older").hidden = next === null;
    const shown = answer.lines.map(({ at, reason, line, source, position }) =>
      row(
        [timeElement(Date.parse(at) / 1000)],
        [reason],
        [line, "line"],
        [`${source}@${position}`, "line"],
      ),
    );
    if (cursor) byId("quarantine").append(...shown);
    else
      byId("quarantine").replaceChildren(
        ...(shown.length > 0 ? shown : [row(["Nothing is in quarantine."])]),
      );
  }
}

function row(...cells: [content: string | Node, className?: string][]) {
  const tr = document.createElement("tr");
  for (const [content, className = ""] of cells) {
    const td = document.createElement("td");
    td.append(content);
    if (typeof content === "string") td.title = content;
    td.className = className;
    tr.append(td);
  }
  return tr;
}

/** On this machine, with the default secret, it runs as it stands. */
function firstEvent(): string {
  const isDefault =
    /^(localhost|127\.|\[::1\])/.test(location.hostname) && credential.get() === null;
  return (
    `curl ${location.origin}/liveEvent -H 'Authorization: ${isDefault ? "secret" : "AUTH_SECRET"}' \\\n` +
    `  -H 'Content-Type: application/json' -d '{"userId":"user1","name":"add_revenue","value":98.5}'`
  );
}
