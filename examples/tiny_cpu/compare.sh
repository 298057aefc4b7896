#!/usr/bin/env bash
# Trains several arms from one tiny policy per seed and puts them side by side.
#   examples/tiny_cpu/compare.sh [--output DIR] [--arms "grpo_n6 grpo_n12 p2o"] [SEED...]     default: seeds 1 2 3
# Writes DIR/<arm>-seed<seed>/ per run, DIR/report.html and DIR/summary.json. A finished run is not repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."

output=runs/compare
arms="grpo_n6 grpo_n12 p2o"
while [ $# -gt 0 ]; do
    case "$1" in
        --output) output="$2"; shift 2 ;;
        --arms) arms="$2"; shift 2 ;;
        *) break ;;
    esac
done
seeds="${*:-1 2 3}"

export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 PYTHONSAFEPATH=1
runs=()
for seed in $seeds; do
    tiny="runs/tiny-seed$seed"
    [ -f "$tiny/card.json" ] || python -m megatron_p2o.tiny.policy --out "$tiny" --seed "$seed"
    for arm in $arms; do
        name="$arm-seed$seed"
        runs+=("$output/$name")
        [ -f "$output/$name/results.json" ] && continue
        echo "== $name"
        p2o train "examples/tiny_cpu/$arm.yaml" \
            --set run.directory="$output" --set run.name="$name" --set run.seed="$seed" \
            --set model.path="$tiny/model" --set data.train="$tiny/problems/train.jsonl" \
            --set data.evaluation.heldout_easy="$tiny/problems/heldout_easy.jsonl" \
            --set data.evaluation.heldout_hard="$tiny/problems/heldout_hard.jsonl"
    done
done
p2o report "${runs[@]}" --output "$output"
