"""Arms and seeds at one budget: what an experiment file means, what is run, and what is said of the outcome."""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psutil
import pytest

from megatron_p2o.config.read import dump_config, load_config
from megatron_p2o.config.sections.objective import ObjectiveConfig, ObjectiveContext
from megatron_p2o.config.source import ConfigError
from megatron_p2o.evolve.process.given import read_templates
from megatron_p2o.evolve.search.rules import own_search
from megatron_p2o.experiment.conduct import (
    is_finished,
    job_lines,
    missing_runs,
    run_missing,
    settings_file,
    submit,
    write_settings,
)
from megatron_p2o.experiment.outcome import MixedRuns, compare_arms, differing_settings
from megatron_p2o.experiment.plan import Experiment, PlannedRun, read_experiment
from megatron_p2o.experiment.tables import print_arms
from megatron_p2o.tiny.problems import FAMILIES, num_keys

ROOT = Path(__file__).parents[3]

BASE = """
model: {path: runs/tiny/model}
data: {train: train.jsonl}
evolution: {enabled: false}
schedule: {epochs: 3}
"""

EXPERIMENT = """
base: base.yaml
settings: {optimizer: {lr: 2.0e-6}}
seeds: [1, 7]
budget: {max_tokens: 5000}
arms:
  grpo:
  grpo_2g: {rollout: {group_size: 12}}
  p2o: {base: p2o.yaml, assignment: {num_plain: 1}}
"""


def write(tmp_path: Path, text: str = EXPERIMENT) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "p2o.yaml").write_text("evolution: {enabled: true}\nassignment: {num_plain: 3}\n")
    path = tmp_path / "small.yaml"
    path.write_text(f"directory: {tmp_path}/runs\n{text}")
    return path


def refusal(tmp_path: Path, text: str, arms: Sequence[str] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        read_experiment(write(tmp_path, text), arms)
    return str(caught.value)


def test_each_arm_has_the_settings_of_all_its_base_and_its_own_and_one_run_a_seed(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path))
    assert [run.name for run in experiment.runs] == [
        *("grpo-seed1", "grpo-seed7", "grpo_2g-seed1", "grpo_2g-seed7", "p2o-seed1", "p2o-seed7"),
    ]
    by_name = {run.name: run.config for run in experiment.runs}
    p2o, twice = by_name["p2o-seed7"], by_name["grpo_2g-seed1"]
    assert (p2o.run.seed, p2o.run.arm, p2o.run.folder) == (7, "p2o", tmp_path / "runs" / "small" / "p2o-seed7")
    assert (p2o.evolution.enabled, p2o.assignment.num_plain, p2o.optimizer.lr) == (True, 1, 2e-6)
    assert (twice.evolution.enabled, twice.rollout.group_size) == (False, 12)
    assert all(config.schedule.max_tokens == 5000 and config.schedule.epochs > 999 for config in by_name.values())
    assert experiment.budget == "schedule.max_tokens=5000"
    free = read_experiment(write(tmp_path, EXPERIMENT.replace("budget: {max_tokens: 5000}", "")), ["grpo"])
    assert [(run.arm, run.config.schedule.epochs) for run in free.runs] == [("grpo", 3), ("grpo", 3)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("grpo_2g:", "grpo:", "small.yaml:9: arms.grpo is there twice"),
        ("grpo_2g:", "GRPO:", "small.yaml:9: arms.GRPO is there twice"),
        ("grpo_2g:", "grpo-seed2:", "arms.grpo-seed2 must be named by at most 48 letters"),
        ("grpo_2g:", "a/b:", "arms.a/b must be named by"),
        ("group_size: 12", "group_sise: 12", "small.yaml:9: rollout.group_sise is not a setting"),
        ("group_size: 12", "group_size: many", "small.yaml:9: rollout.group_size=many must be a whole number"),
        ("{rollout: {group_size: 12}}", "{run: {seed: 3}}", "run.seed is given by the experiment"),
        ("{rollout: {group_size: 12}}", "12", "must be a mapping of settings"),
        ("seeds: [1, 7]", "seeds: [1, 1]", "seeds=[1, 1] must be a list of different whole numbers"),
        ("seeds: [1, 7]", "seeds: 3", "seeds=3 must be a list"),
        ("max_tokens: 5000", "tokens: 5000", "must be {max_tokens: N} or {max_hours: N}"),
        ("max_tokens: 5000", "max_tokens: 0", "schedule.max_tokens=0"),
        ("seeds:", "sedes:", "sedes is no part of an experiment: did you mean seeds?"),
        ("p2o.yaml", "other.yaml", "base=other.yaml must be an existing settings file"),
    ],
)
def test_a_bad_experiment_is_refused_with_its_place(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, EXPERIMENT.replace(old, new))


