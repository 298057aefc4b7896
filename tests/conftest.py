"""What every test shares: one thread, reproducible property tests, memory that is never silently zero."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and inherited by the processes that tests start

import pytest
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).parents[1]
SUPERVISION_TIMEOUT_S = 600

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("reproducible")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs unless GPU tests were selected.

    Those ask that are selected by `-m gpu`, or by modules with `gpu` in their names alone.
    """
    markers = str(config.getoption("markexpr"))
    selects_gpu = "gpu" in markers and "not gpu" not in markers
    names_gpu = all("gpu" in Path(argument.partition("::")[0]).name for argument in config.args)
    if any(Path("/dev").glob("nvidia[0-9]*")) and not selects_gpu and not names_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Leave what the collection made out of Python's garbage collection: each policy that is closed asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nan_empty() -> Iterator[None]:
    """Uninitialised tensors are NaN for the length of the test."""
    # Imported here: many tests need no torch, which takes seconds.
    from megatron_p2o.testing.nan_empty import nan_filled_empty

    with nan_filled_empty():
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with model/ and problems/ as megatron_p2o/tiny/policy.py writes them; supervising takes a minute.

    P2O_TINY_POLICY names one that was made before. Workers that run tests side by side share one.
    """
    made = os.environ.get("P2O_TINY_POLICY")
    if made:
        return Path(made)
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    shared = tmp_path_factory.getbasetemp().parent if is_worker else tmp_path_factory.getbasetemp()
    folder = shared / "tiny"
    with FileLock(shared / "tiny.lock", timeout=SUPERVISION_TIMEOUT_S):
        if not (folder / "card.json").exists():
            command = [sys.executable, "-m", "megatron_p2o.tiny.policy", "--out", str(folder), "--seed", "1"]
            subprocess.run(command, check=True, timeout=SUPERVISION_TIMEOUT_S)
    return folder


@pytest.fixture
def installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], Path]:
    """Return what installs a package of one module, as pip leaves it: (module, its text, entry_points.txt) to a folder.

    The folder stands on this process's path, and on that of the processes it starts.
    """

    def install(module: str, text: str, entry_points: str) -> Path:
        folder = tmp_path / "site-packages"
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{module}.py").write_text(text)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return install
