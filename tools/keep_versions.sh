#!/usr/bin/env bash
# Keeps the versions of an environment when more is installed into it later, such as a sink: an installation that needs another
# version is refused.
#   tools/keep_versions.sh [FOLDER]            default: .venv
#   tools/keep_versions.sh --release [FOLDER]  lets them move again
# FOLDER/constraints.txt lists them. pip reads it by FOLDER/pip.conf. uv reads no pip.conf: uv.toml beside this repository's
# pyproject.toml tells uv those of .venv, in this folder and below it. Otherwise: uv pip install -c FOLDER/constraints.txt ...
set -euo pipefail
cd "$(dirname "$0")/.."
releases=0
[ "${1:-}" != "--release" ] || { releases=1 && shift; }
folder="${1:-.venv}"
FIRST_LINE="# By tools/keep_versions.sh: what .venv holds."

# Another uv.toml is the user's.
is_ours() { [ ! -e uv.toml ] || [ "$(head -n 1 uv.toml)" = "$FIRST_LINE" ]; }

rm -f "$folder/constraints.txt" "$folder/pip.conf"
if [ "$folder" = .venv ] && is_ours; then rm -f uv.toml; fi
[ "$releases" = 0 ] || exit 0

# Not what builds packages: each may ask for its own setuptools. A local build, such as +cpu, is as good as its version.
frozen="$("$folder/bin/python" -m pip freeze --disable-pip-version-check --exclude-editable \
    --exclude pip --exclude setuptools --exclude wheel --exclude megatron-p2o)"
printf '[install]\nconstraint = %s/constraints.txt\n' "$(cd "$folder" && pwd)" > "$folder/pip.conf"
sed -n 's/^\([A-Za-z0-9._-]*==[^+ ]*\).*/\1/p' <<< "$frozen" > "$folder/constraints.txt"
if is_ours && [ -e .venv/constraints.txt ]; then
    { echo "$FIRST_LINE" && echo "constraint-dependencies = [" && sed 's/.*/    "&",/' .venv/constraints.txt && echo "]"; } > uv.toml
fi
