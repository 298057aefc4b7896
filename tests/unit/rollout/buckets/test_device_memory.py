"""Checksums of tensors, and what the driver of a GPU refuses."""

from enum import IntEnum

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.rollout.buckets.device_memory import BLOCK_WORDS, checksum, driver_values


def test_what_the_driver_refuses_is_told_by_its_name_and_with_a_remedy() -> None:
    # As NVIDIA's binding numbers them, whose text is the number only.
    code = IntEnum("CUresult", {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": 2})
    assert driver_values("cuMemAlloc", (code(0), 7)) == 7
    with pytest.raises(RuntimeError, match=r"cuMemAlloc: .*CUDA_ERROR_OUT_OF_MEMORY.*rollout\.weight_transfer=host"):
        driver_values("cuMemAlloc", (code(2), 0))


@given(
    count=st.integers(1, 40),
    position=st.integers(0, 10**6),
    bit=st.integers(0, 7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
)
def test_a_checksum_notices_every_flipped_bit(count: int, position: int, bit: int, dtype: torch.dtype) -> None:
    values = torch.arange(count).to(dtype)
    changed = values.clone()
    changed.view(torch.uint8)[position % changed.nbytes] ^= 1 << bit
    assert checksum(changed) != checksum(values)


def test_a_checksum_depends_on_order_and_length_but_not_on_strides() -> None:
    values = torch.randn(6, 4)
    assert checksum(values) == checksum(values.t().contiguous().t())
    assert checksum(values) != checksum(values.flip(0))
    assert checksum(values) != checksum(values.t())
    assert checksum(torch.zeros(3)) != checksum(torch.zeros(4))
    assert checksum(values[1:]) == checksum(values[1:].clone()), "rows that do not start at a 64-bit boundary"


def test_a_checksum_covers_tensors_of_several_blocks() -> None:
    values = torch.zeros(2 * BLOCK_WORDS + 3, dtype=torch.int64)
    plain = checksum(values)
    for index in (0, BLOCK_WORDS - 1, BLOCK_WORDS, 2 * BLOCK_WORDS + 2):
        changed = values.clone()
        changed[index] = 1
        assert checksum(changed) != plain
    swapped = values.clone()
    swapped[0], values[BLOCK_WORDS] = 1, 1
    assert checksum(swapped) != checksum(values)
