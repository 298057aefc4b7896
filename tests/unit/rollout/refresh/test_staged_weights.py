"""The buckets of a refresh, and rank 0's step with the others that fill the same ones."""

from typing import Any, cast

import pytest

from megatron_p2o.rollout.refresh.cost import Stopwatches
from megatron_p2o.rollout.refresh.staged_weights import LockStep, StagedWeights
from megatron_p2o.testing.engines.sglang_server import fused_model_weights as weights

BUCKET_BYTES = 48
"""The weights of `FusedModel` make three buckets."""


class Meetings:
    """An outlet that counts how often the ranks meet."""

    def __init__(self) -> None:
        self.num = 0

    def meet(self) -> None:
        self.num += 1


@pytest.mark.parametrize("num_drawn", range(6))
def test_rank_0_comes_to_every_meeting_wherever_a_refresh_stops(num_drawn: int) -> None:
    meetings = Meetings()
    step = LockStep(cast(Any, meetings))
    for _ in range(2):  # a refresh that stopped leaves nothing to the next one
        meetings.num = 0
        stream = iter(weights())
        placed = step.start(stream, BUCKET_BYTES)
        for _ in range(num_drawn):
            next(placed, None)
        step.finish()
        assert meetings.num == 3
        assert next(stream, None) is None


def test_rank_0_meets_for_a_bucket_once_and_not_before_it_is_full() -> None:
    meetings = Meetings()
    step = LockStep(cast(Any, meetings))
    counts: list[int] = []
    for index, _, _ in step.start(weights(), BUCKET_BYTES):
        step.meet()
        step.meet()
        assert meetings.num == index
        counts.append(meetings.num)
    assert set(counts) == {0, 1, 2}
    step.finish()
    assert meetings.num == 3


def test_only_the_buckets_of_the_last_refresh_count_as_filled() -> None:
    staged, watches = StagedWeights(BUCKET_BYTES, None), Stopwatches()
    assert len(list(staged.fill(weights(), watches, verify=True))) == len(staged.filled) == 3
    assert len(list(staged.fill(weights()[:1], watches, verify=True))) == len(staged.filled) == 1
    assert len(staged.buckets) == 3
    staged.close()
