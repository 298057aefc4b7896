"""The plain control of a round: as many samples of the development problems without template as the round used."""

import asyncio
import sys

from megatron_p2o.evolve.record.history import CONTROL_OCCASION
from megatron_p2o.evolve.search.budget import RolloutBudget
from megatron_p2o.evolve.search.round import Round
from megatron_p2o.evolve.search.score_book import ScoreBook
from megatron_p2o.evolve.trial import TrialFailed, TrialRunner


async def plain_coverage(round_: Round, runner: TrialRunner) -> float | None:
    """Return the share of development problems solved plainly within as many samples as they had trials.

    Sampled at the training temperature: greedy repeats would all be alike. A sample without a verdict is replaced by
    another; the denominator leaves out problems for which too many have none. None when that are all.
    """
    book = ScoreBook(
        runner,
        round_.history,
        RolloutBudget(sys.maxsize),
        temperature=round_.spec.settings.sampling_temperature,
        feedback_ids=(),
    )
    num_samples = {
        problem_id: sum(problem_id in round_.pool.scores(candidate_id) for candidate_id in range(1, len(round_.pool)))
        for problem_id in round_.split.dev
    }
    try:
        outcomes = await asyncio.gather(*(_is_solved(book, key, number) for key, number in num_samples.items()))
    finally:
        book.cancel()
    decided = [is_solved for is_solved in outcomes if is_solved is not None]
    if len(decided) < len(outcomes):
        round_.notify(f"pass@N leaves out {len(outcomes) - len(decided)} of {len(outcomes)} problems: too few verdicts")
    return sum(decided) / len(decided) if decided else None


async def _is_solved(book: ScoreBook, problem_id: str, num_samples: int) -> bool | None:
    """Sample one at a time, so that the first success saves the rest; None when half of the samples and more are lost.

    A lost sample is replaced: without it the control would have fewer tries than the templates had.
    """
    num_decided = 0
    for sample in range(2 * num_samples):
        if num_decided == num_samples:
            break
        try:
            trials = await book.measure("", [problem_id], occasion=f"{CONTROL_OCCASION}{sample}")
        except TrialFailed:
            continue
        if trials[0].is_solved:
            return True
        num_decided += 1
    return False if num_decided == num_samples else None
