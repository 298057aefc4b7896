"""Runs megatron-core without CUDA: replaces, in this one place, what it uses of `torch.cuda`.

megatron-core writes `device="cuda"`, compares tensor type names with "torch.cuda.FloatTensor" and asks `torch.cuda` for
the current device, streams and the random state. On a machine without CUDA these are answered with the CPU; with CUDA
nothing here has any effect.
"""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_thread = threading.local()


@contextmanager
def cuda_stand_ins() -> Iterator[None]:
    """Answer megatron-core's CUDA calls with the CPU inside the block; does nothing when CUDA is present.

    Re-entrant, and valid for the calling thread: megatron-core must be called inside this block on every thread.
    """
    if torch.cuda.is_available() or getattr(_thread, "is_inside", False):
        yield
        return
    _replace_functions()
    _thread.is_inside = True
    try:
        with _CpuForCuda():
            yield
    finally:
        _thread.is_inside = False


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import megatron-core inside the block: without CUDA, what it decorates with `torch.compile` stays as it is.

    The decorators import TorchInductor: 2.5 of 7 seconds of processor time and 68 MiB in each rank. What they decorate
    are fusions; without CUDA they run as they are written.
    """
    if torch.cuda.is_available():
        yield
        return
    compiler = torch.compile
    torch.compile = _left_as_it_is  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.compile = compiler


def _left_as_it_is(function: Any = None, **options: Any) -> Any:
    return _left_as_it_is if function is None else function


class _CpuForCuda(TorchFunctionMode):
    """Turns the device "cuda" into the CPU, and names CPU tensor types as CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and _is_cuda(device):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _OnlyStream:
    """The order in which the CPU computes, as the stream and as its events: there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record_event(self, event: object = None) -> "_OnlyStream":
        return self

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...


def _is_cuda(device: object) -> bool:
    return device.startswith("cuda") if isinstance(device, str) else getattr(device, "type", None) == "cuda"


def _replace_functions() -> None:
    """Replace module-level functions once per process; on a machine without CUDA they could only raise."""
    if getattr(torch.cuda.current_device, "is_stand_in", False):
        return
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    cpu, stream = torch.device("cpu"), _OnlyStream()

    def current_device() -> torch.device:
        return cpu

    current_device.is_stand_in = True  # pyright: ignore[reportFunctionMemberAccess]
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", current_device),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "Stream", _OnlyStream),  # a class: annotations elsewhere say `torch.cuda.Stream | None`
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "stream", contextlib.nullcontext),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, device=None: torch.set_rng_state(state)),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (
            tensor_parallel_random,
            "_get_cuda_rng_state",
            lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state(),
        ),
        (
            tensor_parallel_random,
            "_set_cuda_rng_state",
            lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        ),
    ]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
