"""Position-sensitive 64-bit checksums of tensors, computed where the tensor lies.

Trainer and engine run this same code on their own copies of a weight and compare the numbers.
"""

from functools import lru_cache

import torch
from torch import Tensor

BLOCK_WORDS = 1 << 20
"""64-bit words per pass: bounds the temporary memory to three times 8 MiB."""

MODULUS = 1 << 64
BLOCK_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so multiplying by it modulo 2**64 loses nothing."""


@torch.no_grad()
def checksum(tensor: Tensor) -> int:
    """Return a number in [0, 2**64) that depends on every bit of the elements and on their order, not on strides.

    Each 64-bit word is multiplied by an odd factor of its position, so that any change within one word changes the sum
    for certain, and other changes (swapped rows, swapped tensors of one shape) go unseen with probability about 2**-63.
    """
    flat_bytes = tensor.detach().contiguous().flatten().view(torch.uint8)
    num_words = flat_bytes.numel() // 8
    words = flat_bytes[: num_words * 8]
    if words.storage_offset() % 8:
        words = words.clone()
    tail = int.from_bytes(bytes(flat_bytes[num_words * 8 :].tolist()), "little")
    total = flat_bytes.numel() * BLOCK_FACTOR + tail
    for block in words.view(torch.int64).split(BLOCK_WORDS):
        factors = position_factors(block.device)[: block.numel()]
        total = (total * BLOCK_FACTOR + int((block * factors).sum())) % MODULUS
    return total


@lru_cache(maxsize=8)
def position_factors(device: torch.device) -> Tensor:
    """Return [BLOCK_WORDS] odd int64 factors; products wrap modulo 2**64."""
    positions = torch.arange(1, BLOCK_WORDS + 1, dtype=torch.int64, device=device)
    mixed = positions * (BLOCK_FACTOR - MODULUS)
    return (mixed ^ (mixed >> 29)) | 1
