"""Fills uninitialised memory with NaN, so that reading a tensor before writing it shows."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Fill every uninitialised tensor made inside with NaN (floating point), the largest value (integers) or True.

    Uses torch's own fill (`torch.utils.deterministic`), so it also reaches `empty_like`, `new_empty` and buffers made
    inside operators. Process-wide while it lasts: deterministic algorithms are preferred too, and a warning says where
    there is none.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
