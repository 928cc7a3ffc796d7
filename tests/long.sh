#!/usr/bin/env bash
# What takes too long for every change: ten minutes of random faults, twenty seconds of mutations a parser, lost and late
# packets between network namespaces. Reports go to target/long; each run prints what repeats it.
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
        --rate 20 --seed "$seed" --faults kill,stop,slow,partition,one-way,reset \
        --report "$out/chaos-$holders" || failed=1
done

MOERUN_FUZZ_SECONDS=${MOERUN_FUZZ_SECONDS:-20} cargo test --release --locked -p moerun-tests --test end_to_end \
    fault_matrix::mutations || failed=1
python3 tests/netns/rows.py "$moerun" tests/golden/qwen3_moe | tee "$out/netns.txt" || failed=1
cat target/tmp/fault-matrix.txt
exit "$failed"
