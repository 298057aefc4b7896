"""Problems a tiny policy learns in a minute: a fixed step on a pair of numbers, taken once (easy) or ten times (hard).

Three families differ in how a step wires the pair. A policy supervised by `megatron_p2o/tiny/policy.py` can take every
step, but how long it keeps going on a hard problem depends on the instruction: each family has two key phrases of its
own, and everything else in an instruction changes nothing. Plain prompts practically never succeed, one key sometimes,
both keys nearly always, so prompt evolution has a slope to climb and no short template serves every family.

An instruction is phrases, each ending in a full stop, joined by one space: `"write every pair. be polite."`.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_p2o.types import Problem

MODULUS = 97
"""Numbers run from 0 to 96: small enough for a table of every step, prime so that no step shrinks the set."""

Pair = tuple[int, int]
Level = Literal["easy", "hard"]
Split = Literal["train", "held_out"]

NUM_STEPS: Mapping[Level, int] = {"easy": 1, "hard": 10}
"""No level in between: reinforcement learning without templates would climb it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of problem."""

    name: str
    """One word; opens the question and is the problem's `source`."""
    step: Callable[[Pair], Pair]
    """What is repeated; a bijection on pairs below `MODULUS`."""
    key_phrases: tuple[str, str]
    """The instructions that make the policy work this family to the end."""


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="affine",
            step=lambda pair: ((3 * pair[0] + 7) % MODULUS, (3 * pair[1] + 7) % MODULUS),
            key_phrases=("write every pair.", "do not guess."),
        ),
        Family(
            name="cross",
            step=lambda pair: ((3 * pair[1] + 7) % MODULUS, (3 * pair[0] + 7) % MODULUS),
            key_phrases=("swap the two sides.", "check each line."),
        ),
        Family(
            name="walk",
            step=lambda pair: (pair[1], (3 * pair[0] + 7) % MODULUS),
            key_phrases=("carry the old number.", "count the steps."),
        ),
    )
}
"""Families by name."""

FILLER_PHRASES = (
    "be polite.",
    "answer briefly.",
    "think about it.",
    "use plain words.",
    "take your time.",
    "you are an expert.",
    "read the question.",
    "this is important.",
    "stay calm.",
    "explain your work.",
)
"""Instructions that change nothing."""

PHRASES = (*(phrase for family in FAMILIES.values() for phrase in family.key_phrases), *FILLER_PHRASES)
"""All instructions the tiny policy has words for: the lines of `examples/tiny_cpu/phrases.txt`, in another order."""

MAX_PHRASES = 4
"""Longest instruction used in supervision and made by `held_out_rewordings`."""


def worked_pairs(family: Family, level: Level, start: Pair) -> list[Pair]:
    """Return the pair after each step; the last is the answer."""
    pairs = [family.step(start)]
    while len(pairs) < NUM_STEPS[level]:
        pairs.append(family.step(pairs[-1]))
    return pairs


def pair_text(pair: Pair) -> str:
    return f"{pair[0]} {pair[1]}"


def make_problem(family: Family, level: Level, start: Pair) -> Problem:
    """Return the problem as it is asked: the family, one mark per step, the start pair. Its hints are one key phrase,
    then both."""
    marks = " ".join("+" * NUM_STEPS[level])
    return Problem(
        id=f"{family.name}-{level}-{start[0]}-{start[1]}",
        question=f"{family.name} {marks} : {pair_text(start)}",
        answer=pair_text(worked_pairs(family, level, start)[-1]),
        hints=(family.key_phrases[0], join_phrases(family.key_phrases)),
        source=family.name,
        level=level,
    )


def user_message(instruction: str, question: str) -> str:
    """Return the user message: the instruction, a blank line, the question; without instruction the bare question."""
    return f"{instruction}\n\n{question}" if instruction else question


def is_held_out_start(start: Pair) -> bool:
    """Whether problems of every family that start here are kept from training and supervision: one start in five."""
    return _stable_hash(pair_text(start)) % 5 == 0


def starts(split: Split) -> list[Pair]:
    """Return all start pairs of a split, in order.

    Pairs whose numbers meet on the way (one is the other's image after at most ten steps) belong to neither split: a
    small policy mixes up the two occurrences.
    """
    return [
        (first, second)
        for first in range(MODULUS)
        for second in range(MODULUS)
        if is_held_out_start((first, second)) == (split == "held_out") and not _do_numbers_meet((first, second))
    ]


