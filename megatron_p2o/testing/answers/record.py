"""The record that shapes of generated answers are made of, and what they share."""

import random
from dataclasses import dataclass

Spelled = tuple[str, str]
"""How an answer was made from the gold one, and its text."""


@dataclass(frozen=True, slots=True)
class Made:
    """A gold answer, with answers that are right or wrong by construction."""

    gold: str
    right: list[Spelled]
    wrong: list[Spelled]
    question: str = "Find it."


def signed(value: int) -> str:
    return f"+{value}" if value >= 0 else str(value)


def nonzero(generator: random.Random, size: int) -> int:
    return generator.choice([-1, 1]) * generator.randint(1, size)


def distinct(generator: random.Random, count: int, size: int) -> list[int]:
    return generator.sample([value for value in range(-size, size + 1) if value], count)
