#!/usr/bin/env bash
# The CPU twin of p2o_qwen3_4b.sh: the same launcher over two nodes, a tiny policy, generated problems.
#   sbatch examples/tiny_slurm.sh
# P2O_TINY_POLICY names a folder that megatron_p2o/tiny/policy.py has written; without it, it is written here first.
#SBATCH --job-name=tiny_slurm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
policy="${P2O_TINY_POLICY:-runs/tiny}"
[ -f "$policy/card.json" ] || PATH="$PWD/.venv/bin:$PATH" python -m megatron_p2o.tiny.policy --out "$policy" --seed 1
exec bash examples/slurm/launch.sh examples/tiny_slurm.yaml \
    --set model.path="$policy/model" \
    --set data.train="$policy/problems/train.jsonl" \
    --set data.evaluation.heldout_easy="$policy/problems/heldout_easy.jsonl" \
    --set data.evaluation.heldout_hard="$policy/problems/heldout_hard.jsonl" "$@"
