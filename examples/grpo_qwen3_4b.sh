#!/usr/bin/env bash
# The baseline of p2o_qwen3_4b.sh: GRPO with as many rollouts per problem.
#   sbatch examples/grpo_qwen3_4b.sh
# On DeepMath-5K: sbatch examples/grpo_qwen3_4b.sh --set data.train=data/deepmath-5k/train.jsonl \
#   --set data.evaluation.heldout=data/deepmath-5k/test.jsonl
#SBATCH --job-name=grpo_qwen3_4b
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
exec bash examples/slurm/launch.sh examples/grpo_qwen3_4b.yaml \
    --set rollout.num_engines=$((8 * SLURM_JOB_NUM_NODES)) "$@"
