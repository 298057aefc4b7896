"""Time of `grouped_advantage` beside the same in torch operations."""

import statistics
from functools import partial
from typing import Any

import torch
from bench.measure import time_interleaved

from p2o_kernels import grouped_advantage
from p2o_kernels.advantage.reference import group_advantages_reference

GROUP_SIZE = 8


def bench_grouped_advantage(rollout_counts: list[int], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Return one row per number of rollouts and implementation; each must equal the scalar specification first."""
    rows: list[dict[str, Any]] = []
    implementations = ("torch", "triton") if device.type == "cuda" else ("torch",)
    for num_rollouts in rollout_counts:
        arguments = _inputs(num_rollouts, device)
        calls = [partial(_run, arguments, implementation) for implementation in implementations]
        errors = [_largest_error(call(), arguments) for call in calls]
        if not all(error <= 1e-5 for error in errors):
            raise RuntimeError(f"advantages are off by {errors} for {implementations}: not timed")
        for name, error, samples in zip(implementations, errors, time_interleaved(calls, repeats, device), strict=True):
            median_us = 1e3 * statistics.median(samples)
            rows.append({"provider": name, "rollouts": num_rollouts, "median_us": median_us, "max_error": error})
    return rows


def _inputs(num_rollouts: int, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    rewards = torch.rand(num_rollouts, generator=generator, device=device) < 0.4
    return {
        "rewards_R": rewards.float(),
        "group_ids_R": torch.arange(num_rollouts, device=device) // GROUP_SIZE,
        "is_valid_R": torch.ones(num_rollouts, dtype=torch.bool, device=device),
    }


def _run(arguments: dict[str, Any], implementation: Any) -> torch.Tensor:
    return grouped_advantage(**arguments, estimator="grpo", implementation=implementation)


def _largest_error(advantages_R: torch.Tensor, arguments: dict[str, Any]) -> float:
    truth: list[float] = []
    for group in arguments["rewards_R"].cpu().split(GROUP_SIZE):
        truth += group_advantages_reference(group.tolist(), [True] * len(group), "grpo")
    return float((advantages_R.cpu() - torch.tensor(truth)).abs().max())
