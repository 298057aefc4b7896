"""What came of an experiment: every seed of every arm, paired tests against the first arm, and what else differs."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_p2o.evaluation.comparison import paired
from megatron_p2o.evaluation.estimators import sign_permutation_p_value
from megatron_p2o.evaluation.outcome import BOOTSTRAP_SEED
from megatron_p2o.experiment.conduct import is_finished
from megatron_p2o.experiment.plan import Experiment, PlannedRun
from megatron_p2o.files import read_json_object, write_whole
from megatron_p2o.metrics.jsonl import JsonObject, read_lines
from megatron_p2o.report.summary import write_summary
from megatron_p2o.run_folder.made_with import HISTORY_FILE, settings_of
from megatron_p2o.run_folder.results import RESULTS_FILE
from megatron_p2o.view.frozen import write_report

OF_A_RUN = ("run.name", "run.seed", "run.directory")

MAX_NAMED_RUNS = 3


class MixedRuns(ValueError):
    """Runs of one experiment were not made alike."""


def compare_arms(experiment: Experiment, *, allows_mixed: bool) -> JsonObject:
    """Compare the finished runs, and write report.html, summary.json and comparison.json into the experiment's folder.

    Returns `tests`: of each further arm against the first, by evaluation set; `settings`: each setting that differs
    between arms, by arm; `notes`: sentences on what limits the comparison; `summary`: see `report.summary.summarize`.

    Raises:
        MixedRuns: they were made by different programs, or on different data, unless `allows_mixed`.
    """
    finished = [run for run in experiment.runs if is_finished(run)]
    differences = mixed(finished)
    if differences and not allows_mixed:
        remedy = "remove the runs that are to be made again, or compare them all the same with --allow-mixed"
        raise MixedRuns("; ".join([*differences, remedy]))
    begun = [run.folder for run in experiment.runs if (run.folder / "metrics.jsonl").exists()]
    if begun:
        write_report(begun, experiment.folder / "report.html")
    comparison = {
        "arms": experiment.arms,
        "budget": experiment.budget,
        "settings": differing_settings(experiment),
        "tests": _tests(experiment, finished),
        "notes": [*differences, *_ends(experiment, finished), *_unfinished(experiment, finished)],
        "summary": write_summary([run.folder for run in experiment.runs], experiment.folder / "summary.json"),
    }
    write_whole(experiment.folder / "comparison.json", json.dumps(comparison, indent=1, allow_nan=False) + "\n")
    return comparison


def differing_settings(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Return every setting that differs between arms, with its value in each. Nothing that differs is left out."""
    by_arm = {run.arm: settings_of(run.config) for run in experiment.runs}
    names = dict.fromkeys(name for settings in by_arm.values() for name in settings)
    rows = {name: {arm: settings.get(name) for arm, settings in by_arm.items()} for name in names}
    return {
        name: values
        for name, values in rows.items()
        if name not in OF_A_RUN and len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1
    }


def mixed(runs: Sequence[PlannedRun]) -> list[str]:
    """Return a sentence for each way in which runs were not made alike: by programs, or on files of one name."""
    made: dict[str, dict[str, list[str]]] = {}
    for run in runs:
        starts = list(read_lines(run.folder / HISTORY_FILE))
        for start in starts:
            _note(made, "program", _program(start), run)
        inputs: Mapping[str, Any] = starts[-1].get("made_with", {}) if starts else {}
        settings: Mapping[str, Any] = inputs.get("settings", {})
        for name, digest in inputs.get("files", {}).items():
            # Of files that settings name the place counts, too: arms may differ in that by intention.
            place = settings.get(name, settings.get(f"{name}.file", settings.get("model.path")))
            _note(made, f"{name} in {place}", digest, run)
    return [
        f"{what} differs between runs: "
        + ", ".join(f"{value} of {', '.join(names[:MAX_NAMED_RUNS])}" for value, names in values.items())
        for what, values in made.items()
        if len(values) > 1
    ]


def _note(made: dict[str, dict[str, list[str]]], what: str, value: str, run: PlannedRun) -> None:
    names = made.setdefault(what, {}).setdefault(value, [])
    if run.name not in names:
        names.append(run.name)


