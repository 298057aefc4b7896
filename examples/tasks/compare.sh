#!/usr/bin/env bash
# Trains GRPO and P2O on each task from one tiny policy per seed and puts them side by side.
#   examples/tasks/compare.sh [--output DIR] [--tasks "palindrome code partial_credit reasoning_gym"] [SEED...]
# Seeds are 0 1 2 by default. Writes DIR/<run>-seed<seed>/ per run, DIR/report.html and DIR/summary.json. A finished run
# is not repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."

output=runs/tasks/compare
tasks="palindrome code partial_credit reasoning_gym"
while [ $# -gt 0 ]; do
    case "$1" in
        --output) output="$2"; shift 2 ;;
        --tasks) tasks="$2"; shift 2 ;;
        *) break ;;
    esac
done
seeds="${*:-0 1 2}"

export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 PYTHONSAFEPATH=1
runs=()
for task in $tasks; do
    for seed in $seeds; do
        made="$output/made/$task-seed$seed"
        settings=(--set model.path="$made/model")
        case "$task" in
            reasoning_gym) for name in chain_sum gcd; do settings+=(--set data.train.$name="$made/$name.jsonl"); done ;;
            *) settings+=(--set data.train="$made/train.jsonl" --set data.evaluation.heldout="$made/heldout.jsonl") ;;
        esac
        [ -d "$made/model" ] || python "examples/tasks/$task/prepare.py" --out "$made" --seed "$seed"
        if [ ! -d "$made/model" ]; then
            python -m megatron_p2o.tiny.policy --out "$made/tiny" --seed "$seed"
            mv "$made/tiny/model" "$made/model"
        fi
        for arm in grpo p2o; do
            name="${task}_$arm"
            runs+=("$output/$name-seed$seed")
            [ -f "$output/$name-seed$seed/results.json" ] && continue
            echo "== $name-seed$seed"
            p2o train "examples/tasks/$task/$name.yaml" "${settings[@]}" \
                --set run.directory="$output" --set run.name="$name-seed$seed" --set run.seed="$seed"
        done
    done
done
p2o report "${runs[@]}" --output "$output"
