#!/usr/bin/env bash
# Makes .venv with everything a machine without a GPU needs. Run again, it only installs what changed.
#   tools/install_cpu.sh [--dev]
# P2O_PYTHON chooses the interpreter (CPython 3.11); PIP_INDEX_URL and the like are obeyed by pip as usual.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${P2O_PYTHON:-python3.11}"
command -v "$python" > /dev/null || { echo "install_cpu.sh: $python not found: install CPython 3.11 or set P2O_PYTHON" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv

files=(requirements/cpu.txt)
[ "${1:-}" = "--dev" ] && files+=(requirements/dev.txt)
wanted="$(cat setup.py pyproject.toml "${files[@]}" | sha256sum)"
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted" ]; then
    exit 0
fi

install=(.venv/bin/pip install --quiet --disable-pip-version-check)
echo "Installing into .venv (a few minutes the first time)"
"${install[@]}" setuptools==80.9.0 wheel
# torch with its dependencies, whatever build the package index gives; the rest is pinned as a whole.
"${install[@]}" torch==2.13.0
for file in "${files[@]}"; do
    "${install[@]}" --no-deps -r "$file"
done
"${install[@]}" --no-deps --no-build-isolation --editable .
echo "$wanted" > .venv/installed
