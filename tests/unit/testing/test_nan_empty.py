"""The aid that makes reads of uninitialised memory visible."""

import pytest
import torch

from megatron_p2o.testing.nan_empty import nan_filled_empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_uninitialised_floats_are_nan_however_they_are_made(dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, dtype=dtype)
    with nan_filled_empty():
        made = [torch.empty(3, dtype=dtype), torch.empty_like(zeros), zeros.new_empty(3), torch.zeros(0).resize_(3)]
    assert all(tensor.isnan().all() for tensor in made)


def test_the_former_mode_is_back_after_an_error() -> None:
    before = torch.get_deterministic_debug_mode()
    with pytest.raises(KeyError), nan_filled_empty():
        raise KeyError("inside")
    assert torch.get_deterministic_debug_mode() == before


def test_the_fixture_lasts_for_the_test(nan_empty: None) -> None:
    assert torch.empty(4).isnan().all()
