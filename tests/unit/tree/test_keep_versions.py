"""What is installed later moves no version of an environment: with pip and uv as they are, and packages made here."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 120

Install = Callable[..., "subprocess.CompletedProcess[str]"]


def write_wheel(folder: Path, name: str, version: str, *needs: str) -> Path:
    """Write a package without any module and return its wheel."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(
        f"Requires-Dist: {each}\n" for each in needs
    )
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        about = f"{name}-{version}.dist-info"
        wheel.writestr(f"{about}/METADATA", metadata)
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", f"{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("1.0+cpu", "2.0"):
        write_wheel(folder, "pinned", version)
    write_wheel(folder, "fitting_sink", "1.0", "pinned>=1")
    write_wheel(folder, "other_sink", "1.0", "pinned>=2")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """Return a folder with the script and an environment that holds pinned 1.0+cpu."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "keep_versions.sh", folder / "tools")
    shutil.copy(ROOT / "pyproject.toml", folder)
    venv.create(folder / ".venv", with_pip=True)
    done = run_pip(folder, wheels, "pinned==1.0+cpu")
    assert done.returncode == 0, done.stderr
    return folder


def run(command: list[str | Path], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run without any setting of the machine about packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment |= {"PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "UV_NO_INDEX": "1"}
    environment.pop("VIRTUAL_ENV", None)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def run_pip(tree: Path, wheels: Path, *packages: str) -> "subprocess.CompletedProcess[str]":
    pip = [tree / ".venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
    return run([*pip, "install", "--find-links", wheels, *packages], tree)


def run_uv(tree: Path, wheels: Path, *packages: str) -> "subprocess.CompletedProcess[str]":
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("needs uv: pip install -r requirements/dev.txt")
    return run([uv, "pip", "install", "--cache-dir", tree / "cache", "--find-links", wheels, *packages], tree)


def keep(tree: Path, *options: str) -> None:
    done = run(["bash", "tools/keep_versions.sh", *options], tree)
    assert done.returncode == 0, done.stderr


def installed(tree: Path) -> set[str]:
    """Return the packages of the environment, but for pip."""
    found = (tree / ".venv/lib").glob("python*/site-packages/*.dist-info")
    return {path.name.removesuffix(".dist-info") for path in found if not path.name.startswith(("pip-", "setuptools-"))}


@pytest.mark.parametrize("install", [run_pip, run_uv], ids=["pip", "uv"])
def test_a_sink_that_needs_another_version_is_refused_and_one_that_does_not_is_installed(
    install: Install, tree: Path, wheels: Path
) -> None:
    keep(tree)
    refused = install(tree, wheels, "other_sink")
    assert refused.returncode != 0 and installed(tree) == {"pinned-1.0+cpu"}
    assert re.search(r"pinned\s*==\s*1\.0", refused.stderr + refused.stdout), refused
    fitting = install(tree, wheels, "fitting_sink")
    assert fitting.returncode == 0 and installed(tree) == {"pinned-1.0+cpu", "fitting_sink-1.0"}, fitting.stderr
    # Without the versions kept, the same command moves it: what refuses is what is tested.
    keep(tree, "--release")
    moved = install(tree, wheels, "other_sink")
    assert moved.returncode == 0 and installed(tree) >= {"pinned-2.0", "other_sink-1.0"}, moved.stderr
    back = [tree / ".venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
    assert run([*back, "uninstall", "--yes", "pinned", "fitting_sink", "other_sink"], tree).returncode == 0
    assert run_pip(tree, wheels, "pinned==1.0+cpu").returncode == 0


def test_versions_are_kept_without_their_local_part_and_without_what_builds_packages(tree: Path) -> None:
    keep(tree)
    assert (tree / ".venv/constraints.txt").read_text() == "pinned==1.0\n"
    assert (tree / ".venv/pip.conf").read_text() == f"[install]\nconstraint = {tree}/.venv/constraints.txt\n"


def test_a_uv_toml_of_the_user_stays(tree: Path) -> None:
    own = "[pip]\nno-cache = true\n"
    (tree / "uv.toml").write_text(own)
    try:
        keep(tree)
        keep(tree, "--release")
        assert (tree / "uv.toml").read_text() == own
    finally:
        (tree / "uv.toml").unlink()


def test_another_environment_leaves_what_uv_is_told_of_the_usual_one(tree: Path) -> None:
    keep(tree)
    told = (tree / "uv.toml").read_text()
    assert '"pinned==1.0",' in told
    (tree / "other/bin").mkdir(parents=True)
    (tree / "other/bin/python").write_text("#!/bin/sh\necho pinned==3.0\n")
    (tree / "other/bin/python").chmod(0o755)
    keep(tree, "--release", "other")
    keep(tree, "other")
    assert (tree / "uv.toml").read_text() == told and (tree / "other/constraints.txt").read_text() == "pinned==3.0\n"