def _program(start: Mapping[str, Any]) -> str:
    program: Mapping[str, str] = start.get("program", {})
    parts = (program.get("version"), program.get("commit"), program.get("source"))
    return " ".join(part for part in parts if part) or "unknown"


def _ends(experiment: Experiment, finished: Sequence[PlannedRun]) -> list[str]:
    """Return a sentence where the budget did not end a run."""
    if not experiment.budget:
        return ["no budget is set: arms may have spent different amounts"]
    ended = {run.name: read_json_object(run.folder / RESULTS_FILE).get("ended_by") for run in finished}
    return [
        f"{name} was ended by {by}, not by {experiment.budget}" for name, by in ended.items() if by != experiment.budget
    ]


def _unfinished(experiment: Experiment, finished: Sequence[PlannedRun]) -> list[str]:
    names = {run.name for run in finished}
    return [f"{run.name} is not finished: it is in no test" for run in experiment.runs if run.name not in names]


def _tests(experiment: Experiment, finished: Sequence[PlannedRun]) -> list[JsonObject]:
    """Return the tests of each further arm against the first."""
    outcomes = {(run.arm, run.seed): _problems(run.folder) for run in finished}
    first, *others = experiment.arms
    tests: list[JsonObject] = []
    for arm in others:
        seeds = [run.seed for run in experiment.runs if run.arm == arm]
        shared = [seed for seed in seeds if (first, seed) in outcomes and (arm, seed) in outcomes]
        sets = list(dict.fromkeys(name for seed in shared for name in outcomes[arm, seed]))
        for name in sets:
            pairs = [(outcomes[first, seed].get(name), outcomes[arm, seed].get(name)) for seed in shared]
            both = [(a, b) for a, b in pairs if a is not None and b is not None]
            if both:
                tests.append({"first": first, "second": arm, "set": name, "seeds": shared, **_test(both)})
    return tests


def _test(pairs: Sequence[tuple[JsonObject, JsonObject]]) -> JsonObject:
    """Return the paired test over problems, each with its answers under all seeds, and the differences by seed; also
    those of mean rewards, under `reward`, where some are neither 0 nor 1."""
    over_problems = paired(*(_pooled([pair[side] for pair in pairs]) for side in (0, 1)))
    test = {**over_problems, **_over_seeds(pairs, "correct_by_problem")}
    if "reward" in over_problems:
        test["reward"] = {**over_problems["reward"], **_over_seeds(pairs, "reward_by_problem")}
    return test


def _over_seeds(pairs: Sequence[tuple[JsonObject, JsonObject]], key: str) -> JsonObject:
    by_seed = [_mean(second, key) - _mean(first, key) for first, second in pairs]
    return {
        "difference_by_seed": by_seed,
        "p_value_over_seeds": sign_permutation_p_value(by_seed, BOOTSTRAP_SEED),
    }


def _pooled(outcomes: Sequence[JsonObject]) -> JsonObject:
    """Return the outcomes of several seeds as one, with more answers to each problem."""
    decided = Counter[str]()
    for outcome in outcomes:
        decided.update(outcome["decided_by_problem"])
    is_partial = any("reward_by_problem" in outcome for outcome in outcomes)
    keys = ("correct_by_problem", "reward_by_problem") if is_partial else ("correct_by_problem",)
    return {
        "samples_per_problem": sum(outcome["samples_per_problem"] for outcome in outcomes),
        "decided_by_problem": dict(decided),
        **{key: {problem: sum(_sums(each, key)[problem] for each in outcomes) for problem in decided} for key in keys},
    }


def _sums(outcome: JsonObject, key: str) -> Mapping[str, float]:
    """Return each problem's correct responses or sum of rewards: the same where all rewards are 0 or 1."""
    return outcome.get(key, outcome["correct_by_problem"])


def _mean(outcome: JsonObject, key: str) -> float:
    sums = _sums(outcome, key)
    return fmean(sums[problem] / number for problem, number in outcome["decided_by_problem"].items() if number)


def _problems(folder: Path) -> Mapping[str, JsonObject]:
    return read_json_object(folder / RESULTS_FILE).get("evaluation_problems", {})
