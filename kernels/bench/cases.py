"""Inputs of the benchmarks: shapes of real LM heads, hidden states like a trained policy's, dead rollouts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from p2o_kernels.lm_head.path import LmHeadPath

ROLLOUT_TOKENS = 512
"""Tokens of one rollout; rollouts are dead as a whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """An LM head."""

    hidden_size: int
    vocab_size: int


SHAPES = {
    "qwen3-4b": Shape(hidden_size=2560, vocab_size=151936),
    "qwen3-4b-tp8": Shape(hidden_size=2560, vocab_size=18992),
    "qwen3-8b": Shape(hidden_size=4096, vocab_size=151936),
    "cpu": Shape(hidden_size=512, vocab_size=32768),
    "tiny": Shape(hidden_size=64, vocab_size=1000),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One step's policy loss at ratio 1: loss = -sum(advantage * log-prob) / T over the live rows."""

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    advantages_T: Tensor
    """One value per rollout of `ROLLOUT_TOKENS` rows; 0 for dead ones, 1 where the case is for cross-entropy peers."""
    main_grad_VD: Tensor | None
    """float32, zero: what a trainer accumulates into. None: the weight gradient is returned."""
    path: LmHeadPath | None = None
    """Settings of our own operation; None: chosen by device."""

    @property
    def is_live_T(self) -> Tensor:
        return self.advantages_T != 0

    @property
    def rollout_tokens(self) -> int:
        return min(ROLLOUT_TOKENS, len(self.targets_T))


def make_case(
    shape: Shape, num_tokens: int, dead_share: float, device: torch.device, *, with_main_grad: bool, seed: int = 0
) -> Case:
    """Draw inputs whose targets range from uncertain to certain (about one nat of entropy); bfloat16 on CUDA."""
    if num_tokens % min(ROLLOUT_TOKENS, num_tokens):
        raise ValueError(f"--tokens {num_tokens}: must be below or a multiple of {ROLLOUT_TOKENS}")
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = (normal(shape.vocab_size, shape.hidden_size) / shape.hidden_size**0.5).to(dtype)
    targets = torch.randint(0, shape.vocab_size, (num_tokens,), generator=generator, device=device)
    # Noise of 2.5 spreads the other logits so that they sum to log V + 3.1; targets lie from 2 below to 12 above.
    confidence = torch.rand(num_tokens, 1, generator=generator, device=device) * 14 - 2
    confidence += torch.log(torch.tensor(float(shape.vocab_size))) + 3.1
    hidden = (weight[targets].float() * confidence + 2.5 * normal(num_tokens, shape.hidden_size)).to(dtype)
    rollouts = num_tokens // min(ROLLOUT_TOKENS, num_tokens)
    advantages = normal(rollouts)
    order = torch.randperm(rollouts, generator=generator, device=device)
    advantages[order[: round(dead_share * rollouts)]] = 0
    return Case(
        hidden_TD=hidden.requires_grad_(),
        weight_VD=weight.requires_grad_(),
        targets_T=targets,
        advantages_T=advantages.repeat_interleave(num_tokens // rollouts),
        main_grad_VD=torch.zeros_like(weight, dtype=torch.float32) if with_main_grad else None,
    )
