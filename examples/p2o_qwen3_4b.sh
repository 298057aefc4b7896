#!/usr/bin/env bash
# P2O with Teacher-Ref on DeepScaleR-5K: the paper's Qwen3-4B settings on 8 GPUs. From the repository's folder:
#   P2O_REFLECTION_URL=https://host/v1 P2O_REFLECTION_API_KEY=... sbatch examples/p2o_qwen3_4b.sh
# With `sbatch --nodes=2` the trainer's data-parallel ranks and the engines spread over 16 GPUs. More arguments go to `p2o train`.
#SBATCH --job-name=p2o_qwen3_4b
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
: "${P2O_REFLECTION_URL:?set it to the base URL of an OpenAI-compatible endpoint, e.g. https://host/v1}"
: "${P2O_REFLECTION_API_KEY:?set it to the key of that endpoint}"
exec bash examples/slurm/launch.sh examples/p2o_qwen3_4b.yaml \
    --set rollout.num_engines=$((8 * SLURM_JOB_NUM_NODES)) \
    --set evolution.reflection.base_url="$P2O_REFLECTION_URL" "$@"
