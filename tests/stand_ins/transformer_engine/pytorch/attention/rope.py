"""The rotary embedding, as far as Megatron calls it."""

import torch
from torch import Tensor


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, *, tensor_format: str, fused: bool, interleaved: bool = False
) -> Tensor:
    assert tensor_format == "sbhd" and fused and not interleaved
    assert freqs.dtype == torch.float32 and freqs.shape == (len(t), 1, 1, t.shape[-1])
    first, second = t.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (t * freqs.cos() + rotated * freqs.sin()).to(t.dtype)
