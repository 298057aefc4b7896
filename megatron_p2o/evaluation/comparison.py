"""Compares two evaluations of the same problems: paired differences, intervals and p-values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_p2o.evaluation.estimators import mcnemar_p_value, sign_permutation_p_value
from megatron_p2o.evaluation.intervals import difference_interval
from megatron_p2o.evaluation.outcome import BOOTSTRAP_SEED
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.metrics.read import read_object
from megatron_p2o.terminal import listed

MAX_NAMED_PROBLEMS = 5
"""Problems an error lists one by one."""


def compare(first: Path, second: Path) -> JsonObject:
    """Compare the results in two folders of `p2o eval`, on the sets both have.

    Returns `sets`: name to accuracies, difference (second minus first), its interval, p-value and test, over the
    problems that both have a verdict on, and the same of the mean rewards under `reward` where some are neither 0 nor
    1; and `only_first`, `only_second`: sets the other lacks. The test is McNemar's where both answered each problem
    once and rewards are not compared, else the sign permutation test on the problems' averages.

    Raises:
        ValueError: a folder holds no results, they share no set, or a set's problems differ.
    """
    sets = [_sets_in(first), _sets_in(second)]
    shared = [name for name in sets[0] if name in sets[1]]
    if not shared:
        raise ValueError(f"{first} ({', '.join(sets[0])}) and {second} ({', '.join(sets[1])}) share no evaluation set")
    for name in shared:
        _check_problems(name, sets[0][name], sets[1][name])
    return {
        "first": str(first),
        "second": str(second),
        "sets": {name: paired(sets[0][name], sets[1][name]) for name in shared},
        "only_first": [name for name in sets[0] if name not in sets[1]],
        "only_second": [name for name in sets[1] if name not in sets[0]],
    }


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> JsonObject:
    """Return the paired difference of two outcomes on the same problems, as results.json holds them.

    Compared are the problems of which both have a response with a verdict.

    Raises:
        ValueError: there is none.
    """
    shared = [
        key
        for key in first["correct_by_problem"]
        if first["decided_by_problem"][key] and second["decided_by_problem"][key]
    ]
    if not shared:
        raise ValueError(
            "no problem has a response with a verdict in both evaluations: run both again; they continue where they "
            "stopped"
        )
    is_single = first["samples_per_problem"] == second["samples_per_problem"] == 1
    sums = [_sums(each, "correct_by_problem", shared) for each in (first, second)]
    correct = _difference(sums[0], sums[1], is_zero_or_one=is_single)
    numbers = {
        "num_problems": len(shared),
        "num_undecided_problems": len(first["correct_by_problem"]) - len(shared),
        "first_accuracy": correct.pop("first"),
        "second_accuracy": correct.pop("second"),
        **correct,
    }
    if "reward_by_problem" not in first and "reward_by_problem" not in second:
        return numbers
    rewards = [
        _sums(each, "reward_by_problem" if "reward_by_problem" in each else "correct_by_problem", shared)
        for each in (first, second)
    ]
    return {**numbers, "reward": _difference(rewards[0], rewards[1], is_zero_or_one=False)}


def _sums(outcome: Mapping[str, Any], key: str, problem_ids: Sequence[str]) -> list[tuple[float, int]]:
    """Return of each problem the sum that `key` names and the number of responses that it is over."""
    return [(outcome[key][problem_id], outcome["decided_by_problem"][problem_id]) for problem_id in problem_ids]


def _difference(
    first: Sequence[tuple[float, int]], second: Sequence[tuple[float, int]], is_zero_or_one: bool
) -> JsonObject:
    """Return the paired difference of the means of (sum, count) of each problem.

    `is_zero_or_one`: whether each mean is 0 or 1.
    """
    # Over a common denominator, so that equal averages give exactly 0.
    differences = [
        (b * num_a - a * num_b) / (num_a * num_b) for (a, num_a), (b, num_b) in zip(first, second, strict=True)
    ]
    num_better, num_worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p_value = (
        mcnemar_p_value(num_worse, num_better)
        if is_zero_or_one
        else sign_permutation_p_value(differences, BOOTSTRAP_SEED)
    )
    interval = difference_interval(differences, p_value, BOOTSTRAP_SEED)
    return {
        "first": sum(a / num_a for a, num_a in first) / len(first),
        "second": sum(b / num_b for b, num_b in second) / len(second),
        "difference": sum(differences) / len(differences),
        "interval": {"low": interval.low, "high": interval.high},
        "num_better": num_better,
        "num_worse": num_worse,
        "test": "McNemar" if is_zero_or_one else "sign permutation",
        "p_value": p_value,
    }


def _sets_in(folder: Path) -> Mapping[str, Any]:
    results = read_object(folder / "results.json")
    sets = (results or {}).get("sets")
    if not isinstance(sets, dict) or not all(_is_outcome(outcome) for outcome in sets.values()):
        raise ValueError(f"{folder} holds no results.json of a finished `p2o eval`: name its --output folder")
    if not all(isinstance(outcome.get("decided_by_problem"), dict) for outcome in sets.values()):
        raise ValueError(
            f"{folder / 'results.json'} does not say how many responses to a problem have a verdict: run its "
            "`p2o eval` again; it keeps the responses"
        )
    return sets


def _is_outcome(outcome: object) -> bool:
    return (
        isinstance(outcome, dict)
        and {"samples_per_problem", "accuracy", "problems_sha256"} <= outcome.keys()
        and isinstance(outcome.get("correct_by_problem"), dict)
    )


def _check_problems(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    ids = [set(outcome["correct_by_problem"]) for outcome in (first, second)]
    only = [sorted(ids[0] - ids[1]), sorted(ids[1] - ids[0])]
    if any(only):
        only_first, only_second = (listed(names, MAX_NAMED_PROBLEMS) for names in only)
        raise ValueError(
            f"{name}: the problems differ: only the first has {only_first}, only the second {only_second}: "
            "evaluate both on the same file"
        )
    if first["problems_sha256"] != second["problems_sha256"]:
        raise ValueError(f"{name}: the ids agree but questions or gold answers differ: evaluate both on the same file")
