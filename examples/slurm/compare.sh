#!/usr/bin/env bash
# One run of an experiment as a Slurm job. `p2o compare EXPERIMENT --sbatch examples/slurm/compare.sh` prints a line for
# each run that is missing, `--submit` gives them to Slurm. Set nodes, GPUs and time for one run here.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
exec bash examples/slurm/launch.sh "$@"
