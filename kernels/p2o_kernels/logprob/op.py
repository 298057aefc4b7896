"""`linear_logprob`: log-probs of given tokens from hidden states, without ever holding the logits."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, get_world_size

from p2o_kernels.chunked_softmax import shard_of
from p2o_kernels.logprob.torch_path import linear_logprob_torch


def linear_logprob(
    hidden_TD: Tensor,
    weight_VpD: Tensor,
    targets_T: Tensor,
    *,
    temperature: float = 1.0,
    tp_group: ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (logprobs_T, entropy_T): log softmax(hidden @ weight.T / temperature) at the targets, and the entropy.

    Both are float32 (float64 for float64 inputs), in nats, the same on all ranks. `logprobs_T` is differentiable in
    hidden and weight, `entropy_T` is a metric without gradient. Products accumulate in float32; the weight gradient is
    accumulated in float32 and cast once. Under `torch.no_grad` nothing beyond one chunk of logits is held.

    Args:
        hidden_TD: float32, bfloat16 or float64, the same on all ranks of `tp_group`.
        weight_VpD: this rank's rows of the LM head; as many on every rank of `tp_group`.
        targets_T: global token ids in [0, vocab_size); integer.
        temperature: the logits are divided by it.
        tp_group: the ranks that share the vocabulary. All must call, and all run backward with the same gradient of
            `logprobs_T` (backward communicates when chunks are computed again). **The hidden gradient is then this shard's partial
            sum**: the caller's mapping (Megatron's `copy_to_tensor_model_parallel_region` or its sequence-parallel
            gather) adds it over the group.
        vocab_start: global id of this rank's first row.
        vocab_size: real columns over all ranks; rows of the weight at or beyond it are padding, never counted, and get
            a zero gradient. Default: every row is real.

    Raises:
        ValueError: shapes, dtypes, devices or targets do not fit.
    """
    _check(hidden_TD, weight_VpD, targets_T, temperature)
    num_ranks = 1 if tp_group is None else get_world_size(tp_group)
    last = vocab_size if vocab_size is not None else vocab_start + len(weight_VpD) if num_ranks == 1 else None
    check_targets(targets_T, last)
    shard = shard_of(
        weight_VpD.detach(), temperature=temperature, tp_group=tp_group, vocab_start=vocab_start, vocab_size=vocab_size
    )
    return linear_logprob_torch(hidden_TD, shard, weight_VpD, targets_T)


def check_targets(targets_T: Tensor, vocab_size: int | None) -> None:
    """Raise `ValueError` for a target outside the vocabulary: it would have no logit."""
    if len(targets_T) == 0:
        return
    low, high = (int(bound) for bound in targets_T.aminmax())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(f"targets_T spans [{low}, {high}]: must lie in [0, {vocab_size}); mask rows before the call")


def _check(hidden_TD: Tensor, weight_VpD: Tensor, targets_T: Tensor, temperature: float) -> None:
    if hidden_TD.dim() != 2 or weight_VpD.dim() != 2 or hidden_TD.shape[1] != weight_VpD.shape[1]:
        raise ValueError(
            f"hidden_TD {tuple(hidden_TD.shape)} and weight_VpD {tuple(weight_VpD.shape)}: must be [T, D] and [Vp, D]"
        )
    if targets_T.shape != hidden_TD.shape[:1] or targets_T.is_floating_point():
        raise ValueError(
            f"targets_T {tuple(targets_T.shape)} {targets_T.dtype}: must be integer [{len(hidden_TD)}], one per token"
        )
    if hidden_TD.dtype != weight_VpD.dtype or hidden_TD.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise ValueError(
            f"hidden_TD is {hidden_TD.dtype}, weight_VpD is {weight_VpD.dtype}: must be the same, float32, bfloat16 or "
            "float64"
        )
    if not hidden_TD.device == weight_VpD.device == targets_T.device:
        raise ValueError("hidden_TD, weight_VpD and targets_T: must be on one device")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
