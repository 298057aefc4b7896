#!/usr/bin/env bash
# Runs the unit tests that need no torch on another Python, in a small environment of its own: settings, prompt evolution,
# metrics, reports and the page. torch and what stands on it take 2 GB and minutes to install, tools/test.sh runs those.
#   P2O_PYTHON=python3.12 tools/test_without_torch.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

python=""
for each in ${P2O_PYTHON:-python3.12 "$(pyenv prefix 3.12 2> /dev/null)/bin/python3.12"}; do
    if "$each" -c 'import ensurepip, venv' 2> /dev/null; then python="$each" && break; fi
done
if [ -z "$python" ]; then
    echo "SKIPPED tests without torch: no ${P2O_PYTHON:-python3.12} here"
    exit 0
fi
venv=".venv-light-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"

# Pinned by the files that the other tests are installed from.
packages=(
    aiohttp filelock httpx hypothesis msgspec mpmath numpy openai orjson psutil pytest pytest-xdist PyYAML rich starlette uvicorn
)
made="$(cat requirements/cpu.txt requirements/dev.txt tools/test_without_torch.sh | sha256sum)"
if [ "$(cat "$venv/made" 2> /dev/null)" != "$made" ]; then
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c requirements/cpu.txt -c requirements/dev.txt "${packages[@]}"
    echo "$made" > "$venv/made"
fi

export OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 PYTHONPATH="$PWD:$PWD/kernels"
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi
# What of these folders needs torch or a package of the tests that is not here, by itself or by what it imports.
needs_more=(
    config/test_{readers,tree}.py evolve/process/test_{beside,given}.py evolve/reflection/test_{probe,task_description}.py
    evolve/search/test_gepa_parity.py metrics/test_{clock,memory,sinks,step}.py report/test_content.py
)
exec "$venv/bin/python" -m pytest -n 2 --dist loadfile tests/unit/{config,endpoints,evolve,metrics,report,view} \
    "${needs_more[@]/#/--ignore=tests/unit/}"
