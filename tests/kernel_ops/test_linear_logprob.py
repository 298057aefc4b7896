"""`linear_logprob` in torch against float64 autograd on full logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from p2o_kernels import linear_logprob
from p2o_kernels.lm_head.torch_path import TorchHead
from p2o_kernels.logprob import linear_logprob_reference

KEEPING = TorchHead()
RECOMPUTING = TorchHead(chunk_bytes=16 * 4 * 224, save_bytes=0)
"""Chunks of 16 tokens of the default case, each computed again in backward."""


def both_gradients(case, path=None, dtype=None):
    """Return (logprobs, entropy, dH, dW) for random gradients, a third of them zero."""
    hidden, weight = case.leaves(dtype)
    logprobs, entropy = linear_logprob(
        hidden, weight, case.targets_T, temperature=case.temperature, vocab_size=case.vocab_size, path=path
    )
    logprobs.backward(random_gradient(len(logprobs)).to(logprobs.dtype))
    return logprobs.detach(), entropy, hidden.grad, weight.grad


def true_gradients(case):
    hidden, weight = case.leaves(torch.float64)
    logprobs, _ = linear_logprob_reference(
        hidden, weight, case.targets_T, temperature=case.temperature, vocab_size=case.vocab_size
    )
    logprobs.backward(random_gradient(len(logprobs)))
    return hidden.grad, weight.grad


def random_gradient(num_tokens):
    gradient = torch.randn(num_tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    gradient[1::3] = 0
    return gradient


@pytest.mark.parametrize("path", [KEEPING, RECOMPUTING], ids=["keeping", "recomputing"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"temperature": 1.0, "num_padding": 0},
        {"num_tokens": 1},
        {"vocab_size": 4099, "num_padding": 61, "num_tokens": 19},
        {"vocab_size": 2, "num_padding": 0},
    ],
    ids=["odd", "plain", "one row", "prime vocabulary", "two tokens"],
)
def test_values_and_gradients_equal_float64_autograd(shape, path, head_case, relative_error, nan_empty):
    case = head_case(**shape)
    logprobs, entropy, hidden_grad, weight_grad = both_gradients(case, path)
    hidden_truth, weight_truth = true_gradients(case)
    # float32 products of logits of size 10 round at 1e-6.
    torch.testing.assert_close(logprobs.double(), case.logprobs_T, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), case.entropy_T, atol=5e-6, rtol=1e-6)
    assert relative_error(hidden_grad, hidden_truth) < 2e-6
    assert relative_error(weight_grad, weight_truth) < 2e-6
    assert not entropy.requires_grad


def test_float64_inputs_are_computed_in_float64(head_case):
    case = head_case(num_tokens=5, vocab_size=17, num_padding=2, hidden_size=4, dtype=torch.float64)

    def logprobs(hidden, weight, path):
        return linear_logprob(
            hidden, weight, case.targets_T, temperature=case.temperature, vocab_size=case.vocab_size, path=path
        )[0]

    for path in (KEEPING, RECOMPUTING):
        assert torch.autograd.gradcheck(lambda hidden, weight, path=path: logprobs(hidden, weight, path), case.leaves())


def test_bfloat16_inputs_lose_nothing_but_the_rounding_of_the_gradients(head_case, relative_error):
    case = head_case(dtype=torch.bfloat16, num_tokens=64, vocab_size=1000, hidden_size=64)
    logprobs, entropy, hidden_grad, weight_grad = both_gradients(case, RECOMPUTING)
    hidden_truth, weight_truth = true_gradients(case)
    assert (logprobs - case.logprobs_T).abs().max() < 1e-5
    assert (entropy - case.entropy_T).abs().max() < 1e-5
    # One rounding to bfloat16: half a unit in the last place is 2^-9, its root mean square about 1.7e-3.
    assert relative_error(hidden_grad, hidden_truth) < 2.0e-3
    assert relative_error(weight_grad, weight_truth) < 2.0e-3
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16


def test_padding_is_never_counted_and_gets_no_gradient(head_case):
    case = head_case()
    *_, weight_grad = both_gradients(case)
    assert (weight_grad[case.vocab_size :] == 0).all()
    with pytest.raises(ValueError, match=r"targets_T spans \[0, 211\]: must lie in \[0, 211\)"):
        targets = torch.tensor([0, case.vocab_size])
        linear_logprob(case.hidden_TD[:2], case.weight_VpD, targets, vocab_size=case.vocab_size)


@pytest.mark.parametrize("path", [KEEPING, RECOMPUTING], ids=["keeping", "recomputing"])
def test_extreme_logits_stay_exact(path):
    # Row t has logits 100 - gap for the target and 100 for one other token; the rest are 0 and -100.
    gaps = torch.tensor([0.0, 1e-3, 1.0, 10.0, 50.0, 100.0, 150.0, 200.0, -10.0, -50.0, -100.0], dtype=torch.float64)
    hidden = torch.stack([torch.full_like(gaps, 100.0), 100.0 - gaps, torch.full_like(gaps, -100.0)], 1).float()
    weight = torch.zeros(6, 3)
    weight[0, 0] = weight[1, 1] = weight[2, 2] = 1.0
    targets = torch.ones(len(gaps), dtype=torch.int64)
    logits = torch.cat([hidden.double(), torch.zeros(len(gaps), 3, dtype=torch.float64)], 1)
    odds = (logits - logits[:, 1:2]).exp()
    odds[:, 1] = 0
    # d log p_1 / d z_v: -p_v, and 1 - p_1 for the target; hidden is the logits, weight the unit matrix.
    logit_grad = -odds / (1 + odds.sum(1, keepdim=True))
    logit_grad[:, 1] = -logit_grad.sum(1)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, _ = linear_logprob(hidden, weight, targets, path=path)
    logprobs.sum().backward()
    # Relative, down to -200 nats and up to -1e-44: a certain token's log-prob does not cancel to 0.
    torch.testing.assert_close(logprobs.double(), -torch.log1p(odds.sum(1)), rtol=1e-6, atol=1e-43)
    torch.testing.assert_close(hidden.grad.double(), logit_grad[:, :3], rtol=1e-6, atol=1e-43)
    torch.testing.assert_close(weight.grad.double(), logit_grad.T @ hidden.detach().double(), rtol=1e-5, atol=1e-4)


def test_the_chunk_size_changes_only_the_rounding(head_case, relative_error):
    case = head_case(num_tokens=203)
    whole = both_gradients(case, KEEPING)
    for chunk_rows in (16, 50, 202):
        parts = both_gradients(case, TorchHead(chunk_bytes=chunk_rows * 4 * len(case.weight_VpD), save_bytes=0))
        for value, other in zip(whole, parts, strict=True):
            assert relative_error(other, value) < 1e-6


def test_no_tokens_give_empty_results_and_zero_gradients(head_case):
    case = head_case(num_tokens=1)
    hidden, weight = case.leaves()
    for path in (KEEPING, RECOMPUTING):
        logprobs, entropy = linear_logprob(hidden[:0], weight, case.targets_T[:0], path=path)
        logprobs.sum().backward()
        assert logprobs.shape == entropy.shape == (0,)
    assert (weight.grad == 0).all()


def test_only_the_weight_that_wants_a_gradient_gets_one(head_case):
    case = head_case()
    hidden, weight = case.leaves()
    linear_logprob(hidden, weight.detach(), case.targets_T, vocab_size=case.vocab_size)[0].sum().backward()
    linear_logprob(hidden.detach(), weight, case.targets_T, vocab_size=case.vocab_size)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert not linear_logprob(hidden.detach(), weight.detach(), case.targets_T)[0].requires_grad


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_no_tensor_is_as_large_as_the_logits(head_case):
    case = head_case(num_tokens=640)
    with LargestTensor() as largest:
        both_gradients(case, RECOMPUTING)
    chunk, inputs = 16 * case.vocab_size, case.hidden_TD.numel()
    assert largest.num_elements <= max(chunk, inputs)
    with LargestTensor() as largest, torch.no_grad():
        linear_logprob(*case.leaves(), case.targets_T, path=TorchHead(chunk_bytes=RECOMPUTING.chunk_bytes))
    assert largest.num_elements <= max(16 * len(case.weight_VpD), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TD": torch.zeros(4, 3)}, r"must be \[T, D\] and \[Vp, D\]"),
        ({"weight_VpD": torch.zeros(7, 2, dtype=torch.bfloat16)}, "must be one of"),
        ({"targets_T": torch.zeros(3, dtype=torch.int64)}, r"must be int64 or int32 \[4\]"),
        ({"targets_T": torch.zeros(4)}, "must be int64 or int32"),
        ({"targets_T": torch.full((4,), -1)}, r"must lie in \[0, 7\)"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
    ],
)
def test_misfits_are_named(change, message):
    arguments = {
        "hidden_TD": torch.zeros(4, 2),
        "weight_VpD": torch.zeros(7, 2),
        "targets_T": torch.zeros(4, dtype=torch.int64),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)
