#!/usr/bin/env bash
# Replays the pip steps of the Dockerfile's gpu target that need no compiler, on a machine without a GPU: every pinned
# version resolves for CPython 3.12 and Linux, of which metadata and a few small wheels are downloaded.
#   tools/check_gpu_requirements.sh [PYTHON]                      default: python3; its pip resolves, whatever its version
#   tools/check_gpu_requirements.sh --install FOLDER [PYTHON312]  also installs them, some 10 GiB, and asks `p2o doctor`
set -euo pipefail
cd "$(dirname "$0")/.."
folder=""
if [ "${1:-}" = --install ]; then
    folder="${2:?a folder for the environment}"
    shift 2
fi
python="${1:-python3}"
# shellcheck source=tools/gpu_pins.sh
source tools/gpu_pins.sh

platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
resolve() {
    "$python" -m pip install --quiet --dry-run --no-deps --ignore-installed --target "$scratch" --only-binary=:all: \
        --python-version 3.12 --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 "$@"
    echo "resolved: $*"
}
resolve "${pins[@]}" -r requirements/gpu.txt
resolve "${base[@]}" "$megatron" "$cudnn" "${engine[@]}"
[ -z "$folder" ] || P2O_PYTHON="$python" bash tools/install_gpu.sh --no-compiler "$folder"
