"""Prints the comparison of an experiment's arms."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.table import Table

from megatron_p2o.evaluation.tables import interval_text
from megatron_p2o.report.summary import print_table
from megatron_p2o.terminal import table_console


def print_arms(comparison: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print what `outcome.compare_arms` returned: every run, the tests, the differing settings, and notes."""
    print_table(comparison["summary"], stream)
    headings = [
        "set",
        "first",
        "second",
        "seeds",
        "problems",
        "difference",
        "95 % interval",
        "p",
        "by seed",
        "p (seeds)",
    ]
    _print(headings, [row for test in comparison["tests"] for row in _test_rows(test)], stream)
    arms = comparison["arms"]
    settings = [
        [name, *("null" if values[arm] is None else str(values[arm]) for arm in arms)]
        for name, values in comparison["settings"].items()
    ]
    _print(["setting that differs", *arms], settings, stream)
    console = table_console(stream)
    for note in comparison["notes"]:
        console.print(f"note: {note}", soft_wrap=True)


def _test_rows(test: Mapping[str, Any]) -> list[list[str]]:
    """Return the row of accuracies, and where it has one that of mean rewards, both in points of 100."""
    compared = {test["set"]: test, **({f"{test['set']}, mean reward": test["reward"]} if "reward" in test else {})}
    return [
        [
            name,
            test["first"],
            test["second"],
            str(len(test["seeds"])),
            str(test["num_problems"]),
            f"{100 * numbers['difference']:+.1f}",
            interval_text(numbers["interval"], sign="+"),
            f"{numbers['p_value']:.4f}",
            " ".join(f"{100 * difference:+.1f}" for difference in numbers["difference_by_seed"]),
            f"{numbers['p_value_over_seeds']:.4f}",
        ]
        for name, numbers in compared.items()
    ]


def _print(headings: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None) -> None:
    if not rows:
        return
    console = table_console(stream)
    table = Table(box=SIMPLE if console.is_terminal else None, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
