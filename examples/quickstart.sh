#!/usr/bin/env bash
# From a fresh machine without a GPU to a trained policy: installs into .venv, makes a tiny policy, trains GRPO and P2O
# from it with the same seed and problems, and compares them. About ten minutes on two cores after the install.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/install_cpu.sh
exec bash examples/tiny_cpu/compare.sh --output runs/quickstart "${@:-1}"