def test_an_arm_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    assert "--arm grpo_2 names no arm (grpo, grpo_2g, p2o): did you mean grpo_2g?" in refusal(
        tmp_path, EXPERIMENT, ["grpo_2"]
    )


def finish(run: PlannedRun, correct: Sequence[int], tokens: int = 5100, **history: Any) -> None:
    """Leave what a finished run leaves: of four problems, how often each was solved in two answers."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    problems = {f"p{number}": count for number, count in enumerate(correct)}
    by_problem = {
        "samples_per_problem": 2,
        "correct_by_problem": problems,
        "decided_by_problem": dict.fromkeys(problems, 2),
    }
    results = {
        **{"arm": run.arm, "seed": run.seed, "num_steps": 4, "ended_by": "schedule.max_tokens=5000"},
        "evaluation": {"hard": {"accuracy": sum(correct) / 8}},
        "evaluation_problems": {"hard": by_problem},
        "compute": {"sampled_training_tokens": tokens, "learning_tokens": tokens},
    }
    (run.folder / "results.json").write_text(json.dumps(results))
    program = {"version": "1", "commit": "abc", "source": "0"}
    start = {"program": program, "made_with": {"settings": {"data.train": "t"}, "files": {"data.train": "d"}}}
    (run.folder / "history.jsonl").write_text(json.dumps(start | history) + "\n")


def finished(tmp_path: Path) -> Experiment:
    experiment = read_experiment(write(tmp_path))
    solved = {"grpo": (0, 0, 1, 0), "grpo_2g": (1, 0, 1, 0), "p2o": (2, 1, 2, 1)}
    for run in experiment.runs:
        finish(run, [count if run.seed == 1 else min(2, count + 1) for count in solved[run.arm]])
    return experiment


def test_every_seed_is_shown_arms_are_tested_in_pairs_and_all_that_differs_is_listed(tmp_path: Path) -> None:
    experiment = finished(tmp_path)
    comparison = compare_arms(experiment, allows_mixed=False)
    assert [(row["arm"], row["seed"]) for row in comparison["summary"]["runs"]] == [
        (run.arm, run.seed) for run in experiment.runs
    ]
    first, second = comparison["tests"]
    assert (first["first"], first["second"], second["second"]) == ("grpo", "grpo_2g", "p2o")
    # Solved of four answers over both seeds: grpo 1 1 3 1, p2o 4 3 4 3.
    assert second["difference"] == pytest.approx((3 + 2 + 1 + 2) / 16)
    assert second["difference_by_seed"] == pytest.approx([5 / 8, 3 / 8])
    assert second["p_value"] == 2 / 2**4 and second["p_value_over_seeds"] == 2 / 2**2, "all differences of one sign"
    assert comparison["settings"] == {
        "rollout.group_size": {"grpo": 6, "grpo_2g": 12, "p2o": 6},
        "evolution.enabled": {"grpo": False, "grpo_2g": False, "p2o": True},
        "assignment.num_plain": {"grpo": 2, "grpo_2g": 2, "p2o": 1},
    }
    assert comparison["notes"] == []
    stream = io.StringIO()
    print_arms(comparison, stream)
    said = stream.getvalue()
    assert "assignment.num_plain" in said and "+62.5 +37.5" in said and "0.1250" in said
    written = json.loads((experiment.folder / "comparison.json").read_text())
    assert written == json.loads(json.dumps(comparison))


def test_graded_rewards_are_compared_beside_accuracies(tmp_path: Path) -> None:
    """A run whose rewards are all 0 and 1 says them by its correct responses."""
    experiment = finished(tmp_path)
    for run in experiment.runs:
        if run.arm == "p2o":
            results = json.loads((run.folder / "results.json").read_text())
            hard = results["evaluation_problems"]["hard"]
            hard["reward_by_problem"] = {"p0": 2.0, "p1": 1.5, "p2": 2.0, "p3": 1.25 if run.seed == 1 else 2.0}
            (run.folder / "results.json").write_text(json.dumps(results))
    comparison = compare_arms(experiment, allows_mixed=False)
    first, second = comparison["tests"]
    assert "reward" not in first
    # Rewards of four answers over both seeds: grpo 1 1 3 1, p2o 4 3 4 3.25.
    assert second["reward"]["difference"] == pytest.approx((3 + 2 + 1 + 2.25) / 16)
    assert second["reward"]["difference_by_seed"] == pytest.approx([(6.75 - 1) / 8, (7.5 - 5) / 8])
    assert second["difference"] == pytest.approx(8 / 16), "accuracies as before"
    stream = io.StringIO()
    print_arms(comparison, stream)
    (row,) = [line for line in stream.getvalue().splitlines() if "hard, mean reward" in line]
    assert "+51.6" in row and "+71.9 +31.2" in row


def test_runs_that_ended_elsewhere_or_not_at_all_are_noted(tmp_path: Path) -> None:
    experiment = finished(tmp_path)
    results = json.loads((experiment.runs[0].folder / "results.json").read_text())
    results["ended_by"] = "schedule.max_steps=4"
    (experiment.runs[0].folder / "results.json").write_text(json.dumps(results))
    (experiment.runs[5].folder / "results.json").unlink()
    comparison = compare_arms(experiment, allows_mixed=False)
    assert comparison["notes"] == [
        "grpo-seed1 was ended by schedule.max_steps=4, not by schedule.max_tokens=5000",
        "p2o-seed7 is not finished: it is in no test",
    ]
    assert [test["seeds"] for test in comparison["tests"]] == [[1, 7], [1]]
    without = read_experiment(write(tmp_path, EXPERIMENT.replace("budget: {max_tokens: 5000}", "")))
    assert (
        "no budget is set: arms may have spent different amounts" in compare_arms(without, allows_mixed=False)["notes"]
    )


@pytest.mark.parametrize(
    ("history", "said"),
    [
        (
            {"program": {"version": "1", "commit": "def", "source": "1"}},
            "program differs between runs: 1 abc 0 of grpo",
        ),
        (
            {"made_with": {"settings": {"data.train": "t"}, "files": {"data.train": "e"}}},
            "data.train in t differs between runs: d of grpo-seed1, grpo-seed7, grpo_2g-seed1, e of p2o-seed7",
        ),
    ],
)
def test_runs_of_other_programs_or_data_are_compared_on_request_only(
    history: dict[str, Any], said: str, tmp_path: Path
) -> None:
    experiment = finished(tmp_path)
    finish(experiment.runs[-1], [1, 1, 1, 1], **history)
    with pytest.raises(MixedRuns, match="--allow-mixed") as caught:
        compare_arms(experiment, allows_mixed=False)
    assert said in str(caught.value)
    assert any(said in note for note in compare_arms(experiment, allows_mixed=True)["notes"])


def test_other_data_by_intention_is_a_differing_setting_and_no_mistake(tmp_path: Path) -> None:
    experiment = finished(tmp_path)
    other = {"settings": {"data.train": "other"}, "files": {"data.train": "e"}}
    finish(experiment.runs[-1], [1, 1, 1, 1], made_with=other)
    compare_arms(experiment, allows_mixed=False)


def test_a_run_with_other_settings_is_refused_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    experiment = finished(tmp_path)
    assert all(map(is_finished, experiment.runs))
    write_settings(experiment)
    run = experiment.runs[0]
    assert load_config(settings_file(experiment, run)) == run.config
    longer = read_experiment(write(tmp_path, EXPERIMENT.replace("5000", "6000")))
    write_settings(longer)
    assert not any(map(is_finished, longer.runs))
    with pytest.raises(ConfigError, match=r"was made with optimizer\.lr=2e-06, the experiment says 3e-06: put it back"):
        write_settings(read_experiment(write(tmp_path, EXPERIMENT.replace("2.0e-6", "3.0e-6"))))


def test_each_missing_run_is_one_job_called_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = finished(tmp_path)
    missing = experiment.runs[3]
    (missing.folder / "results.json").unlink()
    (line,) = job_lines(experiment, Path("examples/slurm/compare.sh"))
    settings = str(experiment.folder / "settings" / "grpo_2g-seed7.yaml")
    assert line == [
        *("sbatch", "--job-name=grpo_2g-seed7", f"--export=ALL,P2O_RUNS={experiment.folder}"),
        *("examples/slurm/compare.sh", settings),
    ]
    submit([line], is_printed_only=True)
    assert shlex.split(capsys.readouterr().out) == line
    submitted = tmp_path / "submitted"
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" > {submitted}\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    submit([line], is_printed_only=False)
    assert submitted.read_text().split() == line[1:]
    (tmp_path / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not here"):
        submit([line], is_printed_only=False)


def test_all_arms_of_a_seed_are_run_before_the_next_seed(tmp_path: Path) -> None:
    experiment = finished(tmp_path)
    for run in experiment.runs:
        (run.folder / "results.json").unlink()
    assert [run.name for run in missing_runs(experiment)] == [
        f"{arm}-seed{seed}" for seed in (1, 7) for arm in experiment.arms
    ]


def test_a_run_that_fails_is_told_and_the_others_are_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = finished(tmp_path)
    for run in experiment.runs[:2]:
        (run.folder / "results.json").unlink()
    write_settings(experiment)
    failed = run_missing(experiment)  # there is neither a model nor a file of problems
    assert failed == list(experiment.runs[:2])
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "4 of 6 runs are finished"
    assert "grpo-seed7 failed with status 2; its log ends:" in said.err and "model.path=runs/tiny/model" in said.err


def test_the_command_compares_what_there_is(tmp_path: Path) -> None:
    finished(tmp_path)
    command = [sys.executable, "-m", "megatron_p2o.cli", "compare", str(tmp_path / "small.yaml"), "--no-run"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "setting that differs" in said.stdout and "comparison.json written" in said.stdout
    refused = subprocess.run([*command, "--submit"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "--submit needs --sbatch" in refused.stderr


def test_the_experiment_of_the_repository_says_what_its_arms_are() -> None:
    experiment = read_experiment(ROOT / "experiments" / "hard_problems.yaml")
    arms = {run.arm: run.config for run in experiment.runs}
    assert len(experiment.runs) == 5 * len(arms) and experiment.budget.startswith("schedule.max_tokens=")
    plain = {arm for arm, config in arms.items() if not config.evolution.enabled}
    assert plain == {"grpo", "grpo_2g", "dapo", "hints", "hints_sampling", "clone"}
    assert arms["hints"].data.hints_field == arms["hints_sampling"].data.hints_field == "hints"
    assert (arms["hints"].objective.context, arms["hints_sampling"].objective.context) == ("ratio_mask", "sampling")
    assert arms["grpo_2g"].rollout.group_size == 2 * arms["grpo"].rollout.group_size
    assert arms["dapo"].schedule.max_batches_per_step > 1 == arms["grpo"].schedule.max_batches_per_step
    assert arms["dapo"].objective == arms["grpo"].objective, "dynamic sampling alone: no clip-higher"
    clone = arms["clone"]
    assert (clone.objective.surrogate, clone.objective.context) == ("clone", "replace")
    assert (clone.rollout.group_size, clone.assignment.num_plain, clone.hard.max_solved) == (2, 0, 2)
    extra, searched = arms["grpo_hard"].evolution, arms["p2o"].evolution
    assert extra.enabled and not extra.searches and extra.plain_rollouts == searched.max_rollouts
    given = arms["random_templates"].evolution
    assert given.templates_file is not None and given.enabled and not given.searches
    assert len(read_templates(ROOT / given.templates_file, given.max_template_tokens, [])) > 4
    assert arms["p2o"].evolution.searches and arms["p2o"].evolution.templates_file is None
    single = replace(arms["single_turn"].evolution, rules="asynchronous")
    assert single == searched and arms["single_turn"].evolution.rules == "single_turn"
    assert (arms["p2o_authors"].preset, arms["p2o"].preset) == ("reference", "p2o")
    for section in ("model", "data", "optimizer", "evaluation"):
        differing = {arm for arm, config in arms.items() if getattr(config, section) != getattr(arms["grpo"], section)}
        assert differing == {"optimizer": {"frozen"}, "data": {"hints", "hints_sampling", "clone"}}.get(
            section, set()
        ), section
    assert arms["frozen"].optimizer.lr == 0 and arms["frozen"].evolution == arms["p2o"].evolution


def test_the_experiment_on_a_real_model_differs_in_context_and_mask_alone() -> None:
    experiment = read_experiment(ROOT / "experiments" / "smollm2.yaml")
    arms = {run.arm: run.config for run in experiment.runs}
    assert len(experiment.runs) == 3 * len(arms) and not arms["grpo"].evolution.enabled
    objectives = {arm: (config.objective.context, config.objective.ratio_form) for arm, config in arms.items()}
    assert objectives["ratio_mask"] == ("ratio_mask", "hard") and objectives["one_sided"] == ("ratio_mask", "one_sided")
    for section in ("model", "data", "rollout", "optimizer", "schedule", "evaluation"):
        assert {repr(getattr(config, section)) for config in arms.values()} == {repr(getattr(arms["grpo"], section))}
    templated = [config.evolution for arm, config in arms.items() if arm != "grpo"]
    assert len({repr(evolution) for evolution in templated}) == 1


def test_the_ways_to_propose_differ_in_the_rule_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(ROOT / "experiments" / "proposals.yaml")
    assert set(differing_settings(experiment)) == {"evolution.rules"}
    arms = {run.arm: run.config.evolution for run in experiment.runs}
    assert {each.num_lineages for each in arms.values()} == {16} and arms.pop("16x1").rules == "asynchronous"
    assert len({own_search(each.rules) for each in arms.values()}) == len(arms) == 3


def test_the_masks_are_compared_where_success_leans_on_the_template_and_differ_in_the_objective_alone() -> None:
    experiment = read_experiment(ROOT / "experiments" / "masks.yaml")
    arms = {run.arm: run.config for run in experiment.runs}
    assert [run.seed for run in experiment.runs if run.arm == "hard"] == [1, 2, 3, 4, 5]
    mask = ("context", "ratio_form", "ratio_widening", "ratio_anneal_steps")
    assert set(differing_settings(experiment)) == {f"objective.{name}" for name in mask}
    closing = arms["closing"].objective
    assert closing.ratio_widening > 1 and closing.ratio_anneal_steps > 0
    assert replace(closing, ratio_widening=1.0, ratio_anneal_steps=0) == arms["hard"].objective
    contexts = {arm: (config.objective.context, config.objective.ratio_form) for arm, config in arms.items()}
    assert {form for context, form in contexts.values() if context == "ratio_mask"} == set(
        get_args(get_type_hints(ObjectiveConfig)["ratio_form"])
    )
    assert {context for context, _ in contexts.values()} == set(get_args(ObjectiveContext))
    assert next(iter(contexts)) == "hard" and contexts["hard"] == ("ratio_mask", "hard"), "compared with the paper's"
    assert contexts["one_sided"] == (ObjectiveConfig().context, ObjectiveConfig().ratio_form), "what was found is ours"
    config = arms["hard"]
    files = [each.file for each in (*config.data.train.values(), *config.data.evaluation.values())]
    assert all(file.startswith("runs/tiny_leaning/") for file in (config.model.path, *files))
    given = config.evolution
    assert given.templates_file is not None
    templates = [each.text for each in read_templates(ROOT / given.templates_file, given.max_template_tokens, [])]
    keys = [[num_keys(family, text) for family in FAMILIES.values()] for text in templates]
    assert sorted(keys) == [[0, 0, 2], [0, 2, 0], [2, 0, 0]], "both keys of one family each"


def test_the_protocol_names_every_arm_and_the_budget_of_the_experiments() -> None:
    page = (ROOT / "docs" / "hard_problems.md").read_text()
    for name in ("hard_problems", "masks"):
        experiment = read_experiment(ROOT / "experiments" / f"{name}.yaml")
        described = page.split("## Arms")[1].split("In `masks.yaml`: ")[name == "masks"].split(" An arm that")[0]
        first_cells = re.findall(r"^\|(.*?)\|", described, re.MULTILINE) if name == "hard_problems" else [described]
        assert {*re.findall(r"`(\w+)`", " ".join(first_cells))} == {*experiment.arms}
        assert {run.seed for run in experiment.runs} == {1, 2, 3, 4, 5}
        assert f"{experiment.runs[0].config.schedule.max_tokens:,} sampled tokens" in page


WAITING = """
import subprocess, sys, time
from pathlib import Path
from megatron_p2o.experiment.conduct import Child
sys.executable, log = sys.argv[1], Path(sys.argv[2])
start = subprocess.Popen.__init__
def start_slowly(*args, **kwargs):  # the signal comes before anyone knows the process
    start(*args, **kwargs)
    time.sleep(float(sys.argv[3]))
subprocess.Popen.__init__ = start_slowly
with Child() as child:
    print(child.train(Path("settings.yaml"), log), child.is_stopping)
"""


@pytest.mark.parametrize("starting_s", [0.0, 3.0], ids=["while it trains", "while it starts"])
@pytest.mark.parametrize(
    ("number", "status", "printed"),
    [
        (signal.SIGTERM, 128 + signal.SIGTERM, "the run that trains is ended; the same command goes on with it\n"),
        (signal.SIGUSR1, 0, f"{-signal.SIGUSR1} True\n"),
    ],
)
def test_a_signal_does_not_leave_the_run_that_trains(
    number: signal.Signals, status: int, printed: str, starting_s: float, tmp_path: Path
) -> None:
    program, log = tmp_path / "train", tmp_path / "log"
    program.write_text("#!/bin/sh\necho $$\nexec sleep 600\n")
    program.chmod(0o755)
    command = [sys.executable, "-c", WAITING, str(program), str(log), str(starting_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60.0
        while not (log.exists() and log.read_text().endswith("\n")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert (process.communicate(timeout=60)[0], process.returncode) == (printed, status)
    assert not psutil.pid_exists(int(log.read_text()))
