#!/usr/bin/env bash
# Makes .venv with everything a machine without a GPU needs. Run again, it only installs what changed.
#   tools/install_cpu.sh [--dev]
# P2O_PYTHON chooses the interpreter (CPython 3.11); PIP_INDEX_URL and the like are obeyed by pip as usual.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${P2O_PYTHON:-python3.11}"
command -v "$python" > /dev/null || { echo "install_cpu.sh: $python not found: install CPython 3.11 or set P2O_PYTHON" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

# What is installed, in two parts: tests need the second, and neither undoes the other.
base="$(cat setup.py pyproject.toml megatron_p2o/__init__.py requirements/cpu.txt | sha256sum)"
dev="$(sha256sum < requirements/dev.txt)"
is_installed() { [ "$(cat ".venv/installed-$1" 2> /dev/null)" = "$2" ]; }
files=()
is_installed base "$base" || files+=(requirements/cpu.txt)
[ "${1:-}" != "--dev" ] || is_installed dev "$dev" || files+=(requirements/dev.txt)
[ ${#files[@]} -gt 0 ] || exit 0

install=(.venv/bin/pip install --quiet --disable-pip-version-check)
echo "Installing into .venv (a few minutes the first time)"
"${install[@]}" setuptools==80.9.0 wheel
# torch with its dependencies, whatever build the package index gives; the rest is pinned as a whole.
"${install[@]}" torch==2.13.0
for file in "${files[@]}"; do
    "${install[@]}" --no-deps -r "$file"
done
"${install[@]}" --no-deps --no-build-isolation --editable .
echo "$base" > .venv/installed-base
[ "${1:-}" != "--dev" ] || echo "$dev" > .venv/installed-dev
