"""Makes the grader of a run."""

from importlib.util import find_spec

from megatron_p2o.config.tree import GradingConfig
from megatron_p2o.rewards.math.grader import MathGrader


def make_grader(config: GradingConfig) -> MathGrader:
    """Return the grader the settings ask for; the caller closes it.

    Raises:
        RuntimeError: math-verify is not installed.
    """
    if find_spec("math_verify") is None:
        raise RuntimeError("grading needs math-verify: pip install 'math-verify[antlr4_13_2]==0.9.0'")
    return MathGrader(config)
