#!/usr/bin/env bash
# Makes .venv with everything a machine without a GPU needs. Run again, it only installs what changed, or what an interruption
# left out.
#   tools/install_cpu.sh [--dev]
# P2O_PYTHON chooses the interpreter (CPython 3.11 to 3.13; default: the first of them that there is), P2O_VENV the folder.
# uv installs where it is found, unless pip's own variables say where packages come from; else pip does, as usual.
set -euo pipefail
cd "$(dirname "$0")/.."

NEEDED_MIB=3500 NEEDED_WITH_CUDA_MIB=6500
venv="${P2O_VENV:-.venv}"

works() { command -v "$1" > /dev/null && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null; }
python=""
for each in ${P2O_PYTHON:-python3.11 python3.12 python3.13}; do
    if works "$each"; then python="$each" && break; fi
done
if [ -z "$python" ]; then
    echo "install_cpu.sh: no ${P2O_PYTHON:-CPython 3.11 to 3.13} that works: install one, or name it in P2O_PYTHON" >&2
    exit 2
fi

# What is installed, in two parts: tests need the second, and neither undoes the other.
base="$(cat setup.py pyproject.toml megatron_p2o/__init__.py requirements/cpu.txt | sha256sum)"
dev="$(sha256sum < requirements/dev.txt)"
is_installed() { [ -e "$venv/constraints.txt" ] && [ "$(cat "$venv/installed-$1" 2> /dev/null)" = "$2" ]; }
files=()
is_installed base "$base" || files+=(requirements/cpu.txt)
[ "${1:-}" != "--dev" ] || is_installed dev "$dev" || files+=(requirements/dev.txt)
[ ${#files[@]} -gt 0 ] || exit 0

parent="$(dirname "$venv")"
[ -d "$parent" ] || parent=.
free_mib="$(df --output=avail -m "$parent" | tail -n 1 | tr -d ' ')"
if [ ! -e "$venv/installed-base" ] && [ "$free_mib" -lt "$NEEDED_MIB" ]; then
    echo "install_cpu.sh: $(cd "$parent" && pwd) has $free_mib MiB of disk free, the packages take $NEEDED_MIB or more: free some space" >&2
    exit 2
fi
# An environment that an interruption left without pip is made anew.
"$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear "$venv"
bash tools/keep_versions.sh --release "$venv"

install=("$venv/bin/pip" install --quiet --disable-pip-version-check)
if command -v uv > /dev/null && [ -z "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ]; then
    install=(uv pip install --quiet --python "$venv/bin/python")
fi
echo "Installing into $venv with ${install[0]} (a few minutes the first time; $NEEDED_MIB MiB of disk, or $NEEDED_WITH_CUDA_MIB where torch" \
    "is a CUDA build, as PyPI's is; $free_mib free)"
"${install[@]}" setuptools==80.9.0 wheel
# torch with its dependencies, whatever build the package index gives; the rest is pinned as a whole.
"${install[@]}" torch==2.13.0
for file in "${files[@]}"; do
    "${install[@]}" --no-deps -r "$file"
done
"${install[@]}" --no-deps --no-build-isolation --editable .
bash tools/keep_versions.sh "$venv"
echo "$base" > "$venv/installed-base"
[ "${1:-}" != "--dev" ] || echo "$dev" > "$venv/installed-dev"
