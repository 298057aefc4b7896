"""Triton kernels on CPU: the interpreter, with bfloat16 made what the hardware does."""

import os
from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(scope="session")
def interpreted_triton() -> Iterator[None]:
    """Import every module of kernels so that launches run in Triton's interpreter.

    A kernel is bound to the interpreter or the compiler when its module is imported, so the variable is set only here,
    and the processes that tests start do not inherit it.
    """
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot be interpreted")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import p2o_kernels.advantage.triton_kernels
        import p2o_kernels.lm_head.triton_kernels
        import p2o_kernels.policy_loss.triton_kernels
    finally:
        del os.environ["TRITON_INTERPRET"]
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    kernel = p2o_kernels.lm_head.triton_kernels.exponentials_kernel
    assert isinstance(kernel, InterpretedFunction), "the kernels were imported before this fixture, for the compiler"
    originals = {name: getattr(InterpreterBuilder, name) for name in ("create_dot", "create_fp_trunc")}
    _fix_bfloat16(InterpreterBuilder)
    # Triton's own library (tl.sum, tl.zeros) was bound to the compiler if triton was imported before.
    call_compiled = JITFunction.__call__
    JITFunction.__call__ = lambda self, *args, **kwargs: InterpretedFunction(self.fn)(*args, **kwargs)
    yield
    JITFunction.__call__ = call_compiled
    for name, original in originals.items():
        setattr(InterpreterBuilder, name, original)


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
