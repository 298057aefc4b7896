"""Compares answers by algebra. Runs in the processes of `fork_server` alone, which may be killed at any time."""

from megatron_p2o.rewards.math.algebra import NumericJudge
from megatron_p2o.rewards.math.match import verdict


def is_match(answers: list[str], gold: str) -> bool:
    """Return whether every answer equals `gold`, all in normal form."""
    judge = NumericJudge()
    return all(verdict(gold, answer, judge) for answer in answers)
