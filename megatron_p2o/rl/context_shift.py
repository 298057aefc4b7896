"""What a template still buys: how much more likely a response is under it than on the bare prompt.

The shift of a token is log pi(y | x, z) - log pi(y | x), of the policy that sampled it. Over tokens drawn under z its
mean estimates KL(pi(. | x, z) || pi(. | x)) in nats per token; it falls to 0 as the skill moves into the weights. The
first term is the log-prob of sampling (the engine's; the trainer's own under `logprobs.recompute`). The second is what
the training pass finds on the bare prompt before the policy moves. docs/metrics.md states the bias of both.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_p2o.types import ContextShift, PackedBatch, RolloutKey, TrainSample
from p2o_kernels import PolicyLoss

HEAD_TOKENS = 512
"""Tokens of a response that count as its head."""


def shift_of_tokens(batch: PackedBatch, outcome: PolicyLoss) -> Tensor:
    """Return the shift of each token, float64; what it says of a token without weight or advantage means nothing."""
    bare_T = outcome.logprobs_T if batch.old_logprobs_T is None else batch.old_logprobs_T
    return batch.sampling_logprobs_T.double() - bare_T.detach().double()


def shift_sums(batch: PackedBatch, outcome: PolicyLoss, is_counted_T: Tensor) -> Tensor:
    """Return [samples of the pack, 4] float64: sum and number of the head's tokens, then of the rest's.

    `is_counted_T`: bool, the tokens to count, of templated rollouts.
    """
    is_head_T = batch.response_index_T < HEAD_TOKENS
    # What is not counted may hold nan.
    shift_T = torch.where(is_counted_T, shift_of_tokens(batch, outcome), 0.0)
    counted_T = is_counted_T.double()
    columns = [values_T * is_part_T for is_part_T in (is_head_T, ~is_head_T) for values_T in (shift_T, counted_T)]
    sums = shift_T.new_zeros(len(batch.cu_seqlens) - 1, len(columns))
    return sums.index_add(0, batch.sample_index_T, torch.stack(columns, dim=1))


def shifts_of(
    samples: Sequence[TrainSample], parts: Iterable[Mapping[int, Sequence[float]]]
) -> dict[RolloutKey, ContextShift]:
    """Return the shift of each sample that has one.

    `parts`: from each rank, place in `samples` to its part of the four sums.
    """
    totals: dict[int, list[float]] = {}
    for part in parts:
        for place, sums in part.items():
            totals[place] = [a + b for a, b in zip(totals.get(place, (0.0,) * 4), sums, strict=True)]
    return {
        samples[place].key: ContextShift(
            head_sum=head_sum, head_tokens=int(head_tokens), rest_sum=rest_sum, rest_tokens=int(rest_tokens)
        )
        for place, (head_sum, head_tokens, rest_sum, rest_tokens) in sorted(totals.items())
        if head_tokens + rest_tokens
    }
