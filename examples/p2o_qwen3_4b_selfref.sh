#!/usr/bin/env bash
# P2O with Self-Ref on DeepMath-5K: the frozen initial policy writes the templates, on a GPU of its own.
#   sbatch examples/p2o_qwen3_4b_selfref.sh
#SBATCH --job-name=p2o_qwen3_4b_selfref
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
# Engines are spread evenly, and the first node's eighth GPU is the reflection server's.
exec bash examples/slurm/launch.sh examples/p2o_qwen3_4b_selfref.yaml \
    --set rollout.num_engines=$((7 * SLURM_JOB_NUM_NODES)) "$@"
