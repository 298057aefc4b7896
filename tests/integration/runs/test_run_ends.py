"""How `p2o train` starts, ends and goes on: what resumes, what an interrupt ends, and what is refused."""

import math
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from megatron_p2o.testing.tiny_runs import ROOT, UNMEASURED, lines, p2o, run, settings, wait_for_file

pytestmark = pytest.mark.slow


def test_a_run_resumes_after_its_templates_were_cleared(tiny: Path, tmp_path: Path) -> None:
    small = ["schedule.problems_per_step=224", "schedule.problems_per_update=224", "rollout.group_size=2"]
    cleared = ["assignment.num_plain=1", "schedule.epochs=3", "hard.min_problems=448"]
    command = p2o("train", "p2o.yaml", [*settings(tiny, tmp_path, "cleared"), *small, *cleared, UNMEASURED])
    first = run([*command, "--set", "schedule.max_steps=3"])
    assert first.returncode == 0, first.stdout + first.stderr
    resumed = run([*command, "--set", "schedule.max_steps=4"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(lines(tmp_path / "cleared" / "hard_samples.jsonl")) == 4 * 224


def test_terms_and_decay_act_where_no_group_disagrees_and_a_resumed_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    """On two ranks, of four updates in all: the tiny policy fails or solves whole groups of its first problems."""
    objective = ["objective.surrogate=gspo", "objective.normalization=sequence_mean", "objective.kl_coefficient=0.05"]
    objective += ["objective.entropy_coefficient=0.001", "objective.drop_truncated=true", "optimizer.lr_decay=cosine"]
    short = ["parallel.data=2", "evaluation.every_steps=0", "evaluation.at_start=false", "schedule.save_every_steps=1"]
    command = p2o("train", "grpo_n6.yaml", [*settings(tiny, tmp_path, "terms"), *short, *objective, UNMEASURED])
    for num_steps in (1, 2):  # the second goes on, with a schedule that is twice as long
        outcome = run([*command, "--set", f"schedule.max_steps={num_steps}"])
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    steps = [
        line["metrics"] for line in lines(tmp_path / "terms" / "metrics.jsonl") if "perf/step_s" in line["metrics"]
    ]
    # The last update of each step: the second of two, and the fourth of four.
    rates = [(1 + math.cos(math.pi * done / in_all)) / 2 for done, in_all in ((1, 2), (3, 4))]
    assert [step["train/learning_rate"] for step in steps] == pytest.approx([5e-4 * rate for rate in rates])
    for step in steps:
        assert step["train/empty_updates_count"] == 0 and step["train/grad_norm"] > 0
        assert step["train/entropy_mean"] > 0
    # In the first step the first update is the initial policy's own; in the second every one has moved.
    assert steps[1]["train/reference_kl_mean"] > 1e-6


def test_the_initial_policy_reflects_on_a_server_of_its_own(tiny: Path, tmp_path: Path) -> None:
    small = ["schedule.problems_per_step=224", "schedule.problems_per_update=224", "rollout.group_size=2"]
    short = ["assignment.num_plain=1", "schedule.epochs=2", "schedule.max_steps=3", "evolution.max_rollouts=100"]
    reflection = ["evolution.reflection.backend=self", "evolution.reflection.max_tokens=32"]
    overrides = [*settings(tiny, tmp_path, "self"), *small, *short, *reflection, UNMEASURED]
    outcome = run(p2o("train", "p2o.yaml", overrides))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    journal = (tmp_path / "self" / "evolution" / "journal-0000.jsonl").read_text()
    # This policy cannot write instructions; that it was asked and answered is what is shown here.
    assert '"event":"Reflected"' in journal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_an_interrupted_run(number: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    command = p2o("train", "p2o.yaml", [*settings(tiny, tmp_path, "killed"), UNMEASURED])
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
    wait_for_file(tmp_path / "killed" / "rollouts" / "step-000001.jsonl", process)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4, "torchrun, a rank, an engine with its own children"
    os.kill(process.pid, number)
    process.wait(timeout=120)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive, [member.cmdline() for member in alive if member.is_running()]
    assert f"p2o: {number.name}: the run ends now and saves nothing more: " in (tmp_path / "said").read_text()


def test_a_model_that_no_engine_can_load_ends_the_run_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    overrides = [*settings(tiny, tmp_path, "bad"), "sglang.attention_backend=no_such_backend"]
    outcome = run(p2o("train", "grpo_n6.yaml", overrides))
    assert outcome.returncode != 0
    assert "no_such_backend" in outcome.stderr


def test_bad_settings_start_nothing(tmp_path: Path) -> None:
    overrides = [f"run.directory={tmp_path}", "rollout.group_size=1", "optimizer.lrr=1", "model.path=/no/such/model"]
    outcome = run(p2o("train", "p2o.yaml", overrides))
    assert outcome.returncode == 2
    assert "optimizer.lrr" in outcome.stderr and "optimizer.lr" in outcome.stderr
    assert "rollout.group_size=1" in outcome.stderr
    assert not any(tmp_path.iterdir())
