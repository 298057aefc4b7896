"""What the GPU image and a lent GPU are given by pip is to be had, for their Python."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_pin_of_the_gpu_image_resolves(tmp_path: Path) -> None:
    asks = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), "pybind11==3.0.1"]
    if subprocess.run(asks, capture_output=True, timeout=300, check=False).returncode != 0:
        pytest.skip("no package index can be reached: nothing is resolved")
    script = ROOT / "tools" / "check_gpu_requirements.sh"
    done = subprocess.run(
        ["bash", str(script), sys.executable], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"resolved: .*transformer-engine==", done.stdout) and "requirements/gpu.txt" in done.stdout


def test_a_lent_gpu_is_given_the_versions_the_tests_run_with() -> None:
    carried = dict(re.findall(r"([A-Za-z0-9_.-]+)==([0-9.]+)", (ROOT / "tools" / "gpu_wheels.sh").read_text()))
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "requirements/cpu.txt").read_text(), re.M))
    # The newest megatron-core that is supported, because the tests have the oldest; peers of the benchmarks.
    others = {"megatron-core", "liger-kernel", "cut-cross-entropy"}
    assert {name: carried[name] for name in carried.keys() - others} == {
        name: pinned[name] for name in carried.keys() - others
    }
