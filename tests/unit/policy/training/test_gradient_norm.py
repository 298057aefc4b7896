"""The norm of the gradients where neither Transformer Engine nor Apex takes it."""

import torch
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.training.optimizer import _norm


def test_the_norm_equals_megatrons_and_that_of_all_elements() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7,), (1,), (64, 64))]
    norm, _ = _norm(0, torch.zeros(1), [gradients], False)
    with cuda_stand_ins():
        theirs, _ = local_multi_tensor_l2_norm(0, torch.zeros(1), [gradients], False)
    whole = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    assert norm.shape == theirs.shape == (1,) and norm.dtype == torch.float32
    # Two sums of the same float32 squares in another order.
    torch.testing.assert_close(norm, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.double(), whole[None], rtol=1e-6, atol=0)


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    for value in (float("nan"), float("inf")):
        norm, _ = _norm(0, torch.zeros(1), [[torch.ones(3), torch.tensor([1.0, value])]], False)
        assert not norm.isfinite()
