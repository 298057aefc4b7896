"""The job scripts of examples/: their shell, what Slurm says to their options, and what the launcher does with them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path for path in (ROOT / "examples").glob("*.sh") if "#SBATCH" in path.read_text())
SHELL_SCRIPTS = [*JOBS, ROOT / "examples" / "slurm" / "launch.sh"]


def name_of(path: Path) -> str:
    return path.name


def test_the_examples_are_found() -> None:
    assert {path.stem for path in JOBS} >= {"p2o_qwen3_4b", "p2o_qwen3_32b", "grpo_qwen3_4b_n12", "tiny_slurm"}


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=name_of)
def test_the_shell_can_read_the_script(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=name_of)
def test_shellcheck_finds_nothing(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck: bash tools/install_slurm_test.sh installs it")
    outcome = subprocess.run(["shellcheck", str(script)], text=True, capture_output=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", JOBS, ids=name_of)
def test_slurm_would_start_the_job(script: Path, cluster: Any, checkout: Path) -> None:
    outcome = cluster.run("sbatch", "--test-only", str(script), cwd=checkout)
    assert outcome.returncode == 0, outcome.stderr
    assert "to start at" in outcome.stderr
