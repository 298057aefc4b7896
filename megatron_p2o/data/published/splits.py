"""The problems of DeepScaleR and DeepMath that the paper held out and trained on (arXiv:2603.21877).

The authors shuffled and split with Hugging Face's `datasets`, whose order is numpy's permutation for the seed: the same
rows are found here without that library.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

SEED = 42
"""Seed of every shuffle and draw."""

MIN_DIFFICULTY = 7.0
"""Least difficulty of the DeepMath problems used."""

YES_NO_SHARE = 0.05
"""Intended share of problems whose answer is yes, no, true or false: guessing solves half of them."""

YES_NO, OTHER = "yes_no", "other"

_ANSWER_TYPES = (
    (YES_NO, re.compile(r"yes|no|true|false", re.IGNORECASE)),
    ("letter", re.compile(r"[A-Za-z]|\([A-Za-z]\)")),
    ("number", re.compile(r"-?\d+(?:[./]\d+)?")),
    ("percentage", re.compile(r"-?\d+\.?\d*%")),
    ("number_with_unit", re.compile(r"-?\d+\.?\d*\s*[a-zA-Z]+")),
    ("symbol", re.compile(r"[\s\S]*[√π∞∑∫][\s\S]*")),
    ("interval_or_tuple", re.compile(r"[\[(].*,.*[\])]")),
    ("text", re.compile(r"\S+(?:\s+\S+){5,}")),
)
"""Name and full pattern of the kinds of answers; the first that fits is an answer's type."""

Item = TypeVar("Item")


def answer_type(answer: str) -> str:
    """Return the kind of an answer, such as "number"; OTHER for an unknown kind."""
    stripped = answer.strip()
    return next((name for name, pattern in _ANSWER_TYPES if pattern.fullmatch(stripped)), OTHER)


def shuffled(items: Sequence[Item], seed: int = SEED) -> list[Item]:
    """Return `items` in the order of `datasets.Dataset.shuffle(seed)`."""
    return [items[index] for index in np.random.default_rng(seed).permutation(len(items))]


def hold_out(items: Sequence[Item], num_held_out: int, seed: int = SEED) -> tuple[list[Item], list[Item]]:
    """Return (held out, the rest) as `datasets.Dataset.train_test_split(test_size=num_held_out, seed=seed)` does.

    Raises:
        ValueError: there are not more items than are to be held out.
    """
    if len(items) <= num_held_out:
        raise ValueError(f"{len(items)} problems are too few to hold {num_held_out} out: is the download complete?")
    order = shuffled(items, seed)
    return order[:num_held_out], order[num_held_out:]


def deepscaler_split(items: Sequence[Item], num_held_out: int) -> tuple[list[Item], list[Item]]:
    """Return (held out, the rest in the order training problems are taken from it).

    The paper's 5,000 and 10,000 training problems are the first of the rest.
    """
    held_out, rest = hold_out(shuffled(items), num_held_out)
    return held_out, shuffled(rest)


def deepmath_split(balanced: Sequence[Item], num_held_out: int) -> tuple[list[Item], list[Item]]:
    """Return the same for problems that `balanced_by_answer_type` has chosen."""
    held_out, rest = hold_out(balanced, num_held_out)
    return held_out, shuffled(rest)


def balanced_by_answer_type(
    items: Sequence[Item],
    difficulty_of: Callable[[Item], float],
    answer_of: Callable[[Item], str],
    seed: int = SEED,
) -> list[Item]:
    """Return a random part of `items` in which frequent kinds of answers are rarer, in random order.

    At each difficulty the kinds share the places by the square root of their frequency, and yes/no gets about
    `YES_NO_SHARE`; a kind that has fewer problems than places gives all it has. Draws what the authors drew.
    """
    generator = random.Random(seed)
    chosen: list[Item] = []
    for difficulty in sorted({difficulty_of(item) for item in items}):
        by_type: dict[str, list[Item]] = {}
        for item in items:
            if difficulty_of(item) == difficulty:
                by_type.setdefault(answer_type(answer_of(item)), []).append(item)
        for kind, num_places in _places({kind: len(those) for kind, those in by_type.items()}).items():
            available = by_type[kind]
            chosen += available if num_places >= len(available) else generator.sample(available, num_places)
    generator.shuffle(chosen)
    return _with_few_yes_no(chosen, answer_of, generator)


def _places(num_available: dict[str, int]) -> dict[str, int]:
    """Return how many problems of each kind to draw at one difficulty; yes/no last, the order of the authors' draws."""
    total = sum(num_available.values())
    weights = {kind: count**0.5 for kind, count in num_available.items() if kind != YES_NO}
    places = {
        kind: int(weight / sum(weights.values()) * int(total * (1 - YES_NO_SHARE))) for kind, weight in weights.items()
    }
    if YES_NO in num_available:
        limit = int(sum(places.values()) * YES_NO_SHARE / (1 - YES_NO_SHARE))
        places[YES_NO] = min(num_available[YES_NO], limit)
    return places


def _with_few_yes_no(items: list[Item], answer_of: Callable[[Item], str], generator: random.Random) -> list[Item]:
    """Draw yes/no problems once more where other kinds did not fill their places and the share came out too large."""
    yes_no = [item for item in items if answer_type(answer_of(item)) == YES_NO]
    if not items or len(yes_no) / len(items) <= YES_NO_SHARE:
        return items
    kept = generator.sample(yes_no, min(len(yes_no), int(len(items) * YES_NO_SHARE)))
    items = [item for item in items if answer_type(answer_of(item)) != YES_NO] + kept
    generator.shuffle(items)
    return items


def type_counts(answers: Iterable[str]) -> dict[str, int]:
    """Return how many answers are of each type, the most frequent first."""
    return dict(Counter(map(answer_type, answers)).most_common())
