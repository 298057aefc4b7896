#!/usr/bin/env bash
# Runs every check that needs no GPU: formatting, types, unit, multi-process, kernel and end-to-end tests.
#   tools/test.sh [pytest arguments]
#   P2O_PYTHON=python3.12 P2O_VENV=.venv-3.12 tools/test.sh tests/unit    # on another Python, in an environment of its own
set -euo pipefail
cd "$(dirname "$0")/.."

bash tools/install_cpu.sh --dev
# One thread per process: several processes with a thread per core slow one another down by an order of magnitude.
export OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PATH="$PWD/${P2O_VENV:-.venv}/bin:$PATH"

if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
# The policy that integration tests train, while one core checks the code: supervising it takes a minute.
made="$(mktemp -d)"
python -m megatron_p2o.tiny.policy --out "$made/tiny" --seed 1 > "$made/log" 2>&1 &
supervision=$!
trap 'kill "$supervision" 2> /dev/null || true; rm -rf "$made"' EXIT
ruff check .
ruff format --check .
bash -n examples/*.sh examples/*/*.sh tools/*.sh
if pyright --version > /dev/null 2>&1; then
    pyright
else
    echo "SKIPPED pyright: it fetches itself with npm, which this machine does not reach"
fi
wait "$supervision" || { cat "$made/log"; exit 1; }
trap 'rm -rf "$made"' EXIT
export P2O_TINY_POLICY="$made/tiny"
# Three workers on two cores, a file each, those that start processes first: they wait for them more than half of the time.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 15 tests/slurm tests/integration tests/distributed \
    tests/kernel_ops tests/unit
