#!/usr/bin/env bash
# Makes an environment for GPUs without Docker: the pip steps of the Dockerfile's gpu target, in its order and versions.
#   tools/install_gpu.sh [--no-compiler] [--dry-run] [FOLDER]      default: .venv, where examples/slurm/launch.sh looks
# Needs CPython 3.12 (P2O_PYTHON), Linux on x86-64 and 30 GiB of disk; at run time a driver of version 580 or newer. Transformer
# Engine's part for torch and flash-attn are compiled: that needs nvcc of CUDA 13, a C++ compiler and an hour; MAX_JOBS limits the
# compilers. --no-compiler leaves both out: layers are then megatron-core's own. INSTALL_FLASH_ATTN=0 leaves out flash-attn.
# --dry-run prints the steps.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tools/gpu_pins.sh
source tools/gpu_pins.sh
compiles=1 dry_run=0
while [ $# -gt 0 ]; do
    case "$1" in
        --no-compiler) compiles=0 ;;
        --dry-run) dry_run=1 ;;
        -*) echo "install_gpu.sh: $1 is no option: see its first lines" >&2 && exit 2 ;;
        *) break ;;
    esac
    shift
done
folder="${1:-.venv}"
python="${P2O_PYTHON:-python3.12}"

if [ "$dry_run" = 0 ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null \
        || { echo "install_gpu.sh: P2O_PYTHON=$python is no CPython 3.12, which the pins are for: name one" >&2 && exit 2; }
    [ "$compiles" = 0 ] || command -v nvcc > /dev/null \
        || { echo "install_gpu.sh: no nvcc in PATH: load the CUDA 13 toolkit, or leave out what it compiles with --no-compiler" >&2 && exit 2; }
fi

run() { if [ "$dry_run" = 1 ]; then echo "$*"; else "$@"; fi; }
install() { run "$folder/bin/python" -m pip install --quiet --no-cache-dir "$@"; }

# What SGLang depends on, as its image has it. SGLang 0.5.21 pins a release candidate of cuda-tile that has no wheel on PyPI; the
# release stands for it here.
needed_by_sglang() {
    "$folder/bin/python" -m pip install --quiet --dry-run --no-deps --ignore-installed --report "$1/report.json" "${base[1]}"
    "$folder/bin/python" - "$1/report.json" <<'PYTHON'
import json, re, sys
needed = json.load(open(sys.argv[1]))["install"][0]["metadata"]["requires_dist"]
print("\n".join(re.sub(r"^cuda-tile==\S+rc\d+", "cuda-tile==1.6.0", line) for line in needed if "extra ==" not in line))
PYTHON
}

compile_for_torch() {
    local nvidia
    nvidia="$("$folder/bin/python" -c 'import nvidia; print(nvidia.__path__[0])' 2> /dev/null || echo NVIDIA)"
    export NVTE_CUDA_ARCHS=90 TORCH_CUDA_ARCH_LIST=9.0 FLASH_ATTN_CUDA_ARCHS=90 NVTE_FRAMEWORK=pytorch MAX_JOBS="${MAX_JOBS:-16}"
    # With the headers of torch's own CUDA packages: the toolkit may hold no cusparse.h, and a system's cuDNN another version.
    export CPATH="$nvidia/cudnn/include:$nvidia/nccl/include:$nvidia/cu13/include" CUDNN_PATH="$nvidia/cudnn"
    export NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 FLASH_ATTENTION_FORCE_BUILD=TRUE
    install --no-deps --no-build-isolation "$engine_torch"
    [ "${INSTALL_FLASH_ATTN:-1}" = 0 ] || install --no-deps --no-build-isolation "$flash_attn"
}

run "$python" -m venv "$folder"
run bash tools/keep_versions.sh --release "$folder"
needed="$(mktemp -d)"
trap 'rm -rf "$needed"' EXIT
[ "$dry_run" = 1 ] || needed_by_sglang "$needed" > "$needed/sglang.txt"
install --only-binary=:all: "${base[0]}" -r "$needed/sglang.txt"
install --no-deps "${base[1]}"
install "${pins[@]}"
install --no-deps "${engine[@]}"
[ "$compiles" = 0 ] || compile_for_torch
install --no-deps "$megatron" -r requirements/gpu.txt
# Last: installing others drags it down, and fused attention then fails with CUDNN_STATUS_BAD_PARAM.
install --no-deps "$cudnn"
install --no-deps --no-build-isolation --editable .
run bash tools/keep_versions.sh "$folder"
requires=()
for package in "${base[@]}" "$megatron" "$cudnn" "${engine[0]}" triton sglang-kernel flashinfer-python; do requires+=(--require "$package"); done
run "$folder/bin/p2o" doctor --strict "${requires[@]}"
