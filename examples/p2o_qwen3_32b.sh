#!/usr/bin/env bash
# P2O for a 32B policy on 4 nodes x 8 GPUs: tensor 8 x pipeline 2 x data 2.
#   P2O_REFLECTION_URL=https://host/v1 P2O_REFLECTION_API_KEY=... sbatch examples/p2o_qwen3_32b.sh
# `sbatch --nodes` takes any even number: two nodes hold one replica.
#SBATCH --job-name=p2o_qwen3_32b
#SBATCH --nodes=4
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
: "${P2O_REFLECTION_URL:?set it to the base URL of an OpenAI-compatible endpoint, e.g. https://host/v1}"
: "${P2O_REFLECTION_API_KEY:?set it to the key of that endpoint}"
exec bash examples/slurm/launch.sh examples/p2o_qwen3_32b.yaml \
    --set rollout.num_engines=$((2 * SLURM_JOB_NUM_NODES)) \
    --set evolution.reflection.base_url="$P2O_REFLECTION_URL" "$@"
