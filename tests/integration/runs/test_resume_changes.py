"""A real run that is resumed with other settings: what it does, what it says, and what it leaves alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_p2o.config.read import load_config
from megatron_p2o.testing.run_files import steps_done, whole_lines

ROOT = Path(__file__).parents[3]
RUN_TIMEOUT_S = 1500

pytestmark = pytest.mark.slow


def train(tiny: Path, runs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run or resume plain GRPO on 32 easy problems, four steps an epoch, saved at every step."""
    settings = [
        *(f"run.directory={runs}", "run.name=run", f"model.path={tiny}/model", f"data.train={runs}/train.jsonl"),
        f"data.evaluation.heldout_easy={runs}/easy.jsonl",
        f"data.evaluation.heldout_hard={runs}/easy.jsonl",
        *("evaluation.at_start=false", "evaluation.every_steps=0", "schedule.save_every_steps=1"),
        *("schedule.problems_per_step=8", "schedule.problems_per_update=8", "schedule.keep_checkpoints=1"),
        "rollout.temperature=1.7",  # so that some of the easy problems' rollouts fail, and every step has a gradient
        *overrides,
    ]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    command = [sys.executable, "-m", "megatron_p2o.cli", "train", str(ROOT / "examples/tiny_cpu/grpo_n6.yaml"), *sets]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=RUN_TIMEOUT_S)


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_what_a_resume_is_told_is_done_or_refused_and_a_diverged_policy_costs_no_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rows = [row for row in (tiny / "problems" / "train.jsonl").open() if '"level": "easy"' in row]
    (tmp_path / "train.jsonl").write_text("".join(rows[:32]))
    (tmp_path / "easy.jsonl").write_text("".join((tiny / "problems" / "heldout_easy.jsonl").open().readlines()[:4]))
    begun = train(tiny, tmp_path, "optimizer.lr=1e-4", "schedule.max_steps=2")
    assert begun.returncode == 0, begun.stderr
    settings = (run / "config.yaml").read_text()

    (tmp_path / "train.jsonl").write_text("".join(rows[:40]))
    refused = train(tiny, tmp_path, "optimizer.lr=1e-4", "schedule.max_steps=3")
    assert refused.returncode == 2
    assert "step-000002 cannot be resumed: problems of data.train: 8 added" in refused.stderr
    assert "by schedule.max_steps=4" in refused.stderr
    assert (run / "config.yaml").read_text() == settings, "what is refused does not become the run's settings"
    (tmp_path / "train.jsonl").write_text("".join(rows[:32]))

    # Divided by the newest gradient alone, old momentum exceeds every number.
    diverged = train(tiny, tmp_path, "optimizer.lr=1e36", "optimizer.beta2=0", "schedule.max_steps=4")
    assert diverged.returncode == 1, diverged.stdout
    assert "the policy has diverged" in diverged.stderr
    assert f"{run}/checkpoints/step-000002 is good, nothing was saved since" in diverged.stderr
    assert checkpoints(run) == ["step-000001", "step-000002"], "the first was shown good by the second step"

    lower = train(tiny, tmp_path, "optimizer.lr=1e-5", "optimizer.weight_decay=0.5", "schedule.max_steps=3")
    assert lower.returncode == 0, lower.stderr
    said = [line for line in lower.stdout.splitlines() if line.startswith("changed since step-000002")]
    assert "changed since step-000002: optimizer.lr: 0.0001 -> 1e-05: from step 3 on" in said
    assert [line.split(": ")[1] for line in said] == ["optimizer.lr", "optimizer.weight_decay", "schedule.max_steps"]
    assert [step["train/learning_rate"] for step in steps_done(run)] == pytest.approx([1e-4, 1e-4, 1e-5])
    assert load_config(run / "config.yaml").optimizer.lr == 1e-5
    starts = whole_lines(run / "history.jsonl")
    assert [(start["step"], len(start["changes"])) for start in starts] == [(0, 0), (2, 3), (2, 3)]
    kept = json.loads((run / "checkpoints" / "step-000003" / "made_with.json").read_text())
    assert kept["settings"]["optimizer.lr"] == 1e-5 and len(kept["problems"]) == 32
