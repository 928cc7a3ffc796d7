#!/usr/bin/env bash
# Starts N expert workers and a gateway over them on loopback; Ctrl-C stops all.
# usage: local-cluster.sh MODEL_DIR [WORKERS] [GATEWAY_ADDRESS]
set -euo pipefail

model=${1:?usage: local-cluster.sh MODEL_DIR [WORKERS] [GATEWAY_ADDRESS]}
workers=${2:-2}
address=${3:-127.0.0.1:50051}
moerun=${MOERUN:-$(dirname "$0")/../target/release/moerun}

logs=$(mktemp -d)
pids=()
stop() {
    kill "${pids[@]}" 2>/dev/null || true
    wait
    rm -rf "$logs"
}
trap stop EXIT
trap 'exit 130' INT TERM

for ((i = 0; i < workers; i++)); do
    "$moerun" worker --model "$model" --listen 127.0.0.1:0 --shard "$i/$workers" >"$logs/$i" &
    pids+=($!)
done

links=()
for ((i = 0; i < workers; i++)); do
    until grep -q '^ready grpc=' "$logs/$i"; do
        kill -0 "${pids[$i]}" || exit 1
        sleep 0.1
    done
    links+=(--worker "$(sed -n 's/^ready grpc=//p' "$logs/$i")")
done

"$moerun" gateway --model "$model" --grpc-addr "$address" "${links[@]}" &
pids+=($!)
wait "${pids[-1]}"
