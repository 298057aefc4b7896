#!/usr/bin/env bash
# Runs every check that needs no GPU: formatting, types, unit, multi-process, kernel and end-to-end tests.
#   tools/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/install_cpu.sh --dev
# One thread per process: several processes with a thread per core slow one another down by an order of magnitude.
export OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PATH="$PWD/.venv/bin:$PATH"

if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
if pyright --version > /dev/null 2>&1; then
    pyright
else
    echo "SKIPPED pyright: it fetches itself with npm, which this machine does not reach"
fi
bash -n examples/*.sh examples/*/*.sh tools/*.sh
# Two workers, a file each, those with the longest tests first: they wait for processes they started, not for the processor.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/integration/runs/test_train_end_to_end.py \
    tests/slurm tests/integration tests/distributed tests/kernel_ops tests/unit
