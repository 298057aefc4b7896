"""What luck alone would have solved: plain samples of the development problems, as many as the round took."""

import asyncio
import sys

from megatron_p2o.evolve.budget import RolloutBudget
from megatron_p2o.evolve.evaluation import Evaluator
from megatron_p2o.evolve.history import CONTROL_OCCASION
from megatron_p2o.evolve.round import Round
from megatron_p2o.evolve.score_book import ScoreBook


async def plain_coverage(state: Round, evaluator: Evaluator) -> float:
    """Return the share of development problems solved plainly within as many samples as they had evaluations.

    Sampled at the training temperature: greedy repeats would all be alike. Rollouts that fail count as not solving.
    """
    book = ScoreBook(
        evaluator,
        state.history,
        RolloutBudget(sys.maxsize),
        temperature=state.spec.settings.sampling_temperature,
        feedback_ids=(),
        is_failure_zero=True,
    )
    num_samples = {
        problem_id: sum(problem_id in state.pool.scores(candidate_id) for candidate_id in range(1, len(state.pool)))
        for problem_id in state.split.dev
    }
    try:
        solved = await asyncio.gather(*(_is_solved(book, key, number) for key, number in num_samples.items()))
    finally:
        book.cancel()
    return sum(solved) / len(solved)


async def _is_solved(book: ScoreBook, problem_id: str, num_samples: int) -> bool:
    """Sample one at a time, so that the first success saves the rest."""
    for sample in range(num_samples):
        evaluations = await book.measure("", [problem_id], occasion=f"{CONTROL_OCCASION}{sample}")
        if evaluations[0].is_solved:
            return True
    return False
