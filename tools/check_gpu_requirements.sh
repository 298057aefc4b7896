#!/usr/bin/env bash
# Replays the pip steps of the Dockerfile's gpu target that need no compiler, on a machine without a GPU: every pinned
# version resolves for CPython 3.12 and Linux. Downloads metadata and a few small wheels; installs nothing.
#   tools/check_gpu_requirements.sh [PYTHON]     default: python3; its pip does the work, whatever its own version
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
version() { sed -n "s/^ARG $1=//p" Dockerfile | sort -u; }
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
resolve() {
    "$python" -m pip install --quiet --dry-run --no-deps --ignore-installed --target "$scratch" --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 "$@"
    echo "resolved: $*"
}
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# The pins of each RUN line, written there once and read from there.
mapfile -t pins < <(grep -oE '[A-Za-z0-9_-]+==[0-9][A-Za-z0-9.]*' <(sed -n '/AS gpu/,$p' Dockerfile) | sort -u)
resolve "${pins[@]}"
resolve -r requirements/gpu.txt
resolve "torch==$(version TORCH_VERSION)" "sglang==$(version SGLANG_VERSION)" \
    "megatron-core==$(version MEGATRON_CORE_VERSION)" "nvidia-cudnn-cu13==$(version CUDNN_VERSION)" \
    "transformer-engine==$(version TRANSFORMER_ENGINE_VERSION)" \
    "transformer-engine-cu13==$(version TRANSFORMER_ENGINE_VERSION)"
