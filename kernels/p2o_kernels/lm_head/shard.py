"""A rank's part of the LM head, and what is known of a chunk of tokens after the softmax.

Legend: T tokens, C tokens of a chunk, D hidden size, V vocabulary columns of this rank that count (Vp with padding).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

WeightGrad = Literal["fast", "precise"]
"""Triton path: the weight gradient by one product, or by two that halve its error at most states of a policy and
keep it below 1e-3 at all (README.md, "Rounding")."""


@dataclass(frozen=True, slots=True)
class HeadShard:
    """This rank's part of the LM head, without padding."""

    weight_VD: Tensor
    """Rows of the weight that are real vocabulary; a view without gradient."""
    num_rows: int
    """Rows with padding, the same on all ranks: what decides the chunks, or the ranks would wait for each other."""
    vocab_start: int
    """Global id of row 0."""
    temperature: float
    tp_group: ProcessGroup | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Float32, or float64 for float64 weights: the dtype of every sum."""
        return torch.promote_types(self.weight_VD.dtype, torch.float32)

    def local_targets(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Return (chunk rows whose target this rank holds, its column there)."""
        columns_C = targets_C.long() - self.vocab_start
        rows = ((columns_C >= 0) & (columns_C < len(self.weight_VD))).nonzero().squeeze(1)
        return rows, columns_C[rows]


@dataclass(frozen=True, slots=True)
class SoftmaxChunk:
    """Log-probs of a chunk and what its gradients need. Equal on all ranks, except the exponentials and their scale."""

    logprobs_C: Tensor
    entropy_C: Tensor | None
    """Entropy of the whole distribution in nats; None when it was not asked for."""
    exponentials_CV: Tensor | None
    """exp(logit - a reference of the row), 0 in the target's column; None when only log-probs were asked for."""
    probability_scale_C: Tensor
    """Probability = exponential times this."""
    complement_C: Tensor
    """1 - probability of the target, without cancellation."""

    def select(self, rows: Tensor) -> "SoftmaxChunk":
        """Return a copy of some rows."""
        assert self.exponentials_CV is not None
        return replace(
            self,
            logprobs_C=self.logprobs_C[rows],
            entropy_C=None if self.entropy_C is None else self.entropy_C[rows],
            exponentials_CV=self.exponentials_CV[rows],
            probability_scale_C=self.probability_scale_C[rows],
            complement_C=self.complement_C[rows],
        )


def make_shard(
    hidden_TD: Tensor,
    weight_VpD: Tensor,
    targets_T: Tensor,
    temperature: float,
    tp_group: ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
) -> HeadShard:
    """Check the inputs of an operation and return the shard without its padded rows.

    Raises:
        ValueError: shapes, dtypes, devices, temperature or targets do not fit.
    """
    _check_tensors(hidden_TD, weight_VpD, targets_T)
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
    num_rows = len(weight_VpD)
    num_ranks = 1 if tp_group is None else get_world_size(tp_group)
    _check_targets(targets_T, num_rows * num_ranks if vocab_size is None else vocab_size)
    num_valid = num_rows if vocab_size is None else min(max(vocab_size - vocab_start, 0), num_rows)
    return HeadShard(weight_VpD.detach()[:num_valid], num_rows, vocab_start, temperature, tp_group)


def _check_tensors(hidden_TD: Tensor, weight_VpD: Tensor, targets_T: Tensor) -> None:
    if hidden_TD.dim() != 2 or weight_VpD.dim() != 2 or hidden_TD.shape[1] != weight_VpD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VpD {tuple(weight_VpD.shape)}: must be [T, D] and [Vp, D]"
        )
    if targets_T.shape != hidden_TD.shape[:1] or targets_T.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"targets_T {tuple(targets_T.shape)} {targets_T.dtype}: must be int64 or int32 [{len(hidden_TD)}]"
        )
    if hidden_TD.dtype != weight_VpD.dtype or hidden_TD.dtype not in INPUT_DTYPES:
        raise ValueError(f"hidden_TD {hidden_TD.dtype}, weight_VpD {weight_VpD.dtype}: must be one of {INPUT_DTYPES}")
    if not hidden_TD.device == weight_VpD.device == targets_T.device:
        raise ValueError("hidden_TD, weight_VpD and targets_T: must be on one device")


def _check_targets(targets_T: Tensor, vocab_size: int) -> None:
    """A target outside the vocabulary has no logit. On a GPU the check runs there, so that nothing waits for it."""
    if targets_T.is_cuda:
        is_valid = ((targets_T >= 0) & (targets_T < vocab_size)).all()
        torch.ops.aten._assert_async.msg(is_valid, f"targets_T: must lie in [0, {vocab_size})")
    elif len(targets_T):
        low, high = (int(bound) for bound in targets_T.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"targets_T spans [{low}, {high}]: must lie in [0, {vocab_size})")
