"""How samples are divided over data-parallel ranks, and refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_p2o.policy.shares import balanced, check_samples, shares_of
from megatron_p2o.testing.policy_oracle import random_samples

SAMPLES = random_samples((4, 1, 9, 3), vocab_size=50)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 8))
def test_every_sample_goes_to_one_rank_and_loads_differ_by_less_than_one_sample(lengths: list[int], num_ranks: int):
    members = balanced(lengths, num_ranks)
    assert sorted(index for indices in members for index in indices) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in indices) for indices in members]
    assert max(loads) - min(loads) <= max(lengths, default=0)


def test_a_share_keeps_samples_log_probs_and_places_together():
    old_logprobs = [np.full(len(sample.response_ids), index, np.float32) for index, sample in enumerate(SAMPLES)]
    shares = shares_of(SAMPLES, old_logprobs, 2)
    for share in shares:
        assert share.old_logprobs is not None
        for sample, index, row in zip(share.samples, share.indices, share.old_logprobs, strict=True):
            assert sample is SAMPLES[index]
            assert row[0] == index
    assert [len(share.samples) for share in shares_of(SAMPLES[:1], None, 2)] == [1, 0]


def test_samples_that_cannot_be_packed_are_refused():
    check_samples(SAMPLES, None, 50)
    foreign = replace(SAMPLES[2], response_ids=np.full(9, 50, np.int32))
    with pytest.raises(ValueError, match=r"samples\[1\] has token ids in \[50, 50\], but .* vocabulary is \[0, 50\)"):
        check_samples([SAMPLES[1], foreign], None, 50)
    empty = replace(SAMPLES[0], response_ids=np.zeros(0, np.int32), sampling_logprobs=np.zeros(0, np.float32))
    with pytest.raises(ValueError, match=r"samples\[0\] has an empty context or response"):
        check_samples([empty], None, 50)
    with pytest.raises(ValueError, match=r"samples\[1\] has 1 response tokens but \[1, 2\] log-probs"):
        check_samples(SAMPLES[:2], [np.zeros(4, np.float32), np.zeros(2, np.float32)], 50)
