"""`math` as an ordinary reward function, for tasks that weigh it with others."""

from megatron_p2o.rewards.extract import last_boxed
from megatron_p2o.rewards.math.grader import local_verdict
from megatron_p2o.rewards.workers.algebra import is_match
from megatron_p2o.types import FinishReason, Problem


def math_reward(problem: Problem, response: str, finish_reason: FinishReason) -> bool:
    r"""Return whether the last `\boxed{...}` of the response equals the gold answer, as `MathGrader` decides."""
    answer = last_boxed(response)
    if answer is None:
        return False
    verdict = local_verdict(problem, answer)
    return verdict if isinstance(verdict, bool) else is_match([verdict.answer], verdict.gold)
