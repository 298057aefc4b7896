#!/usr/bin/env bash
# One session on a machine with one GPU that is lent for minutes: correctness, speed beside peers, training step, weight
# path, profile; most valuable first, at most nine minutes, every result kept whatever fails later (gpu_session.py).
#   bash tools/gpu_session.sh             results under $OUT, else tools/results/gpu_session
#   bash tools/gpu_session.sh --dry-run   the same steps at tiny shapes, also on a machine without a GPU
# Needs python3 with torch and triton; no git, no network. What else is missing comes from .whl/ (tools/gpu_wheels.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
path="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
wheels="${WHEELS:-$PWD/.whl}"
if compgen -G "$wheels/*.whl" > /dev/null; then
    site="$(mktemp -d)"
    trap 'rm -rf "$site"' EXIT
    install() {
        python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$@"
    }
    # A wheel that does not fit costs the steps that need it, no others.
    install "$wheels"/*.whl || for wheel in "$wheels"/*.whl; do install "$wheel" || echo "not installed: $wheel"; done
    path="$site:$path"
fi
if [ -d "$wheels/verl" ]; then
    path="$wheels/verl:$path"
fi
if [ -f "$wheels/COMMIT" ]; then
    P2O_COMMIT="$(cat "$wheels/COMMIT")"
    export P2O_COMMIT
fi
export PYTHONPATH="$path"
python3 tools/gpu_session.py "$@"
