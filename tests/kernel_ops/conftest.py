"""Inputs of the head operations, and Triton kernels on CPU: the interpreter with the hardware's bfloat16."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from p2o_kernels.logprob import linear_logprob_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadCase:
    """Hidden states and an LM head whose last rows are padding of huge values: counting one would show."""

    hidden_TD: Tensor
    weight_VpD: Tensor
    targets_T: Tensor
    vocab_size: int
    temperature: float
    logprobs_T: Tensor
    """float64 truth."""
    entropy_T: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return fresh copies of hidden and weight that collect gradients."""
        dtype = self.hidden_TD.dtype if dtype is None else dtype
        hidden, weight = self.hidden_TD.to(dtype, copy=True), self.weight_VpD.to(dtype, copy=True)
        return hidden.requires_grad_(), weight.requires_grad_()


def _make_head_case(
    *,
    num_tokens: int = 37,
    vocab_size: int = 211,
    num_padding: int = 13,
    hidden_size: int = 24,
    temperature: float = 0.6,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 3.0,
    seed: int = 0,
) -> HeadCase:
    """Logits have a standard deviation of about `sharpness`; targets are drawn from the distribution."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(vocab_size + num_padding, hidden_size, generator=generator)
    weight = (weight * sharpness * temperature / hidden_size**0.5).to(dtype)
    weight[vocab_size:] = 1000.0
    logits = hidden.double() @ weight[:vocab_size].double().T / temperature
    targets = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    logprobs, entropy = linear_logprob_reference(
        hidden, weight, targets, temperature=temperature, vocab_size=vocab_size
    )
    return HeadCase(
        hidden_TD=hidden,
        weight_VpD=weight,
        targets_T=targets,
        vocab_size=vocab_size,
        temperature=temperature,
        logprobs_T=logprobs,
        entropy_T=entropy,
    )


@pytest.fixture(scope="session")
def head_case() -> Callable[..., HeadCase]:
    """Makes a `HeadCase` from keywords."""
    return _make_head_case


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Norm of the difference over the norm of the truth, in float64."""

    def compute(value: Tensor, truth: Tensor) -> float:
        return float((value.double() - truth.double()).norm() / truth.double().norm())

    return compute


@pytest.fixture(scope="session")
def interpreted_triton() -> Iterator[None]:
    """Import every module of kernels so that launches run in Triton's interpreter.

    A kernel is bound to the interpreter or the compiler when its module is imported, so the variable is set only here,
    and the processes that tests start do not inherit it. What an earlier test imported for the compiler is imported
    anew.
    """
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted")
    for name in [name for name in sys.modules if name.startswith("p2o_kernels.") and ".triton_" in name]:
        del sys.modules[name]
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import p2o_kernels.advantage.triton_kernels
        import p2o_kernels.lm_head.triton_kernels
        import p2o_kernels.policy_loss.triton_kernels
    finally:
        del os.environ["TRITON_INTERPRET"]
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    assert isinstance(p2o_kernels.lm_head.triton_kernels.exponentials_kernel, InterpretedFunction)
    changed = ("create_dot", "create_fp_trunc", "create_minnumf", "create_maxnumf")
    originals = {name: getattr(InterpreterBuilder, name) for name in changed}
    _fix_bfloat16(InterpreterBuilder)
    _drop_nan_like_the_hardware(InterpreterBuilder)
    # Triton's own library (tl.sum, tl.zeros) was bound to the compiler if triton was imported before.
    call_compiled = JITFunction.__call__
    JITFunction.__call__ = lambda self, *args, **kwargs: InterpretedFunction(self.fn)(*args, **kwargs)
    yield
    JITFunction.__call__ = call_compiled
    for name, original in originals.items():
        setattr(InterpreterBuilder, name, original)


def _drop_nan_like_the_hardware(builder: type) -> None:
    """Hopper's plain minimum and maximum return the operand that is not nan; the interpreter's return nan."""
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)


def _fix_bfloat16(builder: type) -> None:
    """The interpreter multiplies bfloat16 as 16-bit integers and truncates float32; Hopper rounds to nearest even."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    create_dot, create_fp_trunc = builder.create_dot, builder.create_fp_trunc

    def widened(handle: TensorHandle) -> np.ndarray:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar != tl.bfloat16:
            return create_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc)
        return TensorHandle(widened(a) @ widened(b) + accumulator.data, accumulator.dtype.scalar)

    def fp_trunc(self, source, target_type):
        if source.dtype.scalar != tl.float32 or target_type.scalar != tl.bfloat16:
            return create_fp_trunc(self, source, target_type)
        bits = np.ascontiguousarray(source.data, dtype=np.float32).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded)
        return TensorHandle(rounded.reshape(source.data.shape), target_type.scalar)

    builder.create_dot, builder.create_fp_trunc = dot, fp_trunc


@pytest.fixture
def bench(monkeypatch):
    """The folder of the benchmark as a package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "kernels"))
    import bench.advantage
    import bench.cases
    import bench.measure
    import bench.providers
    import bench.tables

    return bench
