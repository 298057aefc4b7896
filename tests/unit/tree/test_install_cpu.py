"""The installation for machines without a GPU, with stand-ins that write down what Python, pip and uv are asked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PYTHON = """#!/bin/bash
# Makes environments of itself, as Python does; `fails` beside the tree names the argument at which pip breaks off.
echo "$(basename "$0") $* $([ -e .venv/pip.conf ] && echo CONSTRAINED)" >> log
case "$*" in
    "-c import sys"*) [ "$(basename "$0")" != "python3.11" ] ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" && cp "$0" "$4/bin/pip" ;;
    "-m pip freeze "*) printf 'numpy==2.4.6\\ntorch==2.13.0+cpu\\n' ;;
    *) [ ! -e fails ] || [[ "$*" != *"$(cat fails)"* ]] ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "tools").mkdir(parents=True)
    (folder / "megatron_p2o").mkdir()
    for name in (
        "tools/install_cpu.sh",
        "tools/keep_versions.sh",
        "megatron_p2o/__init__.py",
        "setup.py",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    for name in ("python3.11", "python3.12"):
        stand_in(folder, name, PYTHON)
    return folder


def stand_in(tree: Path, name: str, text: str) -> None:
    path = tree / "programs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def install(tree: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "P2O_"))}
    environment = kept | {"PATH": f"{tree / 'programs'}:/usr/bin:/bin"} | variables
    command = ["bash", "tools/install_cpu.sh", *options]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=300)


def steps(tree: Path) -> list[str]:
    """Return what was installed since the last call, and forget it."""
    log = (tree / "log").read_text().splitlines() if (tree / "log").exists() else []
    (tree / "log").unlink(missing_ok=True)
    return [line for line in log if " install " in line or line.startswith("uv")]


def test_torch_comes_first_then_what_is_pinned_and_ours_and_again_nothing(tree: Path) -> None:
    first = install(tree, "--dev")
    assert first.returncode == 0, first.stderr
    assert "3500 MiB of disk, or 6500 where torch is a CUDA build" in first.stdout
    wanted = ["setuptools", "torch==2.13.0", "requirements/cpu.txt", "requirements/dev.txt", "--editable ."]
    done = steps(tree)
    assert len(done) == len(wanted) and all(part in line for part, line in zip(wanted, done)), done
    assert install(tree, "--dev").returncode == 0 and install(tree).returncode == 0
    assert steps(tree) == []


def test_an_interrupted_installation_goes_on_and_nothing_holds_back_what_has_changed(tree: Path) -> None:
    assert install(tree).returncode == 0
    assert "constraint =" in (tree / ".venv/pip.conf").read_text()
    steps(tree)
    (tree / "requirements/cpu.txt").write_text("numpy==2.5.0\n")
    (tree / "fails").write_text("requirements/cpu.txt")
    assert install(tree).returncode != 0
    (tree / "fails").unlink()
    assert any("requirements/cpu.txt" in line for line in steps(tree))
    assert install(tree).returncode == 0
    again = steps(tree)
    assert any("requirements/cpu.txt" in line for line in again)
    assert not any("CONSTRAINED" in line for line in again), "the versions of before would refuse those of now"
    assert (tree / ".venv/constraints.txt").read_text() == "numpy==2.4.6\ntorch==2.13.0\n"


def test_the_first_python_that_fits_is_taken_and_another_is_refused_with_what_to_do(tree: Path) -> None:
    refused = install(tree, P2O_PYTHON="python3.11")
    assert (
        refused.returncode == 2 and "no python3.11 that works: install one, or name it in P2O_PYTHON" in refused.stderr
    )
    assert not (tree / ".venv").exists()
    (tree / "log").unlink()
    assert install(tree).returncode == 0
    assert [line.split()[0] for line in (tree / "log").read_text().splitlines()][:3] == [
        "python3.11",
        "python3.12",
        "python3.12",
    ]


@pytest.mark.parametrize(("variables", "taken"), [({}, "uv"), ({"PIP_INDEX_URL": "https://host/simple"}, "pip")])
def test_uv_installs_where_it_is_unless_pip_is_told_where_packages_come_from(
    variables: dict[str, str], taken: str, tree: Path
) -> None:
    stand_in(tree, "uv", '#!/bin/bash\necho "uv $*" >> log\n')
    assert install(tree, **variables).returncode == 0
    assert {line.split()[0] for line in steps(tree)} == {taken}


def test_too_little_disk_is_told_before_anything_is_made(tree: Path) -> None:
    stand_in(tree, "df", "#!/bin/sh\nprintf 'Avail\\n 120\\n'\n")
    done = install(tree)
    assert (
        done.returncode == 2
        and "has 120 MiB of disk free, the packages take 3500 or more: free some space" in done.stderr
    )
    assert not (tree / ".venv").exists()
