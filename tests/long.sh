#!/usr/bin/env bash
# What takes too long for every change: ten minutes of random faults, what single faults cost, ten minutes of mutations a
# parser, thousands of simulated runs, lost and late packets between network namespaces. Reports go to target/long; each run prints what repeats it.
set -euo pipefail
cd "$(dirname "$0")/.."

seed=${1:-$RANDOM}
seconds=${MOERUN_CHAOS_SECONDS:-600}
out=target/long
mkdir -p "$out"
rm -f target/tmp/fault-matrix.txt
cargo build --release --workspace --bin moerun --locked
moerun=$PWD/target/release/moerun

echo "seed $seed"
failed=0
# Where one worker is the only holder, its loss fails requests, but never wrongly.
for holders in 1 2; do
    "$moerun" chaos --model tests/golden/qwen3_moe --workers 3 --holders "$holders" --duration "$((seconds / 2))" \
        --rate 20 --seed "$seed" --faults kill,stop,slow,partition,one-way,reset,corrupt \
        --report "$out/chaos-$holders" || failed=1
done

# What single faults cost, beside what is promised.
"$moerun" chaos --model tests/golden/qwen3_moe --figures --duration 10 --report "$out/figures" | tee "$out/figures.txt" || failed=1

MOERUN_FUZZ_SECONDS=${MOERUN_FUZZ_SECONDS:-600} MOERUN_FUZZ_SEED=$((seed * 1000000000)) \
    cargo test --release --locked -p moerun-tests --test fuzz || failed=1
MOERUN_SIM_SEEDS=${MOERUN_SIM_SEEDS:-5000} cargo test --release --locked -p moerun-dispatch simulation -- --nocapture || failed=1
python3 tests/netns/rows.py "$moerun" tests/golden/qwen3_moe | tee "$out/netns.txt" || failed=1
cat target/tmp/fault-matrix.txt
exit "$failed"
