#!/usr/bin/env bash
# Tests and benchmarks the fused operations on one GPU and writes the tables of kernels/README.md.
#   bash kernels/bench/run_gpu.sh [--verl CHECKOUT]
# Each kernel of the LM head is tested by a process of its own under a time limit: one that fails or hangs is left out.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
results=kernels/bench/results
kernels=()
for kernel in warp_specialized plain; do
    chosen="not plain and not warp_specialized or $kernel"
    if timeout --kill-after=30 900 python3 -m pytest -q -m gpu tests/kernel_ops -k "$chosen"; then
        kernels+=("$kernel")
    else
        echo "the $kernel kernel failed its tests: it is not timed; do not train with it (head.kernel)" >&2
    fi
done
[ ${#kernels[@]} -gt 0 ] || { echo "no kernel passed: train with head.kernel: torch" >&2; exit 1; }
bench() { timeout --kill-after=30 7200 python3 tools/bench_kernels.py --device cuda "$@"; }
bench_head() { bench --kernels "${kernels[@]}" "$@"; }

bench_head --op linear_policy_loss --shape qwen3-4b --tokens 16384 32768 65536 --dead 0 0.3 0.4 0.6 \
    --json $results/gpu_policy_loss.json "$@"
bench_head --op linear_policy_loss --shape qwen3-4b-tp8 --tokens 32768 --json $results/gpu_policy_loss_tp8.json "$@"
bench_head --op linear_logprob --shape qwen3-4b --tokens 16384 32768 --json $results/gpu_logprob.json "$@"
bench --op grouped_advantage --rollouts 512 4096 --json $results/gpu_advantage.json
python3 kernels/bench/tables.py
