"""The chart library is the one that its script fetches, and the script takes no other."""

import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "vendor_uplot.sh"
VENDOR = Path("megatron_p2o/view/assets/vendor")
LIBRARY = "uPlot.iife.min.js"


def pinned() -> dict[str, str]:
    return {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  ([\w.]+)", SCRIPT.read_text(), re.MULTILINE)}


def test_the_vendored_files_are_those_that_the_script_pins() -> None:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ROOT / VENDOR).iterdir()}
    assert files == pinned() and LIBRARY in files and "uPlot.LICENSE.txt" in files
    (version,) = re.findall(r"^version=(\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert f"v{version}" in (ROOT / VENDOR / LIBRARY).read_text()[:200], "the library says so itself"
    assert "MIT" in (ROOT / VENDOR / "uPlot.LICENSE.txt").read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the script and its files, with an `npm` that gives out another package."""
    (tmp_path / "tools").mkdir()
    shutil.copy(SCRIPT, tmp_path / "tools")
    shutil.copytree(ROOT / VENDOR, tmp_path / VENDOR)
    package = tmp_path / "uplot-1.6.32.tgz"
    with tarfile.open(package, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/dist/uPlot.iife.min.js"), io.BytesIO())
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\ncp {package} .\n")
    npm.chmod(0o755)
    return tmp_path


def fetched(copy: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{copy / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(copy / "tools" / SCRIPT.name)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_nothing_is_fetched_where_the_files_are_there(copy: Path) -> None:
    done = fetched(copy)
    assert (done.returncode, done.stdout) == (0, "uPlot 1.6.32 is there\n")
    assert not (copy / "asked").exists()


def test_another_package_under_the_same_name_is_refused(copy: Path) -> None:
    library = copy / VENDOR / LIBRARY
    library.write_text("broken")
    done = fetched(copy)
    assert (copy / "asked").exists() and done.returncode == 1
    assert "not the pinned sha512-KIMVnG68" in done.stderr and library.read_text() == "broken"
