#!/usr/bin/env bash
# The baseline of p2o_qwen3_4b.sh with twice the rollouts: GRPO at P2O's rollout budget.
#   sbatch examples/grpo_qwen3_4b_n12.sh
#SBATCH --job-name=grpo_qwen3_4b_n12
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
exec bash examples/slurm/launch.sh examples/grpo_qwen3_4b_n12.yaml \
    --set rollout.num_engines=$((8 * SLURM_JOB_NUM_NODES)) "$@"
