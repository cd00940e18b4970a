#!/usr/bin/env bash
# Three nats-servers and two Daybook servers on this machine, for trying out a journal in a stream. Needs
# nats-server 2.11 or later on the PATH, and DATABASE_URL: a Postgres that may be written to. Ctrl-C stops
# everything and removes what it has stored, but for the tables.
#
#     DATABASE_URL=postgres://… deploy/try-cluster.sh [FIRST_PORT]
set -euo pipefail
cd "$(dirname "$0")/.."

first=${1:-8000}
: "${DATABASE_URL:?set DATABASE_URL to a Postgres that may be written to}"
command -v nats-server >/dev/null || {
  echo "nats-server is not on the PATH: see deploy/README.md" >&2
  exit 1
}

folder=$(mktemp -d)
pids=()
stop() {
  trap - EXIT INT TERM
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
  rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

client() { echo $((first + 100 + $1)); }
route() { echo $((first + 110 + $1)); }
for n in 1 2 3; do
  cat >"$folder/node$n.conf" <<CONF
server_name: node$n
listen: "127.0.0.1:$(client "$n")"
http: "127.0.0.1:$((first + 120 + n))"
jetstream { store_dir: "$folder/node$n", sync_interval: always }
cluster {
  name: daybook
  listen: "127.0.0.1:$(route "$n")"
  routes: ["nats://127.0.0.1:$(route 1)", "nats://127.0.0.1:$(route 2)", "nats://127.0.0.1:$(route 3)"]
}
CONF
  nats-server -c "$folder/node$n.conf" -l "$folder/node$n.log" &
  pids+=($!)
done

export JOURNAL_URL="nats://127.0.0.1:$(client 1),127.0.0.1:$(client 2),127.0.0.1:$(client 3)/daybook"
for n in 0 1; do
  PORT=$((first + n)) DATA_DIR="$folder/none" bun run app.ts 2>"$folder/server$n.log" &
  pids+=($!)
done

for n in 0 1; do
  until curl -fs "http://127.0.0.1:$((first + n))/readyz" >/dev/null; do
    kill -0 "${pids[$((3 + n))]}" 2>/dev/null || {
      echo "a server did not start:" >&2
      cat "$folder/server$n.log" >&2
      exit 1
    }
    sleep 0.2
  done
done
echo "logs, and what the nodes store: $folder"
echo "processes: nats-server ${pids[*]:0:3}, Daybook ${pids[*]:3}; kill -9 any of them"
echo "send with: SERVER_URL=http://127.0.0.1:$first bun run client.ts events.jsonl"
wait "${pids[@]:3}"
