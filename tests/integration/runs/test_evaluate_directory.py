"""`p2o eval` of a Hugging Face directory on a real engine, killed in the middle and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[3]
TIMEOUT_S = 900

pytestmark = pytest.mark.slow


def command(tiny: Path, output: Path) -> list[str]:
    options = {
        "--config": [str(ROOT / "examples" / "tiny_cpu" / "grpo_n6.yaml")],
        "--benchmark": [f"{name}={tiny}/problems/heldout_{name}.jsonl" for name in ("easy", "hard")],
        # So hot that an easy problem fails now and then, and a few requests at a time: there is time for a kill.
        "--set": [
            *("data.evaluation.easy.num_samples=4", "data.evaluation.easy.temperature=1.6"),
            "rollout.max_running_requests=4",
        ],
        "--output": [str(output)],
    }
    flags = [argument for name, values in options.items() for value in values for argument in (name, value)]
    return [sys.executable, "-m", "megatron_p2o.cli", "eval", str(tiny / "model"), *flags]


def responses(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of responses so far, without the settings."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True)[1:] if line.endswith("\n")]


def kill_in_the_middle(process: "subprocess.Popen[bytes]", path: Path, num_responses: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(responses(path)) < num_responses:
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < deadline, f"{num_responses} responses did not come in {TIMEOUT_S} s"
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, "engines and graders die with the evaluation"


def test_a_killed_evaluation_of_a_model_directory_goes_on_to_the_same_results(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "killed" / "responses" / "easy.jsonl"
    with subprocess.Popen(command(tiny, tmp_path / "killed"), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        kill_in_the_middle(process, path, num_responses=40)
    kept = responses(path)
    assert 40 <= len(kept) < 4 * 96
    runs = {
        name: subprocess.run(
            command(tiny, tmp_path / name), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        for name in ("killed", "whole")
    }
    assert [run.returncode for run in runs.values()] == [0, 0], [run.stderr for run in runs.values()]
    assert f"{len(kept)} of them there already" in runs["killed"].stderr
    assert responses(path)[: len(kept)] == kept, "what was sampled is kept as it was"
    by_key = {(line["problem_id"], line["sample"]): line for line in responses(path)}
    assert len(by_key) == len(responses(path)) == 4 * 96, "nothing is repeated"
    whole = responses(tmp_path / "whole" / "responses" / "easy.jsonl")
    # The engine of a machine without CUDA is deterministic: every sample has its own seed, whenever it is asked.
    assert by_key == {(line["problem_id"], line["sample"]): line for line in whole}
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in runs]
    assert results[0] == results[1]
    easy, hard = results[0]["sets"]["easy"], results[0]["sets"]["hard"]
    assert easy["num_correct"] == sum(line["grade"]["reward"] == 1.0 for line in whole)
    assert 0 < easy["accuracy"] < easy["pass_at"]["4"]
    assert (hard["samples_per_problem"], hard["temperature"], hard["accuracy"]) == (1, 0.0, 0.0)
