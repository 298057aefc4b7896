"""Uninitialised memory that shows: what reads a tensor before writing it then computes NaN."""

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
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)
