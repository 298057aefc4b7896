"""What every test shares: one thread, reproducible property tests, memory that is never silently zero."""

import os
from collections.abc import Iterator

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and inherited by the processes that tests start

import pytest
import torch
from hypothesis import settings

from megatron_p2o.testing.nan_empty import nan_filled_empty

torch.set_num_threads(1)
settings.register_profile("reproducible", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("reproducible")


@pytest.fixture
def nan_empty() -> Iterator[None]:
    """Uninitialised tensors are NaN for the length of the test."""
    with nan_filled_empty():
        yield
