"""`p2o train` as a user runs it: real ranks, a real engine, real grading, a real evolution process."""

import json
import random
import re
import signal
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

import pytest
import torch

from megatron_p2o.evolve.record.history import template_digest
from megatron_p2o.testing.run_files import frozen_answers
from megatron_p2o.testing.tiny_runs import (
    P2O,
    ROOT,
    RUN_TIMEOUT_S,
    lines,
    p2o,
    run,
    settings,
    wait_for_file,
)
from megatron_p2o.tiny.problems import FAMILIES, PHRASES
from megatron_p2o.tiny.regimes import GIVING_UP, demonstrate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def p2o_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A P2O run of two short epochs, two updates a step, stopped in the first epoch and resumed."""
    runs = tmp_path_factory.mktemp("runs")
    phrases = runs / "phrases.txt"
    # Every key phrase and two fillers: a short search in all the phrases now and then finds nothing.
    phrases.write_text("\n".join(["# max_phrases: 4", *PHRASES[:8]]))
    search = [f"evolution.reflection.phrases={phrases}", "evolution.max_rollouts=1200", "assignment.weight=transfer"]
    best = ["evaluation.best_set=heldout_hard", "schedule.keep_checkpoints=1"]
    command = p2o("train", "p2o.yaml", [*settings(tiny, runs, "p2o"), "schedule.epochs=2", *search, *best])
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_file(runs / "p2o" / "rollouts" / "step-000002.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, output
    assert not (runs / "p2o" / "results.json").exists(), "the run was asked to stop, not to finish"
    resumed = run(command)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return runs / "p2o"


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


def test_the_engine_reads_each_solution_of_a_template_with_it_and_without(p2o_run: Path) -> None:
    """Under `assignment.weight: transfer`."""
    (journal,) = (p2o_run / "evolution").glob("journal-*.jsonl")
    records = [json.loads(line.split(" ", 2)[2]) for line in journal.read_text().splitlines()]
    empty = template_digest("")
    reliances: defaultdict[str, list[float]] = defaultdict(list)
    num_tokens = 0
    for record in records:
        if record["event"] == "Scored":
            trial = record["trial"]
            is_read = trial["solved_share"] == 1 and record["template"] != empty
            assert (trial["reliance"] is not None) == is_read
            if is_read:
                reliances[record["template"]].append(trial["reliance"])
                num_tokens += trial["num_tokens"]
    assert (
        lines(p2o_run / "metrics.jsonl")[-1]["metrics"]["compute/engine_read_tokens"] > 2 * num_tokens > 0
    )  # and prompts
    library = json.loads((p2o_run / "templates" / "library-1.json").read_text())
    measured = {template["text"]: template["reliance"] for template in library["templates"]}
    assert measured == {text: pytest.approx(fmean(reliances[template_digest(text)])) for text in measured}
    assert fmean(measured.values()) < 0, "the bare prompt makes the solutions less likely"


def test_results_and_report_are_written(p2o_run: Path) -> None:
    results = json.loads((p2o_run / "results.json").read_text())
    assert set(results["evaluation"]) == {"heldout_easy", "heldout_hard"}
    assert results["num_rollouts_train"] == 6 * len(lines(p2o_run / "hard_samples.jsonl"))
    assert results["num_rollouts_evolution"] > 0
    report = run([*P2O, "report", str(p2o_run)])
    assert report.returncode == 0, report.stderr
    answers = frozen_answers(p2o_run / "report.html")
    assert answers["run/0/metrics"]["steps"] and answers["run/0/libraries"], "curves and published templates"
    assert any(address.startswith("run/0/problem?id=") for address in answers)


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


def test_a_teacher_s_responses_bring_the_skill_over(tiny: Path, tmp_path: Path) -> None:
    generator, shown = random.Random(0), tmp_path / "shown.jsonl"
    with shown.open("w") as file:
        for row in lines(tiny / "problems" / "train.jsonl"):
            first, second = map(int, row["question"].split()[-2:])
            right = demonstrate(FAMILIES[row["source"]], row["level"], (first, second), 1.0, generator)
            file.write(json.dumps({**row, "shown": [right, GIVING_UP]}) + "\n")
    given = [*settings(tiny, tmp_path, "clone"), f"data.train={shown}", "data.demonstrations_field=shown"]
    given += ["rollout.group_size=2", "assignment.num_plain=0", "rollout.temperature=1", "schedule.epochs=1"]
    cloned = run(p2o("train", "grpo_n6.yaml", [*given, "objective.surrogate=clone", "objective.context=replace"]))
    assert cloned.returncode == 0, cloned.stdout + cloned.stderr
    measured = [line["metrics"] for line in lines(tmp_path / "clone" / "metrics.jsonl")]
    before, *_, after = (each["eval/heldout_hard/avg"] for each in measured if "eval/heldout_hard/avg" in each)
    assert before < 0.05 and after > 0.5
    for step in step_metrics_of(tmp_path / "clone"):
        assert step["rollout/reward_templated"] == 0.5, "one of two is right"
        # The engine has read each response on the bare prompt, as the trainer does.
        assert step["template/shift_per_token"] == pytest.approx(0, abs=1e-4)
        assert step["compute/sampled_training_tokens"] == 0 < step["compute/engine_read_tokens"]
