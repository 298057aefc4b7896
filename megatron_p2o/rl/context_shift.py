"""What a template still buys: how much more likely a response is under it than on the bare prompt.

The shift of a token is log pi(y | x, z) - log pi(y | x), of the policy that sampled it. Over tokens drawn under z its
mean estimates KL(pi(. | x, z) || pi(. | x)) in nats per token; it falls to 0 as the skill moves into the weights. The
first term is the log-prob of sampling (the engine's; the trainer's own under `logprobs.recompute`). The second is what
the training pass finds on the bare prompt before the policy moves. docs/metrics.md states the bias of both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_p2o.types import ContextShift, Logprobs, PackedBatch, RolloutKey, TokenShifts, TrainSample
from p2o_kernels import PolicyLoss

HEAD_TOKENS = 512
"""Tokens of a response that count as its head."""

MAX_TOKENS = 1024
"""First tokens of a response whose shifts are kept one by one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleShift:
    """One rank's part of the shift of a sample. M tokens are among the first `MAX_TOKENS`."""

    sums: tuple[float, float, float, float]
    """A row of `shift_sums`."""
    places: NDArray[np.int64]
    """[M] in the response."""
    shifts: Logprobs
    """[M]"""
    kept: Logprobs
    """[M] as in `TokenShifts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackShifts:
    """Shifts of the templated tokens of a pack. Nothing waits for the GPU before `on_cpu`."""

    samples: tuple[int, ...]
    """Index of each packed sample in the rank's samples."""
    sums: Tensor
    """See `shift_sums`."""
    tokens_5T: Tensor
    """float64 rows in one tensor, which is copied at once: whether a token counts, its sample in the pack, its place in
    the response, its shift, and the share of its weight that is left."""

    def on_cpu(self) -> "PackShifts":
        return replace(self, sums=self.sums.cpu(), tokens_5T=self.tokens_5T.cpu())

    def by_sample(self) -> dict[int, SampleShift]:
        """Return what was measured of each sample that has templated tokens, by index; of a pack in host memory."""
        is_counted_T, owner_T, place_T, shift_T, kept_T = self.tokens_5T.numpy()
        is_first_T = (is_counted_T > 0) & (place_T < MAX_TOKENS)
        found: dict[int, SampleShift] = {}
        for number, sample in enumerate(self.samples):
            head_sum, head_tokens, rest_sum, rest_tokens = (float(value) for value in self.sums[number])
            if head_tokens or rest_tokens:
                is_own_T = is_first_T & (owner_T == number)
                found[sample] = SampleShift(
                    sums=(head_sum, head_tokens, rest_sum, rest_tokens),
                    places=place_T[is_own_T].astype(np.int64),
                    shifts=shift_T[is_own_T].astype(np.float32),
                    kept=kept_T[is_own_T].astype(np.float32),
                )
        return found


def pack_shifts(samples: tuple[int, ...], batch: PackedBatch, outcome: PolicyLoss, is_counted_T: Tensor) -> PackShifts:
    """Return the shifts of a pack; `is_counted_T` as in `shift_sums`."""
    rows = (
        is_counted_T,
        batch.sample_index_T,
        batch.response_index_T,
        shift_of_tokens(batch, outcome),
        (outcome.weights_T / batch.loss_weights_T).detach(),
    )
    return PackShifts(
        samples=samples,
        sums=shift_sums(batch, outcome, is_counted_T),
        tokens_5T=torch.stack([row_T.double() for row_T in rows]),
    )


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
    samples: Sequence[TrainSample], parts: Iterable[Mapping[int, SampleShift]]
) -> dict[RolloutKey, ContextShift]:
    """Return the shift of each sample that has one.

    `parts`: from each rank, place in `samples` to its part; the context-parallel ranks share a sample.
    """
    of_sample: dict[int, list[SampleShift]] = {}
    for part in parts:
        for place, measured in part.items():
            of_sample.setdefault(place, []).append(measured)
    return {samples[place].key: _joined(samples[place], measured) for place, measured in sorted(of_sample.items())}


def _joined(sample: TrainSample, parts: Sequence[SampleShift]) -> ContextShift:
    head_sum, head_tokens, rest_sum, rest_tokens = (
        sum(values) for values in zip(*(part.sums for part in parts), strict=True)
    )
    shifts = np.full(min(len(sample.response_ids), MAX_TOKENS), np.nan, np.float32)
    kept = np.full_like(shifts, np.nan)
    for part in parts:
        shifts[part.places], kept[part.places] = part.shifts, part.kept
    return ContextShift(
        head_sum=head_sum,
        head_tokens=int(head_tokens),
        rest_sum=rest_sum,
        rest_tokens=int(rest_tokens),
        tokens=TokenShifts(shifts=shifts, kept=kept),
    )
