"""Compares two evaluations of the same problems: paired differences, intervals and p-values."""

from collections.abc import Mapping
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
    problems that both have a verdict on; and `only_first`, `only_second`: sets the other lacks. The test is McNemar's
    where both answered each problem once, else the sign permutation test on the problems' averages.

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
    counts = [
        (num_correct, first["decided_by_problem"][key], second["correct_by_problem"][key], num_second)
        for key, num_correct in first["correct_by_problem"].items()
        if first["decided_by_problem"][key] and (num_second := second["decided_by_problem"][key])
    ]
    if not counts:
        raise ValueError(
            "no problem has a response with a verdict in both evaluations: run both again; they continue where they "
            "stopped"
        )
    # Over a common denominator, so that equal averages give exactly 0.
    differences = [(b * num_a - a * num_b) / (num_a * num_b) for a, num_a, b, num_b in counts]
    num_better, num_worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    is_single = first["samples_per_problem"] == second["samples_per_problem"] == 1
    p_value = (
        mcnemar_p_value(num_worse, num_better) if is_single else sign_permutation_p_value(differences, BOOTSTRAP_SEED)
    )
    interval = difference_interval(differences, p_value, BOOTSTRAP_SEED)
    return {
        "num_problems": len(counts),
        "num_undecided_problems": len(first["correct_by_problem"]) - len(counts),
        "first_accuracy": sum(a / num_a for a, num_a, _, _ in counts) / len(counts),
        "second_accuracy": sum(b / num_b for _, _, b, num_b in counts) / len(counts),
        "difference": sum(differences) / len(differences),
        "interval": {"low": interval.low, "high": interval.high},
        "num_better": num_better,
        "num_worse": num_worse,
        "test": "McNemar" if is_single else "sign permutation",
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
