"""Small runs of examples/tiny_cpu, as a user starts them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
P2O = [sys.executable, "-m", "megatron_p2o.cli"]
RUN_TIMEOUT_S = 1500
"""A run that takes longer hangs."""

UNMEASURED = "data.evaluation={}"
"""Override of a run whose evaluations would show nothing and take half of its time."""


def settings(tiny: Path, runs: Path, name: str) -> list[str]:
    """Return overrides that make examples/tiny_cpu runs small: 32 problems a step."""
    return [
        f"run.directory={runs}",
        f"run.name={name}",
        f"model.path={tiny}/model",
        f"data.train={tiny}/problems/train.jsonl",
        f"data.evaluation.heldout_easy={tiny}/problems/heldout_easy.jsonl",
        f"data.evaluation.heldout_hard={tiny}/problems/heldout_hard.jsonl",
        "schedule.problems_per_step=32",
        "schedule.problems_per_update=16",
    ]


def p2o(command: str, config: str, overrides: list[str]) -> list[str]:
    sets = [argument for override in overrides for argument in ("--set", override)]
    return [*P2O, command, str(ROOT / "examples" / "tiny_cpu" / config), *sets]


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=RUN_TIMEOUT_S, check=False)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_file(path: Path, process: "subprocess.Popen[Any]") -> None:
    """Return when `path` exists.

    Raises:
        AssertionError: the process ended first, or takes too long.
    """
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not path.exists():
        if process.poll() is not None:
            raise AssertionError(f"ended before writing {path.name}: {process.stdout.read() if process.stdout else ''}")
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{path.name} was not written in {RUN_TIMEOUT_S} s")
        time.sleep(0.2)
