"""What workers of `MathGrader` do: compare answers by algebra. Runs in processes that may be killed at any time."""

from collections.abc import Mapping
from typing import Any

from megatron_p2o.rewards.math.algebra import NumericJudge
from megatron_p2o.rewards.math.match import verdict
from megatron_p2o.rewards.workers.loop import peak_bytes

MEMORY_ALARM = 0.75
"""Share of the memory limit in use above which "incorrect" is not believed: sympy turns a failed allocation into it."""

WARM_UP = (
    ("0.5", r"\frac{1}{2}"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
    ("x^2+y^2=1", "x^2+y^2-1=0"),
    ("0<x<1", "(0,1)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\sqrt{2}+\sqrt{3}", "3.1462643699"),
    (r"\log_{2}9", r"\frac{\ln 9}{\ln 2}"),
    (r"\binom{10}{3}", "120"),
    (r"\sum_{k=1}^{3}k", "6"),
    ("2+3i", "3i+2"),
    ("x+1", "y+1"),
)
"""Gold and answer of every kind: sympy imports and builds its tables when it first meets one."""


class Algebra:
    """A `loop.Program`. A request is {"gold": ..., "answers": [...]}, all in normal form."""

    max_at_once = 1

    def __init__(self, memory_limit_bytes: int) -> None:
        """Import and warm up everything: workers are forked from here."""
        self._memory_limit_bytes = memory_limit_bytes
        for gold, answer in WARM_UP:
            is_match([answer], gold)

    def begin(self) -> None:
        """Do nothing: workers are ready."""

    async def grade(self, request: Mapping[str, Any]) -> bool:
        """Return whether every answer equals the gold one. Raise `MemoryError` where that cannot be trusted."""
        if is_match(request["answers"], request["gold"]):
            return True
        if peak_bytes() > MEMORY_ALARM * self._memory_limit_bytes:
            raise MemoryError
        return False


def is_match(answers: list[str], gold: str) -> bool:
    """Return whether every answer equals `gold`, all in normal form."""
    judge = NumericJudge()
    return all(verdict(gold, answer, judge) for answer in answers)
