"""Prints evaluations: progress, a table of results, a table of a comparison."""

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TextIO

from rich.box import SIMPLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_p2o.terminal import SafeConsole, printable, table_console


class EvaluationProgress:
    """Says what of a set is being sampled: a bar on a terminal, a line elsewhere. Used in `with`."""

    def __init__(self, name: str, *, num_samples: int, temperature: float, num_wanted: int, num_missing: int) -> None:
        console = SafeConsole(file=sys.stderr, highlight=False, markup=False)
        kept = f", {num_wanted - num_missing} of them there already" if num_missing < num_wanted else ""
        console.print(f"{name}: {num_wanted} responses ({num_samples} per problem, T={temperature:g}){kept}")
        description = TextColumn("{task.description}", markup=False)
        columns = [description, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(printable(name), total=num_wanted, completed=num_wanted - num_missing)

    def advance(self) -> None:
        """Count one more response."""
        self._progress.advance(self._task)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


def print_results(results: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print results.json: a row per set, then accuracy by level where the problems name levels."""
    is_partial = any("reward_by_problem" in outcome for outcome in results["sets"].values())
    reward = ["reward"] if is_partial else []
    headings = ["set", "problems", "k", "T", "avg@k", "95 % interval", "pass@k", *reward, "tokens", "truncated"]
    rows = [
        [
            name,
            str(outcome["num_problems"]),
            str(outcome["samples_per_problem"]),
            f"{outcome['temperature']:g}",
            _share(outcome["accuracy"]),
            interval_text(outcome["interval"]),
            _pass_at_all(outcome),
            *([f"{outcome['mean_reward']:.3f}"] if is_partial else []),
            f"{outcome['mean_tokens']:.0f}",
            _share(outcome["truncated_share"]),
            str(outcome["num_grading_errors"] + outcome["num_aborted"]),
        ]
        for name, outcome in results["sets"].items()
    ]
    _print_table(
        [*headings, "undecided"], rows, stream, footer=f"average of the sets: {_share(results['average_accuracy'])}"
    )
    for name, outcome in results["sets"].items():
        if outcome["by_level"]:
            levels = "  ".join(f"{level} {_share(share)}" for level, share in outcome["by_level"].items())
            table_console(stream).print(f"{name} by level: {levels}", soft_wrap=True)


def print_comparison(comparison: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print what `comparison.compare` returned: a row per set."""
    headings = ["set", "problems", "first", "second", "difference", "95 % interval", "better", "worse", "p", "test"]
    rows = [
        [
            name,
            str(pair["num_problems"]),
            _share(pair["first_accuracy"]),
            _share(pair["second_accuracy"]),
            f"{pair['difference']:+.3f}",
            interval_text(pair["interval"], sign="+"),
            str(pair["num_better"]),
            str(pair["num_worse"]),
            f"{pair['p_value']:.4f}",
            pair["test"],
        ]
        for name, pair in comparison["sets"].items()
    ]
    _print_table(headings, rows, stream, footer=f"first: {comparison['first']}\nsecond: {comparison['second']}")
    _print_rewards(comparison["sets"], stream)
    for name, pair in comparison["sets"].items():
        if pair["num_undecided_problems"]:
            left_out = f"{name}: {pair['num_undecided_problems']} problems have no verdict in one of the two: left out"
            table_console(stream).print(left_out, soft_wrap=True)
    for side, key in (("first", "only_first"), ("second", "only_second")):
        if comparison[key]:
            table_console(stream).print(
                f"only the {side} has {', '.join(comparison[key])}: not compared", soft_wrap=True
            )


def _print_rewards(sets: Mapping[str, Any], stream: TextIO | None) -> None:
    """Print the mean rewards of the sets that have other rewards than 0 and 1; nothing where none has."""
    headings = ["set", "problems", "first", "second", "difference", "95 % interval", "better", "worse", "p", "test"]
    rows = [
        [
            name,
            str(pair["num_problems"]),
            f"{pair['reward']['first']:.3f}",
            f"{pair['reward']['second']:.3f}",
            f"{pair['reward']['difference']:+.3f}",
            f"{pair['reward']['interval']['low']:+.3f} to {pair['reward']['interval']['high']:+.3f}",
            str(pair["reward"]["num_better"]),
            str(pair["reward"]["num_worse"]),
            f"{pair['reward']['p_value']:.4f}",
            pair["reward"]["test"],
        ]
        for name, pair in sets.items()
        if "reward" in pair
    ]
    if rows:
        table_console(stream).print("mean reward:")
        _print_table(headings, rows, stream)


def _pass_at_all(outcome: Mapping[str, Any]) -> str:
    """Return pass@k for all samples, with the problems it is over where some have too few verdicts."""
    k = str(outcome["samples_per_problem"])
    if k not in outcome["pass_at"]:
        return "-"
    num_problems = outcome["pass_at_num_problems"][k]
    over = f" of {num_problems}" if num_problems < outcome["num_problems"] else ""
    return _share(outcome["pass_at"][k]) + over


def interval_text(interval: Mapping[str, float], sign: str = "") -> str:
    """Return an interval of shares, "0.125 to 0.200"."""
    return f"{interval['low']:{sign}.3f} to {interval['high']:{sign}.3f}"


def _print_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None, footer: str = ""
) -> None:
    console = table_console(stream)
    table = Table(box=SIMPLE if console.is_terminal else None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("set", "test") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if footer:
        console.print(footer, soft_wrap=True)


def _share(share: float) -> str:
    return f"{share:.3f}"
