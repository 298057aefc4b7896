#!/usr/bin/env bash
# Runs every benchmark of the fused operations on one GPU and writes the tables of kernels/README.md.
#   bash kernels/bench/run_gpu.sh [--verl CHECKOUT]
set -euo pipefail
cd "$(dirname "$0")/../.."
results=kernels/bench/results
bench() { python tools/bench_kernels.py --device cuda "$@"; }

bench --op linear_policy_loss --shape qwen3-4b --tokens 16384 32768 65536 --dead 0 0.3 0.4 0.6 \
    --json $results/gpu_policy_loss.json "$@"
bench --op linear_policy_loss --shape qwen3-4b-tp8 --tokens 32768 --json $results/gpu_policy_loss_tp8.json "$@"
bench --op linear_logprob --shape qwen3-4b --tokens 16384 32768 --json $results/gpu_logprob.json "$@"
bench --op grouped_advantage --rollouts 512 4096 --json $results/gpu_advantage.json
python kernels/bench/tables.py
