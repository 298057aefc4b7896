"""Which kernel computes attention over a pack, decided by what the machine has, and said."""

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

AttentionKernel = Literal["flash_attn", "torch_varlen", "sdpa"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionChoice:
    """A kernel and why it is the one."""

    kernel: AttentionKernel
    reason: str


def choose_attention(*, has_cuda: bool, has_flash_attn: bool, has_transformer_engine: bool) -> AttentionChoice:
    """Return the kernel of the trainer's own attention module; pure, so that every machine's choice can be tested."""
    unused = "; Transformer Engine is installed, but its layers are not used" if has_transformer_engine else ""
    if not has_cuda:
        return AttentionChoice(
            kernel="sdpa", reason=f"torch scaled_dot_product_attention per packed segment: no CUDA{unused}"
        )
    if has_flash_attn:
        return AttentionChoice(kernel="flash_attn", reason=f"flash-attn, variable length{unused}")
    return AttentionChoice(
        kernel="torch_varlen", reason=f"torch variable-length attention: flash-attn is not installed{unused}"
    )


def attention_choice() -> AttentionChoice:
    """Return the choice for this machine."""
    return choose_attention(
        has_cuda=torch.cuda.is_available(),
        has_flash_attn=importlib.util.find_spec("flash_attn") is not None,
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
    )
