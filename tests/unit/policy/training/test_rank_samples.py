"""How samples are divided over data-parallel ranks, and refused."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_p2o.config.tree import ParallelConfig
from megatron_p2o.policy.model.architecture import Architecture, ModelType
from megatron_p2o.policy.training.rank_samples import check_samples, split_over_ranks
from megatron_p2o.testing.policy_oracle import random_samples

SAMPLES = random_samples((4, 1, 9, 3), vocab_size=50)
SHAPE = Architecture(
    model_type=ModelType(),
    num_layers=1,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    intermediate_size=16,
    experts=None,
    vocab_size=50,
    norm_epsilon=1e-6,
    rope_theta=1e4,
    rope_scaling_factor=None,
    max_positions=64,
    ties_embeddings=True,
)


@pytest.mark.parametrize(
    ("parallel", "num_batches"),
    [(ParallelConfig(data=2), 1), (ParallelConfig(data=2, pipeline=4, virtual_pipeline=2), 4)],
)
def test_a_share_keeps_samples_log_probs_and_places_together(parallel: ParallelConfig, num_batches: int):
    old_logprobs = [np.full(len(sample.response_ids), index, np.float32) for index, sample in enumerate(SAMPLES)]
    by_rank = split_over_ranks(SAMPLES, old_logprobs, parallel, 1000, SHAPE)
    assert sorted(index for rank_samples in by_rank for index in rank_samples.indices) == [0, 1, 2, 3]
    for rank_samples in by_rank:
        assert rank_samples.old_logprobs is not None
        for sample, index, row in zip(
            rank_samples.samples, rank_samples.indices, rank_samples.old_logprobs, strict=True
        ):
            assert sample is SAMPLES[index]
            assert row[0] == index
        assert len(rank_samples.micro_batches) == num_batches
        assert [place for members in rank_samples.micro_batches for place in members] == list(
            range(len(rank_samples.samples))
        )
    assert [
        len(rank_samples.samples) for rank_samples in split_over_ranks(SAMPLES[:1], None, parallel, 1000, SHAPE)
    ] == [1, 0]


def test_context_ranks_share_the_budget_of_rounded_samples():
    samples = random_samples((5, 5), vocab_size=50)  # 9 and 10 tokens, 12 and 12 in multiples of 4
    for budget, expected in ((12, ((0, 1),)), (11, ((0,), (1,)))):
        (rank_samples,) = split_over_ranks(samples, None, ParallelConfig(context=2), budget, SHAPE)
        assert rank_samples.micro_batches == expected


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


def test_ranks_share_the_arithmetic_rather_than_the_tokens():
    # With attention, one sample of 60 tokens is more work than 80 tokens in samples of 10.
    samples = random_samples((60, *(10,) * 14), vocab_size=50)
    long = max(range(len(samples)), key=lambda index: samples[index].num_tokens)
    by_rank = split_over_ranks(samples, None, ParallelConfig(data=2), 1000, SHAPE)
    flops = [
        sum(SHAPE.forward_flops(sample.num_tokens, len(sample.response_ids)) for sample in rank_samples.samples)
        for rank_samples in by_rank
    ]
    tokens = [sum(sample.num_tokens for sample in rank_samples.samples) for rank_samples in by_rank]
    with_long = next(number for number, rank_samples in enumerate(by_rank) if long in rank_samples.indices)
    assert max(flops) / min(flops) < 1.1
    assert tokens[with_long] < tokens[1 - with_long]
