"""`reasoning_gym`: the scorers of the library of that name, for rows that `megatron_p2o.data.reasoning_gym` writes.

Some scorers run an answer as Python code. Here they read literals, or arithmetic of known functions, and nothing else:
code in an answer could look up what is expected. That was read in one version of the library, which is required.
"""

import ast
import importlib
import json
import re
from functools import lru_cache
from importlib import metadata
from typing import Any

from megatron_p2o.rewards.built_in.columns import column
from megatron_p2o.rewards.built_in.final_answer import Extract, checked_extract, final_answer, no_answer
from megatron_p2o.types import FinishReason, Grade, Problem

VERSION = "0.1.25"

READS_LITERALS = (
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.games.n_queens",
)
"""Modules whose scorers evaluate answers, which are lists."""

READS_ARITHMETIC = frozenset(
    {"countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"}
)
"""Tasks whose scorers give answers to sympy, which evaluates them."""

FUNCTIONS = frozenset(
    {
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
    }
    | {"exp", "log", "ln", "sqrt", "pi", "Abs"}
)

MAX_CHARACTERS = 1000
"""Longest answer that is read as arithmetic."""


class ReasoningGymReward:
    """The score of the dataset's own scorer, which may give part of 1."""

    def __init__(self, *, extract: str = "answer_tag") -> None:
        """Prepare.

        Args:
            extract: where the answer stands in a response (`final_answer.Extract`); the library asks for answer tags.

        Raises:
            ValueError: the library is not installed in the version that was read, or `extract` is not known.
        """
        self._extract: Extract = checked_extract(extract, "reasoning_gym")
        try:
            found = metadata.version("reasoning-gym")
        except metadata.PackageNotFoundError:
            found = "not installed"
        if found != VERSION:
            raise ValueError(
                f"reasoning_gym needs reasoning-gym {VERSION}, which is {found}: pip install the pinned one"
            )
        for name in READS_LITERALS:
            vars(importlib.import_module(name))["eval"] = ast.literal_eval

    def __call__(self, problem: Problem, response: str, finish_reason: FinishReason) -> Grade:
        entry = entry_of(problem)
        name = entry["metadata"]["source_dataset"]
        answer = final_answer(response, self._extract, finish_reason)
        if answer is None:
            return no_answer(self._extract)
        if name in READS_ARITHMETIC and not is_arithmetic(answer):
            return Grade(reward=0.0, reason="no arithmetic", feedback="The answer is not an arithmetic expression.")
        settings = problem.columns.get("settings") or {}
        score = float(scorer(name, json.dumps(settings)).score_answer(answer, entry))
        return Grade(reward=score, reason=f"{name}: {score:g}", feedback=f"The answer scores {score:g} of 1.")


def entry_of(problem: Problem) -> dict[str, Any]:
    """Return the library's entry in a problem's row. Raises `ValueError` for a row that has none."""
    described = column(problem, "metadata", "the library's")
    if not isinstance(described, dict) or not isinstance(described.get("source_dataset"), str):
        raise ValueError(f"column 'metadata' of problem {problem.id} does not say its dataset (source_dataset)")
    return {"question": problem.question, "answer": problem.columns.get("answer"), "metadata": described}


@lru_cache(maxsize=256)
def scorer(name: str, settings: str) -> Any:
    """Return the dataset with the settings, as JSON, that its problems were made with.

    Raises `ValueError` for an unknown dataset.
    """
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **json.loads(settings))


def is_arithmetic(text: str) -> bool:
    """Return whether `text` is numbers, variables of one letter, operators and known functions, and nothing else."""
    if len(text) > MAX_CHARACTERS or not re.fullmatch(r"[0-9A-Za-z\s+\-*/^().,!]*", text):
        return False
    if re.search(r"\.\s*[A-Za-z]|[A-Za-z)]\s*\.", text):  # an attribute
        return False
    return all(len(word) == 1 or word in FUNCTIONS for word in re.findall(r"[A-Za-z][A-Za-z0-9]*", text))
