"""`grouped_advantage`: ragged groups of rollouts to advantages per packed token, and the index of those that count."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from p2o_kernels.advantage.torch_path import active_token_index_torch, grouped_advantage_torch

Estimator = Literal["grpo", "dr_grpo", "rloo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedAdvantages:
    """Credit of R rollouts and of their T packed tokens."""

    advantages_R: Tensor
    """float32; 0 for invalid rollouts and in flat groups."""
    is_flat_R: Tensor
    """bool: no two valid rewards of the rollout's group (and anchor) differ, exactly: the group teaches nothing."""
    num_active_R: Tensor
    """int32 tokens of the rollout inside the loss mask, 0 where the advantage is 0."""
    advantages_T: Tensor
    """float32 advantage of the token's rollout, 0 outside the loss mask."""


def grouped_advantage(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    is_valid_R: Tensor,
    cu_seqlens: Tensor,
    loss_mask_T: Tensor,
    *,
    estimator: Estimator,
    anchor_rates_R: Tensor | None = None,
    implementation: Literal["torch", "triton"] | None = None,
) -> GroupedAdvantages:
    """Compute the advantages of all groups of a batch, in any order and of any size.

    "grpo" (r - mean) / (unbiased standard deviation + 1e-6), "dr_grpo" r - mean, "rloo" r - mean of the others; over
    the valid rollouts of the group (arXiv:2402.03300, 2503.20783, 2402.14740). Float64 on CPU; on CUDA one launch,
    float32 relative to the rollout's own reward, so that a common offset of the rewards does not cost digits.

    Args:
        rewards_R: float32.
        group_ids_R: int64 or int32, any values; equal ids are one group.
        is_valid_R: bool; False leaves a rollout out of its group's baseline and gives it advantage 0.
        cu_seqlens: [R + 1] int32, the tokens of rollout r are cu_seqlens[r] to cu_seqlens[r + 1]; the last is T.
        loss_mask_T: bool.
        anchor_rates_R: float32, the same within a group: plain success rate at which as many virtual 0/1 rollouts as
            valid ones join the group's baseline; nan leaves the group alone.
        implementation: default by device: torch on CPU, triton on CUDA.

    Raises:
        ValueError: shapes, dtypes or the implementation do not fit.
    """
    _check(rewards_R, group_ids_R, is_valid_R, cu_seqlens, loss_mask_T, anchor_rates_R)
    if _choose(implementation, rewards_R.device) == "torch":
        values = grouped_advantage_torch(
            rewards_R, group_ids_R, is_valid_R, cu_seqlens, loss_mask_T, estimator, anchor_rates_R
        )
    else:
        from p2o_kernels.advantage.triton_path import grouped_advantage_triton

        values = grouped_advantage_triton(
            rewards_R, group_ids_R, is_valid_R, cu_seqlens, loss_mask_T, estimator, anchor_rates_R
        )
    advantages_R, is_flat_R, num_active_R, advantages_T = values
    return GroupedAdvantages(
        advantages_R=advantages_R, is_flat_R=is_flat_R, num_active_R=num_active_R, advantages_T=advantages_T
    )


def active_token_index(
    advantages_T: Tensor, weights_T: Tensor, *, implementation: Literal["torch", "triton"] | None = None
) -> Tensor:
    """Return the positions, int64 ascending, of the tokens whose advantage and weight are not zero.

    The rows that `linear_policy_loss` takes through the LM head. Deterministic; one wait for the GPU, which must tell
    how many there are.

    Args:
        advantages_T: floating point.
        weights_T: floating point, the factor on a token's loss; 0 outside the loss mask.
        implementation: default by device: torch on CPU, triton on CUDA.

    Raises:
        ValueError: shapes, devices or the implementation do not fit.
    """
    if advantages_T.shape != weights_T.shape or advantages_T.dim() != 1 or advantages_T.device != weights_T.device:
        raise ValueError(
            f"advantages_T {tuple(advantages_T.shape)} on {advantages_T.device}, weights_T {tuple(weights_T.shape)} on "
            f"{weights_T.device}: must be [T] both, on one device"
        )
    if _choose(implementation, advantages_T.device) == "torch":
        return active_token_index_torch(advantages_T, weights_T)
    from p2o_kernels.advantage.triton_path import active_token_index_triton

    return active_token_index_triton(advantages_T, weights_T)


def _choose(implementation: Literal["torch", "triton"] | None, device: torch.device) -> Literal["torch", "triton"]:
    if implementation is not None:
        if implementation not in ("torch", "triton"):
            raise ValueError(f"implementation={implementation!r}: must be 'torch' or 'triton'")
        return implementation
    if device.type != "cuda":
        return "torch"
    if find_spec("triton") is None:
        raise ValueError("implementation: triton is not installed; install it, or pass implementation='torch'")
    return "triton"


def _check(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    is_valid_R: Tensor,
    cu_seqlens: Tensor,
    loss_mask_T: Tensor,
    anchor_rates_R: Tensor | None,
) -> None:
    num_rollouts = len(rewards_R)
    expected = [
        ("rewards_R", rewards_R, (num_rollouts,), (torch.float32,)),
        ("group_ids_R", group_ids_R, (num_rollouts,), (torch.int64, torch.int32)),
        ("is_valid_R", is_valid_R, (num_rollouts,), (torch.bool,)),
        ("cu_seqlens", cu_seqlens, (num_rollouts + 1,), (torch.int32,)),
        ("loss_mask_T", loss_mask_T, (loss_mask_T.numel(),), (torch.bool,)),
    ]
    if anchor_rates_R is not None:
        expected.append(("anchor_rates_R", anchor_rates_R, (num_rollouts,), (torch.float32,)))
    for name, tensor, shape, dtypes in expected:
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != rewards_R.device:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: must be {shape}, one of {dtypes}, on "
                f"{rewards_R.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
    if not cu_seqlens.is_cuda and (int(cu_seqlens[0]), int(cu_seqlens[-1])) != (0, len(loss_mask_T)):
        raise ValueError(
            f"cu_seqlens spans {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}: must be 0 to T={len(loss_mask_T)}"
        )
