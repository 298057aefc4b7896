#!/usr/bin/env bash
# Measures a policy on sets of problems: `p2o eval` on 8 GPUs, answers and results in runs/JOB-NAME. From the repository:
#   sbatch --job-name=eval_best examples/p2o_eval.sh runs/p2o_qwen3_4b/checkpoints/best
#   sbatch --job-name=eval_base examples/p2o_eval.sh models/Qwen3-4B \
#       --benchmark aime24=data/eval/aime24.jsonl --set rollout.num_engines=8
# A checkpoint takes as many GPUs as its run had, or as many as there are by `--set parallel.data=null`; a model directory one node.
#SBATCH --job-name=p2o_eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
: "${1:?name what to evaluate: a checkpoint of a run, or a Hugging Face model directory}"
exec bash examples/slurm/launch.sh eval "$@"
