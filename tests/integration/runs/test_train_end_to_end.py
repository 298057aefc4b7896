"""`p2o train` as a user runs it: real ranks, a real engine, real grading, a real evolution process."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_p2o.tiny.problems import PHRASES

ROOT = Path(__file__).parents[3]
P2O = [sys.executable, "-m", "megatron_p2o.cli"]
RUN_TIMEOUT_S = 1500

UNMEASURED = "data.evaluation={}"
"""Override of a run whose evaluations would show nothing and take half of its time."""

pytestmark = pytest.mark.slow


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


@pytest.fixture(scope="module")
def p2o_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A P2O run of two short epochs, two updates a step, stopped in the first epoch and resumed."""
    runs = tmp_path_factory.mktemp("runs")
    phrases = runs / "phrases.txt"
    # Every key phrase and two fillers: a short search in all the phrases now and then finds nothing.
    phrases.write_text("\n".join(["# max_phrases: 4", *PHRASES[:8]]))
    search = [f"evolution.reflection.phrases={phrases}", "evolution.max_rollouts=1200"]
    best = ["evaluation.best_set=heldout_hard", "schedule.keep_checkpoints=1"]
    command = p2o("train", "p2o.yaml", [*settings(tiny, runs, "p2o"), "schedule.epochs=2", *search, *best])
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(runs / "p2o" / "rollouts" / "step-000002.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, output
    assert not (runs / "p2o" / "results.json").exists(), "the run was asked to stop, not to finish"
    resumed = run(command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return runs / "p2o"


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    """Return when `path` exists; fail when the process ends first or takes too long."""
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while not path.exists():
        if process.poll() is not None:
            pytest.fail(f"ended before writing {path.name}: {process.stdout.read() if process.stdout else ''}")
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"{path.name} was not written in {RUN_TIMEOUT_S} s")
        time.sleep(0.2)


def test_an_interrupted_run_asks_every_problem_once_an_epoch(p2o_run: Path) -> None:
    entries = lines(p2o_run / "hard_samples.jsonl")
    asked = Counter((entry["epoch"], entry["problem_id"]) for entry in entries)
    assert set(asked.values()) == {1}
    steps = [line["step"] for line in lines(p2o_run / "metrics.jsonl") if "rollout/reward_mean" in line["metrics"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(entries) == 32 * len(steps)


def step_metrics_of(run: Path) -> list[dict[str, float]]:
    """Return the metrics of every step; other lines speak of evaluations and libraries."""
    return [line["metrics"] for line in lines(run / "metrics.jsonl") if "rollout/rollouts_count" in line["metrics"]]


def test_the_engine_and_the_trainer_agree_at_every_step(p2o_run: Path) -> None:
    steps = [
        line["metrics"] for line in lines(p2o_run / "metrics.jsonl") if "rollout/rollouts_count" in line["metrics"]
    ]
    mismatches = [step["mismatch/logprob_abs_max"] for step in steps]
    assert mismatches
    # float32 on both sides, other reduction orders; log-probs reach -15 nats.
    assert max(mismatches) < 1e-4


def test_every_step_says_what_its_processes_hold(p2o_run: Path) -> None:
    steps = [
        line["metrics"] for line in lines(p2o_run / "metrics.jsonl") if "rollout/rollouts_count" in line["metrics"]
    ]
    for name in ("rank_host_peak", "ranks_host", "engine_host_peak", "engines_host"):
        # A Python process with torch takes at least so much, and none of these a tenth of the tests' machine.
        assert all(2**25 < step[f"memory/{name}_bytes"] < 2**34 for step in steps), name
    assert all(step["memory/rank_host_peak_bytes"] >= step["memory/train_peak_bytes"] for step in steps)
    assert "memory/rank_gpu_peak_bytes" not in steps[0] or torch.cuda.is_available()


def test_the_folder_of_a_run_holds_what_the_readme_says(p2o_run: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (paragraph,) = re.findall(r"A run directory holds.*?\n\n", readme, flags=re.DOTALL)
    listed = {name.rstrip("/") for name in re.findall(r"`([\w.-]+/?)`", paragraph)}
    assert listed <= {path.name for path in p2o_run.iterdir()}


def test_evolution_publishes_templates_that_the_second_epoch_is_asked_through(p2o_run: Path) -> None:
    library = json.loads((p2o_run / "templates" / "library-1.json").read_text())
    texts = {template["text"] for template in library["templates"]}
    assert texts and "" not in texts
    entries = lines(p2o_run / "hard_samples.jsonl")
    assert not any(entry["templated_tries"] for entry in entries if entry["epoch"] == 0)
    assert any(entry["templated_tries"] for entry in entries if entry["epoch"] == 1)


def test_results_and_report_are_written(p2o_run: Path) -> None:
    results = json.loads((p2o_run / "results.json").read_text())
    assert set(results["evaluation"]) == {"heldout_easy", "heldout_hard"}
    assert results["num_rollouts_train"] == 6 * len(lines(p2o_run / "hard_samples.jsonl"))
    assert results["num_rollouts_evolution"] > 0
    report = run([*P2O, "report", str(p2o_run)])
    assert report.returncode == 0, report.stderr
    assert "<svg" in (p2o_run / "report.html").read_text()


def test_the_compute_account_is_what_rollouts_journal_and_evaluations_hold(p2o_run: Path) -> None:
    """Of a run that was stopped and went on: nothing is lost and nothing counts twice."""
    results = json.loads((p2o_run / "results.json").read_text())
    spent = results["compute"]
    rollouts = [line for path in (p2o_run / "rollouts").glob("step-*.jsonl") for line in lines(path)]
    assert spent["sampled_training_tokens"] == sum(rollout["num_response_tokens"] for rollout in rollouts)
    (journal,) = (p2o_run / "evolution").glob("journal-*.jsonl")
    records = [json.loads(line.split(" ", 2)[2]) for line in journal.read_text().splitlines()]
    feedback = {key for record in records if record["event"] == "Picked" for key in record["minibatch"]}
    trials: Counter[str] = Counter()
    for record in records:
        if record["event"] == "Scored":
            is_control = record["occasion"].startswith("control/")
            kind = "control" if is_control else "minibatch" if record["problem_id"] in feedback else "development"
            trials[kind] += record["trial"]["num_tokens"]
    assert {kind: spent[f"sampled_{kind}_tokens"] for kind in trials} == trials
    assert min(trials.values()) > 0 and len(trials) == 3
    (round_,) = results["rounds"]
    assert trials["minibatch"] + trials["development"] == round_["num_tokens"]
    last = lines(p2o_run / "metrics.jsonl")[-1]["metrics"]
    assert all(spent[name] == last[f"compute/{name}"] for name in spent if name.endswith("_tokens"))
    steps = [line["metrics"] for line in lines(p2o_run / "metrics.jsonl") if "perf/step_s" in line["metrics"]]
    assert spent["optimizer_steps_count"] == 2 * len(steps) - sum(step["train/empty_updates_count"] for step in steps)
    assert spent["trained_tokens"] > 0 and spent["sampled_evaluation_tokens"] > 0
    assert 0 < spent["engine_s"] <= spent["wall_s"] and 0 < spent["trainer_s"] <= spent["wall_s"], "of one and one"
    assert (spent["gpu_h"] > 0) == torch.cuda.is_available()
    redone = results["compute_redone"]
    assert not any(number for name, number in redone.items() if name.endswith("_tokens")), "it stopped at a checkpoint"


def test_the_best_checkpoint_is_kept(p2o_run: Path) -> None:
    best = json.loads((p2o_run / "checkpoints" / "best").read_text())
    scores = {
        line["step"]: line["metrics"]["eval/heldout_hard/avg"]
        for line in lines(p2o_run / "metrics.jsonl")
        if "eval/heldout_hard/avg" in line["metrics"] and line["step"] > 0
    }
    assert best["score"] == max(scores.values()) == scores[best["step"]]
    assert (p2o_run / "checkpoints" / best["checkpoint"] / "manifest.json").exists()


def test_a_checkpoint_evaluates_to_what_training_measured(p2o_run: Path) -> None:
    name = (p2o_run / "checkpoints" / "latest").read_text().strip()
    outcome = run([*P2O, "eval", str(p2o_run / "checkpoints" / name)])
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    measured = json.loads((p2o_run / "evaluations" / name / "results.json").read_text())["sets"]
    trained = json.loads((p2o_run / "results.json").read_text())["evaluation"]
    # Greedy decoding from the same weights: only a tie between two tokens could differ.
    assert {key: {field: measured[key][field] for field in outcome} for key, outcome in trained.items()} == trained
    assert measured.keys() == trained.keys()


def test_a_run_resumes_after_its_templates_were_cleared(tiny: Path, tmp_path: Path) -> None:
    small = ["schedule.problems_per_step=224", "schedule.problems_per_update=224", "rollout.group_size=2"]
    cleared = ["assignment.num_plain=1", "schedule.epochs=3", "hard.min_problems=448"]
    command = p2o("train", "p2o.yaml", [*settings(tiny, tmp_path, "cleared"), *small, *cleared, UNMEASURED])
    first = run([*command, "--set", "schedule.max_steps=3"])
    assert first.returncode == 0, first.stdout + first.stderr
    resumed = run([*command, "--set", "schedule.max_steps=4"])
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert len(lines(tmp_path / "cleared" / "hard_samples.jsonl")) == 4 * 224


@pytest.mark.parametrize(
    ("kl_as", "starts", "planned"), [("loss", (1, 2), (2, 4)), ("reward", (2,), (4, 4))], ids=["loss", "reward"]
)
def test_terms_and_decay_act_where_no_group_disagrees_and_a_resumed_run_goes_on(
    kl_as: str, starts: Sequence[int], planned: Sequence[int], tiny: Path, tmp_path: Path
) -> None:
    """On two ranks, of four updates in all: the tiny policy fails or solves whole groups of its first problems."""
    objective = ["objective.surrogate=gspo", "objective.normalization=sequence_mean", "objective.kl_coefficient=0.05"]
    objective += [f"objective.kl_as={kl_as}", f"objective.kl_estimator={'k3' if kl_as == 'loss' else 'k1'}"]
    objective += ["objective.entropy_coefficient=0.001", "objective.drop_truncated=true", "optimizer.lr_decay=cosine"]
    short = ["parallel.data=2", "evaluation.every_steps=0", "evaluation.at_start=false", "schedule.save_every_steps=1"]
    command = p2o("train", "grpo_n6.yaml", [*settings(tiny, tmp_path, kl_as), *short, *objective, UNMEASURED])
    for num_steps in starts:  # a second goes on, with a schedule that is twice as long
        outcome = run([*command, "--set", f"schedule.max_steps={num_steps}"])
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    steps = [line["metrics"] for line in lines(tmp_path / kl_as / "metrics.jsonl") if "perf/step_s" in line["metrics"]]
    # The last update of each step: the second and the fourth, of two and of four where the run was resumed.
    rates = [(1 + math.cos(math.pi * done / in_all)) / 2 for done, in_all in zip((1, 3), planned, strict=True)]
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
    wait_for(tmp_path / "killed" / "rollouts" / "step-000001.jsonl", process)  # type: ignore[arg-type]
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
