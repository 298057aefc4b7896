"""What `compare_proposals.py` runs rounds on: who solves what through which template, and what reflection writes.

`recorded`: responses of a tiny policy to hard problems, through every set of phrases that the phrasebook can make.
`kinds`: a template has a quality for each of twelve kinds of problem, and reflection betters those of the failures it
is shown, at some cost of the others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron_p2o.config.tree import AssignmentConfig, EvolutionConfig, ReflectionConfig
from megatron_p2o.evolve.reflection.phrasebook import Phrasebook
from megatron_p2o.evolve.reflection.reflection import ReflectionRequest
from megatron_p2o.evolve.reflection.reflectors import Reflector
from megatron_p2o.evolve.search.round import RoundSettings, RoundSpec
from megatron_p2o.seeds import seed_of
from megatron_p2o.tiny.measurements import answers_correctly
from megatron_p2o.tiny.problems import generate_problems, is_held_out_wording, join_phrases, user_message
from megatron_p2o.types import Problem

PHRASES_FILE = Path(__file__).parents[1] / "examples/tiny_cpu/phrases.txt"
MAX_PHRASES = 3
"""Longest recorded template; more sets could not be recorded in a few minutes."""
NUM_RECORDED = 48
"""Hard problems of the tiny policy that are recorded."""
NUM_ASKED = 96
"""Problems of a round; each stands for those of its family."""


class World(Protocol):
    """What a round meets. The same template and problem always have the same outcome in one seed."""

    spec: RoundSpec
    reflector: Reflector

    def is_solved(self, text: str, problem_id: str) -> bool: ...

    def rate(self, text: str, problem_id: str) -> float:
        """Return the true probability of success, which the round does not know."""
        ...


def spec_of(problem_ids: Sequence[str], seed: int, **evolution: object) -> RoundSpec:
    return RoundSpec(
        epoch=0,
        library_version=1,
        problems=tuple(Problem(id=key, question=key, answer=None) for key in problem_ids),
        warm_templates=(),
        settings=RoundSettings(
            evolution=EvolutionConfig(**evolution),  # type: ignore[arg-type]
            assignment=AssignmentConfig(num_plain=0),
            group_size=6,
            sampling_temperature=0.6,
            min_problems=10,
            seed=seed,
        ),
    )


def draw(*purpose: str | int) -> np.random.Generator:
    return np.random.default_rng(seed_of(*purpose))


@dataclass(frozen=True, slots=True)
class Table:
    """Whether a tiny policy solved its problems through sets of phrases."""

    solved: np.ndarray
    """[sets, problems] bool"""
    families: np.ndarray
    """[problems] str"""


def phrase_sets(phrases: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every set of up to `MAX_PHRASES` phrases, in the order of the file."""
    return [chosen for size in range(MAX_PHRASES + 1) for chosen in combinations(phrases, size)]


def wording(phrases: tuple[str, ...]) -> str:
    """Return an order of the phrases that may be proposed: one that supervision never used, where there is one."""
    orders = [join_phrases(order) for order in permutations(phrases)]
    return next((order for order in orders if is_held_out_wording(order)), orders[0])


def record(policy_folder: Path, temperature: float, seed: int) -> Table:
    """Sample the tiny policy once for each set of phrases and each problem."""
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from megatron_p2o.tiny.model import sample_texts

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder / "model")
    policy = Qwen3ForCausalLM.from_pretrained(policy_folder / "model")
    problems = generate_problems({"hard": NUM_RECORDED}, "train", seed)
    sets = phrase_sets(Phrasebook.from_file(PHRASES_FILE, 0).phrases)
    solved = np.zeros((len(sets), len(problems)), bool)
    for row, phrases in enumerate(sets):
        messages = [user_message(wording(phrases), problem.question) for problem in problems]
        texts = sample_texts(policy, tokenizer, messages, temperature)
        solved[row] = [answers_correctly(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return Table(solved, np.array([problem.source for problem in problems]))


class Recorded:
    """A trial is a recorded response to a problem of the same family through the same phrases, drawn by the seed."""

    def __init__(self, table: Table, seed: int) -> None:
        self.reflector = book = Phrasebook(Phrasebook.from_file(PHRASES_FILE, seed).phrases, seed, MAX_PHRASES)
        self._book, self._table, self._seed = book, table, seed
        self._rows = {frozenset(phrases): row for row, phrases in enumerate(phrase_sets(book.phrases))}
        names = [f"{family}/{number}" for number in range(NUM_ASKED // 3) for family in sorted(set(table.families))]
        self.spec = spec_of(
            names, seed, max_rollouts=2000, dev_size=48, reflection=ReflectionConfig(backend="phrasebook")
        )

    def is_solved(self, text: str, problem_id: str) -> bool:
        return bool(draw(self._seed, text, problem_id).choice(self._outcomes(text, problem_id)))

    def rate(self, text: str, problem_id: str) -> float:
        return float(self._outcomes(text, problem_id).mean())

    def _outcomes(self, text: str, problem_id: str) -> np.ndarray:
        row = self._rows[frozenset(self._book.split(text))]
        return self._table.solved[row, self._table.families == problem_id.split("/")[0]]


NUM_HARD, DEV_SIZE = 400, 100
"""A third of the paper's, with the budget of as many candidates: 6,440 rollouts."""
NUM_KINDS = 12
PLAIN_QUALITY = -3.0
GAIN, GAIN_STD = 1.0, 1.0
"""Change of the quality for a kind of which reflection is shown a failure."""
LOSS, LOSS_STD = 0.1, 0.3
"""Change of the quality for every other kind."""


class Kinds:
    """A template has a quality for each kind of problem, and reflection works on those of which it sees a failure."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.reflector: Reflector = _KindsReflector(seed)
        self.spec = spec_of(
            [f"{number % NUM_KINDS}/{seed}/{number}" for number in range(NUM_HARD)], seed, dev_size=DEV_SIZE
        )

    def is_solved(self, text: str, problem_id: str) -> bool:
        return bool(draw(self._seed, text, problem_id).random() < self.rate(text, problem_id))

    def rate(self, text: str, problem_id: str) -> float:
        return 1 / (1 + np.exp(_difficulty(problem_id) - qualities(text)[kind_of(problem_id)]))


class _KindsReflector:
    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def propose(self, request: ReflectionRequest) -> str:
        random = draw(self._seed, "reflection", request.proposal)
        failed = {kind_of(example.problem.id) for example in request.examples if not example.trial.is_solved}
        changes = random.normal(-LOSS, LOSS_STD, NUM_KINDS)
        gains = random.normal(GAIN, GAIN_STD, NUM_KINDS)
        for kind in failed:
            changes[kind] = gains[kind]
        changed = qualities(request.parent_text) + changes
        return f"Instructions {request.proposal}: " + " ".join(f"{value:.4f}" for value in changed)

    async def close(self) -> None: ...


def kind_of(problem_id: str) -> int:
    return int(problem_id.split("/")[0])


@lru_cache(maxsize=2**16)
def _difficulty(problem_id: str) -> float:
    return float(draw("difficulty", problem_id).normal())


@lru_cache(maxsize=2**12)
def qualities(text: str) -> np.ndarray:
    """Return a template's qualities by kind."""
    found = re.findall(r"-?\d+\.\d+", text)
    return np.array(found, float) if found else np.full(NUM_KINDS, PLAIN_QUALITY)
