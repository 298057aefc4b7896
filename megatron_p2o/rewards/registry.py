"""Makes the grader of a run."""

from importlib.util import find_spec
from typing import Protocol

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.interfaces import Grader
from megatron_p2o.rewards.function_grader import FunctionGrader
from megatron_p2o.rewards.math.grader import MathGrader

MATH = "math"


class RunGrader(Grader, Protocol):
    """A grader with processes of its own."""

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of its workers."""
        ...

    def check(self) -> None:
        """Have a known answer graded. Raises when nothing could be graded, `ValueError` for a bad reward function."""
        ...

    def close(self) -> None:
        """End the processes; what they have not answered is undecided."""
        ...


def make_grader(config: GradingConfig) -> RunGrader:
    """Return the grader the settings ask for; the caller closes it.

    Raises:
        RuntimeError: math-verify is needed and not installed.
    """
    if MATH in config.function_names and find_spec("math_verify") is None:
        raise RuntimeError("grading needs math-verify: pip install 'math-verify[antlr4_13_2]==0.9.0'")
    # What needs no algebra, most answers, it decides in this process.
    return MathGrader(config) if config.function_names == (MATH,) else FunctionGrader(config)
