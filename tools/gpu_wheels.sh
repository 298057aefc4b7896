#!/usr/bin/env bash
# Fills .whl/ (kept out of git) with what a lent GPU machine with CPython 3.12, torch, triton, transformers and pytest
# lacks, and with this commit's name: 5 MiB to carry beside the checkout for tools/gpu_session.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=(megatron-core==0.19.2 math-verify==0.9.0 latex2sympy2_extended==1.11.0 antlr4-python3-runtime==4.13.2
    msgspec==0.22.0 orjson==3.13.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1)
rm -rf .whl
platforms=()
for glibc in 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --dest .whl "${packages[@]}"
# VERL=a checkout of verl: its head for the comparison, without the rest of its package.
if [ -n "${VERL:-}" ]; then
    for file in utils/device.py utils/kernel/{__init__,kernels,linear_cross_entropy}.py; do
        install -D -m 644 "$VERL/verl/$file" ".whl/verl/verl/$file"
    done
    touch .whl/verl/verl/{,utils/}__init__.py
fi
git describe --always --abbrev=12 --dirty > .whl/COMMIT
du -sh .whl
