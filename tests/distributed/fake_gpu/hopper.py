"""Has torch's CPU build and Triton answer as with one Hopper GPU, whose tensors are fake: nothing is computed.

Operations between devices or of wrong dtypes raise, as on a GPU. Triton launches are checked and left out: their
outputs are allocated before. Changes torch for good: for processes of their own.
"""

import atexit
import ctypes
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch._subclasses.fake_tensor as fake_tensor
from fake_gpu.waits import WAITS, caller
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "kernels"))
from bench import compile_sm90

CUDA = torch.device("cuda", 0)
LIBRARIES = Path(torch.__file__).parent / "lib"

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
"""A tensor's type as Triton writes it."""

LAUNCHES: Counter[str] = Counter()
"""Kernel's name to how often it was launched."""


class Stream:
    """The only stream."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def synchronize(self) -> None:
        WAITS["synchronize", caller()] += 1

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, other: object) -> None: ...

    def record_event(self, event: object = None) -> None: ...


class FloatTensor:
    """torch's own names are types, for which Megatron asks as well."""

    dtype = torch.float32

    def __new__(cls, values: Any) -> Any:
        WAITS["from host", caller()] += 1
        return torch.empty(len(values), dtype=cls.dtype, device=CUDA)


class IntTensor(FloatTensor):
    dtype = torch.int32


def pretend_hopper() -> None:
    """Have torch and Triton answer as with one GPU; no operation reaches a device."""
    from triton.runtime.jit import JITFunction

    install_guard()
    install_hooks()
    torch._C._set_only_lift_cpu_tensors(True)
    JITFunction.run = launch
    FakeTensor.data_ptr = lambda self: 4096
    FakeTensor.numpy = lambda self: np.zeros(tuple(self.shape), np.float32)  # of a copy on the host
    fake_tensor.init_gpu_context = lambda device: None
    torch.nn.Module.bfloat16 = lambda self: self  # the parameters are; fake ones cannot be swapped
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, major=9, minor=0, name="fake")
    state = torch.zeros(16, dtype=torch.uint8)
    generator = SimpleNamespace(set_state=lambda state: None, get_state=lambda: state)
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: Stream(),
        "synchronize": lambda device=None: Stream().synchronize(),
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda state, device="cuda": None,
        "default_generators": (generator,),
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "FloatTensor": FloatTensor,
        "IntTensor": IntTensor,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = answers["get_rng_state"]


def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of a Triton launch: of a variant that `compile_sm90` compiles, and with tensors of its types."""
    given = dict(zip(self.arg_names, args, strict=False)) | kwargs
    for name, value in given.items():
        if isinstance(value, Tensor):
            assert isinstance(value, FakeTensor) and value.device == CUDA, (self, name)
            assert TYPES[value.dtype] == compile_sm90.type_of(name), (self, name, value.dtype)
    settings = {name: value for name, value in given.items() if name.isupper() or name in ("num_warps", "num_stages")}
    variants = [{**constants, **options} for _, kernel, constants, options in compile_sm90.variants() if kernel is self]
    assert settings in variants, f"kernels/bench/compile_sm90.py does not compile {self.fn.__name__} with {settings}"
    LAUNCHES[self.fn.__name__] += 1


def install_guard() -> None:
    """Give torch's CPU build a device guard for CUDA that does nothing.

    torch puts its own in the place of one that counts no devices; where CUDA is not built in there is none to replace.
    """
    library = ctypes.CDLL(str(LIBRARIES / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    count = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda self: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(count, ctypes.c_void_p).value] * 64)
    without_devices = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    if guards[1] is None:
        guards[1] = ctypes.addressof(without_devices)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[1] != ctypes.addressof(without_devices)


def install_hooks() -> None:
    """Have torch's C++ say that CUDA is there: autograd's engine asks it for the accelerator of a gradient.

    In a copy of the virtual functions of what torch asks about CUDA, the first after the two destructors answer yes:
    whether it is built in, whether it is available, and whether a device has its context.
    """
    library = ctypes.CDLL(str(LIBRARIES / "libtorch_cpu.so"))
    ask = library._ZN2at6detail12getCUDAHooksEv
    ask.restype = ctypes.c_void_p
    functions = ctypes.c_void_p.from_address(ask())
    original = functions.value
    assert original is not None
    first, size = original - 2 * ctypes.sizeof(ctypes.c_void_p), 50  # with the two words before it
    table = (ctypes.c_void_p * size)(*(ctypes.c_void_p * size).from_address(first))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda self: True)
    for number in (2, 3, 4):
        table[2 + number] = ctypes.cast(yes, ctypes.c_void_p).value
    functions.value = ctypes.addressof(table) + 2 * ctypes.sizeof(ctypes.c_void_p)
    atexit.register(lambda kept=(table, yes): setattr(functions, "value", original))
    assert torch.accelerator.current_accelerator() == torch.device("cuda"), "torch's functions are in another order"
