"""`grouped_advantage`: rewards of ragged groups to advantages; `active_token_index`: the tokens that count."""

from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from p2o_kernels.advantage.torch_path import active_token_index_torch, grouped_advantage_torch

Estimator = Literal["grpo", "dr_grpo", "rloo"]


def grouped_advantage(
    rewards_R: Tensor,
    group_ids_R: Tensor,
    is_valid_R: Tensor,
    *,
    estimator: Estimator,
    anchor_rates_R: Tensor | None = None,
    implementation: Literal["torch", "triton"] | None = None,
) -> Tensor:
    """Return the advantages [R], float32, of all groups of a step, in any order and of any size.

    "grpo" (r - mean) / (unbiased standard deviation + 1e-6), "dr_grpo" r - mean, "rloo" r - mean of the others; over
    the valid rollouts of the group (arXiv:2402.03300, 2503.20783, 2402.14740). Exactly 0 for an invalid rollout, and in
    a group where no two valid rewards (and no anchor) differ: it teaches nothing. Float64 on CPU; on CUDA one launch,
    float32 relative to the rollout's own reward, so that a common offset of the rewards does not cost digits.

    Args:
        rewards_R: float32; one that is nan makes its group nan.
        group_ids_R: int64 or int32, any values; equal ids are one group.
        is_valid_R: bool; False leaves a rollout out of its group's baseline, whatever its reward.
        anchor_rates_R: float32, the same within a group: plain success rate at which as many virtual 0/1 rollouts as
            valid ones join the group's baseline; nan leaves the group alone.
        implementation: default by device: torch on CPU, triton on CUDA.

    Raises:
        ValueError: shapes, dtypes or the implementation do not fit.
    """
    _check(rewards_R, group_ids_R, is_valid_R, anchor_rates_R)
    if _choose(implementation, rewards_R.device) == "torch":
        return grouped_advantage_torch(rewards_R, group_ids_R, is_valid_R, estimator, anchor_rates_R)
    from p2o_kernels.advantage.triton_path import grouped_advantage_triton

    return grouped_advantage_triton(rewards_R, group_ids_R, is_valid_R, estimator, anchor_rates_R)


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


def _check(rewards_R: Tensor, group_ids_R: Tensor, is_valid_R: Tensor, anchor_rates_R: Tensor | None) -> None:
    shape = (rewards_R.numel(),)
    expected = [
        ("rewards_R", rewards_R, (torch.float32,)),
        ("group_ids_R", group_ids_R, (torch.int64, torch.int32)),
        ("is_valid_R", is_valid_R, (torch.bool,)),
    ]
    if anchor_rates_R is not None:
        expected.append(("anchor_rates_R", anchor_rates_R, (torch.float32,)))
    for name, tensor, dtypes in expected:
        if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != rewards_R.device:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}: must be {shape}, one of {dtypes}, on "
                f"{rewards_R.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: must be contiguous")
