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
version() { sed -n "s/^ARG $1=//p" Dockerfile | sort -u; }
# The pins of each RUN line, written there once and read from there.
mapfile -t pins < <(grep -oE '[A-Za-z0-9_-]+==[0-9][A-Za-z0-9.]*' <(sed -n '/AS gpu/,$p' Dockerfile) | sort -u)
base=("torch==$(version TORCH_VERSION)" "sglang==$(version SGLANG_VERSION)")
cudnn="nvidia-cudnn-cu13==$(version CUDNN_VERSION)"
# The part for torch is compiled in the image.
engine=("transformer-engine==$(version TRANSFORMER_ENGINE_VERSION)"
    "transformer-engine-cu13==$(version TRANSFORMER_ENGINE_VERSION)")
megatron="megatron-core==$(version MEGATRON_CORE_VERSION)"

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
[ -n "$folder" ] || exit 0

install() { "$folder/bin/python" -m pip install --quiet --no-cache-dir --no-compile "$@"; }
"$python" -m venv "$folder"
# With what they depend on, as the image that this one is made from. SGLang 0.5.21 pins a release candidate of cuda-tile that has
# no wheel on PyPI; the release stands for it here.
"$folder/bin/python" -m pip install --quiet --dry-run --no-deps --ignore-installed --report "$scratch/report.json" "${base[1]}"
"$folder/bin/python" - "$scratch/report.json" > "$scratch/needed.txt" <<'PYTHON'
import json, re, sys
needed = json.load(open(sys.argv[1]))["install"][0]["metadata"]["requires_dist"]
print("\n".join(re.sub(r"^cuda-tile==\S+rc\d+", "cuda-tile==1.6.0", line) for line in needed if "extra ==" not in line))
PYTHON
install --only-binary=:all: "${base[0]}" -r "$scratch/needed.txt"
install --no-deps "${base[1]}"
install "${pins[@]}"
install --no-deps "${engine[@]}"
install --no-deps "$megatron" -r requirements/gpu.txt
install --no-deps "$cudnn"
install --no-deps --no-build-isolation .
requires=()
for package in "${base[@]}" "$megatron" "$cudnn" "${engine[0]}"; do requires+=(--require "$package"); done
"$folder/bin/p2o" doctor --strict "${requires[@]}"