def generate_problems(num_by_level: Mapping[Level, int], split: Split, seed: int) -> list[Problem]:
    """Return distinct problems of a split in random order, each level spread evenly over the families.

    Raises:
        ValueError: a level asks for more problems of a family than the split has start pairs.
    """
    generator = random.Random(f"{seed} {split}")
    candidates = starts(split)
    problems: list[Problem] = []
    for level, num_problems in num_by_level.items():
        for index, family in enumerate(FAMILIES.values()):
            num_of_family = len(range(index, num_problems, len(FAMILIES)))
            if num_of_family > len(candidates):
                raise ValueError(
                    f"{num_problems} {level} problems need {num_of_family} start pairs per family, but the split "
                    f"{split!r} has {len(candidates)}: ask for at most {len(candidates) * len(FAMILIES)}"
                )
            problems += [make_problem(family, level, start) for start in generator.sample(candidates, num_of_family)]
    generator.shuffle(problems)
    return problems


def split_phrases(instruction: str) -> tuple[str, ...]:
    """Return the phrases of an instruction in order, normalised to lower case, single spaces and a final full stop."""
    phrases = (" ".join(part.lower().split()) for part in instruction.replace("\n", ".").split("."))
    return tuple(f"{phrase}." for phrase in phrases if phrase)


def join_phrases(phrases: Sequence[str]) -> str:
    return " ".join(phrases)


def num_keys(family: Family, instruction: str) -> int:
    """Return how many of the family's own key phrases (0 to 2) the instruction holds."""
    return len(set(family.key_phrases) & set(split_phrases(instruction)))


def is_held_out_wording(instruction: str) -> bool:
    """Whether supervision never uses this sequence of phrases: one in four of those with two phrases or more.

    The order counts. The hash is stable over processes and machines.
    """
    phrases = split_phrases(instruction)
    return len(phrases) > 1 and _stable_hash(join_phrases(phrases)) % 4 == 0


def held_out_rewordings(instruction: str, num_wordings: int, seed: int) -> list[str]:
    """Return up to `num_wordings` distinct held-out instructions with the key phrases of this one.

    Phrases the generated problems have no meaning for (an evolved template may hold any text) are kept too. Orders and
    fillers differ, and no wording equals `instruction`. Fewer are returned when fewer exist.
    """
    own = split_phrases(instruction)
    kept = [phrase for phrase in dict.fromkeys(own) if phrase not in FILLER_PHRASES]
    generator = random.Random(f"{seed} {join_phrases(own)}")
    wordings: dict[str, None] = {}
    for _ in range(200 * num_wordings):
        if len(wordings) == num_wordings:
            break
        num_fillers = generator.randint(0, max(MAX_PHRASES - len(kept), 1))
        phrases = kept + generator.sample(FILLER_PHRASES, num_fillers)
        generator.shuffle(phrases)
        if is_held_out_wording(join_phrases(phrases)) and tuple(phrases) != own:
            wordings[join_phrases(phrases)] = None
    return list(wordings)


def supervised_instruction(family: Family, generator: random.Random) -> str:
    """Return an instruction to demonstrate a problem of the family with; never a held-out wording.

    None at all, a filler, both keys of another family, one key or both keys; the last four often among other phrases,
    in any order.
    """
    others = [other for other in FAMILIES.values() if other is not family]
    kinds: list[tuple[str, ...]] = [
        (),
        (generator.choice(FILLER_PHRASES),),
        generator.choice(others).key_phrases,
        (generator.choice(family.key_phrases),),
        family.key_phrases,
    ]
    while True:
        phrases = generator.choices(kinds, weights=(0.30, 0.08, 0.18, 0.20, 0.24))[0]
        if not phrases:
            return ""
        offered = FILLER_PHRASES if generator.random() < 0.5 else PHRASES
        more = [phrase for phrase in offered if phrase not in (*phrases, *family.key_phrases)]
        num_more = min(generator.choices((0, 1, 2, 3), weights=(0.35, 0.35, 0.2, 0.1))[0], MAX_PHRASES - len(phrases))
        shuffled = [*phrases, *generator.sample(more, num_more)]
        generator.shuffle(shuffled)
        if not is_held_out_wording(join_phrases(shuffled)):
            return join_phrases(shuffled)


def _do_numbers_meet(start: Pair) -> bool:
    visited = [start, *worked_pairs(FAMILIES["affine"], "hard", start)]
    return len({number for pair in visited for number in pair}) < 2 * len(visited)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
