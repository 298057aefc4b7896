"""What templates still buy, against loops over single tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_p2o.rl.context_shift import HEAD_TOKENS, MAX_TOKENS, SampleShift, pack_shifts, shifts_of
from megatron_p2o.rl.objective import carrying_tokens
from megatron_p2o.rl.packing import context_part, pack
from megatron_p2o.types import ContextShift, Logprobs, PackedBatch, TrainSample
from p2o_kernels import PolicyLoss

LENGTHS = (3, HEAD_TOKENS + 5, 1, HEAD_TOKENS, 7, MAX_TOKENS + 3)
KEPT = 0.25
"""What the context ratio leaves of every token's weight, as these tests have it."""


def samples_of(seed: int = 0) -> tuple[list[TrainSample], list[Logprobs]]:
    """Return samples of which every second is templated, and log-probs on the bare prompt."""
    generator = np.random.default_rng(seed)
    bare = [generator.uniform(-3, 0, length).astype(np.float32) for length in LENGTHS]
    samples = [
        TrainSample(
            context_ids=np.arange(2 + index, dtype=np.int32),
            response_ids=np.arange(length, dtype=np.int32),
            advantage=0.5,
            sampling_logprobs=(row + generator.uniform(-1, 2, length)).astype(np.float32),
            is_templated=index != 0,
            key=(f"problem {index}", index),
        )
        for index, (length, row) in enumerate(zip(LENGTHS, bare, strict=True))
    ]
    return samples, bare


def by_hand(sample: TrainSample, bare_R: Logprobs) -> ContextShift:
    shift = [float(under) - float(bare) for under, bare in zip(sample.sampling_logprobs, bare_R, strict=True)]
    head, rest = shift[:512], shift[512:]
    return ContextShift(
        head_sum=math.fsum(head), head_tokens=len(head), rest_sum=math.fsum(rest), rest_tokens=len(rest)
    )


def outcome_of(batch: PackedBatch, logprobs_T: torch.Tensor) -> PolicyLoss:
    zero = torch.zeros_like(logprobs_T)
    return PolicyLoss(zero.sum(), logprobs_T, zero, KEPT * batch.loss_weights_T, zero, zero.bool(), zero.bool())


def measured(batch: PackedBatch, logprobs_T: torch.Tensor) -> dict[int, SampleShift]:
    is_counted_T = batch.is_templated_T & carrying_tokens(batch)
    samples = tuple(range(len(batch.cu_seqlens) - 1))
    return pack_shifts(samples, batch, outcome_of(batch, logprobs_T), is_counted_T).by_sample()


def assert_as_by_hand(
    shifts: dict[tuple[str, int], ContextShift], samples: list[TrainSample], bare: list[Logprobs]
) -> None:
    templated = [number for number, sample in enumerate(samples) if sample.is_templated]
    assert list(shifts) == [samples[number].key for number in templated]
    for number in templated:
        shift, expected = shifts[samples[number].key], by_hand(samples[number], bare[number])
        assert (shift.head_tokens, shift.rest_tokens) == (expected.head_tokens, expected.rest_tokens)
        assert shift.head_sum == pytest.approx(expected.head_sum, rel=1e-12)
        assert shift.rest_sum == pytest.approx(expected.rest_sum, rel=1e-12)
        assert shift.per_token == pytest.approx(expected.per_token, rel=1e-12)
        assert shift.tokens is not None
        first = samples[number].sampling_logprobs[:MAX_TOKENS] - bare[number][:MAX_TOKENS]
        # float32 on both sides, subtracted in float64 on one.
        np.testing.assert_allclose(shift.tokens.shifts, first, atol=1e-6)
        np.testing.assert_array_equal(shift.tokens.kept, np.full(len(first), KEPT, np.float32))


@pytest.mark.parametrize("is_first_update", [True, False])
def test_the_first_512_tokens_and_the_rest_are_added_up_by_sample(is_first_update: bool) -> None:
    samples, bare = samples_of()
    batch = pack(samples, None if is_first_update else bare)
    logprobs_T = torch.full(batch.loss_mask_T.shape, math.nan)
    if is_first_update:
        logprobs_T[batch.loss_mask_T] = torch.from_numpy(np.concatenate(bare))
    assert_as_by_hand(shifts_of(samples, [measured(batch, logprobs_T)]), samples, bare)


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_hold_parts_of_every_response(size: int) -> None:
    samples, bare = samples_of()
    whole = pack(samples, bare, multiple=2 * size)
    parts = [context_part(whole, rank, size) for rank in range(size)]
    found = [measured(part, torch.full(part.loss_mask_T.shape, math.nan)) for part in parts]
    assert_as_by_hand(shifts_of(samples, found), samples, bare)


def test_rollouts_without_an_advantage_or_a_template_have_no_shift() -> None:
    samples, bare = samples_of()
    samples[1] = replace(samples[1], advantage=0.0)
    samples[2] = replace(samples[2], loss_weights=np.zeros(1, np.float32))
    batch = pack(samples, bare)
    shifts = shifts_of(samples, [measured(batch, torch.zeros(batch.loss_mask_T.shape))])
    assert list(shifts) == [samples[3].key, samples[4].key, samples[5].key]
