"""An update's forward pass and one for log-probs on fake CUDA tensors with torch's CPU build: prints the waits as JSON.

    python fake_gpu_pass.py MODEL_DIRECTORY [--recompute] [--sharded]

Every tensor of the pass is fake and on cuda:0, so that an operation between devices or of wrong dtypes raises. Triton
launches are checked and left out: their outputs are allocated before. Not reached: autograd's engine, which asks a CPU
build for its accelerator, and the optimizer's step; the head's gradients are computed in its forward pass. A process of
its own, because it changes `torch.cuda` for good.
"""

import argparse
import contextlib
import ctypes
import json
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
ROOTS = ("/megatron_p2o/", "/p2o_kernels/", "/megatron/core/")
ATEN = torch.ops.aten


class Stream:
    """The only stream."""

    cuda_stream = 0

    def synchronize(self) -> None:
        WAITS[("stream.synchronize", caller())] += 1

    def wait_stream(self, other: object) -> None: ...


WAITS: Counter[tuple[str, str]] = Counter()
"""(operation, "file:function" of the innermost line of ours or Megatron's) to how often."""

LAUNCHES: Counter[str] = Counter()


def caller() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for root in ROOTS:
            if root in path:
                return f"{path.partition(root)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class Device(TorchDispatchMode):
    """Stands in for what a fake tensor cannot answer, and notes where the host waits for the device."""

    def __init__(self, num_masked: int) -> None:
        super().__init__()
        self.num_masked = num_masked
        """True values of every mask: response tokens, all of them with an advantage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        is_here = isinstance(first, FakeTensor) and first.device.type == "cuda"
        if func is ATEN._local_scalar_dense.default and is_here:
            WAITS["item", caller()] += 1
            return 1.0 if first.is_floating_point() else self.num_masked
        if func is ATEN.nonzero.default and is_here:
            WAITS["nonzero", caller()] += 1
            return torch.empty(self.num_masked, first.dim(), dtype=torch.int64, device=CUDA)
        if func is ATEN.index.Tensor and is_here and any(i is not None and i.dtype == torch.bool for i in args[1]):
            WAITS["mask", caller()] += 1
            return torch.empty(self.num_masked, *first.shape[1:], dtype=first.dtype, device=CUDA)
        if func is ATEN.mm.dtype and is_here:
            return first.new_empty(first.shape[0], args[1].shape[1], dtype=args[2])
        if func is ATEN.addmm.dtype_out and is_here:
            left, right, out = args[1], args[2], kwargs["out"]
            assert out is first and out.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
            assert left.dtype == right.dtype == torch.bfloat16 and out.dtype == torch.float32
            return out
        result = func(*args, **kwargs)
        if is_here and isinstance(result, Tensor) and result.device.type == "cpu":
            WAITS["to cpu", caller()] += 1
        return result


class FromHost(TorchFunctionMode):
    """Makes tensors on the device without the driver: a number is not taken for one, values come by way of the host."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        if func is torch.tensor:
            device = kwargs.pop("device", None)
            here = func(of_host(args[0]), *args[1:], **kwargs)
            if device is None or torch.device(device).type == "cpu":
                return here
            return torch.empty(here.shape, dtype=here.dtype, device=device)
        return func(*args, **kwargs)


def of_host(values: Any) -> Any:
    """Return nested lists with numbers for tensors of the device: each is fetched."""
    if isinstance(values, (list, tuple)):
        return [of_host(value) for value in values]
    return values.item() if isinstance(values, FakeTensor) else values


def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of a Triton launch."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    assert tensors and all(isinstance(tensor, FakeTensor) and tensor.device == CUDA for tensor in tensors), self
    LAUNCHES[self.fn.__name__] += 1


class FloatTensor:
    """torch's own names are types, for which Megatron asks as well."""

    dtype = torch.float32

    def __new__(cls, values: Any) -> Any:
        return torch.empty(len(values), dtype=cls.dtype, device=CUDA)


class IntTensor(FloatTensor):
    dtype = torch.int32


def install_guard() -> None:
    """Give torch's CPU build a device guard for CUDA that does nothing.

    torch puts its own in the place of one that counts no devices; where CUDA is not built in there is none to replace.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    count = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda self: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(count, ctypes.c_void_p).value] * 64)
    without_devices = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    if guards[1] is None:
        guards[1] = ctypes.addressof(without_devices)
    torch._C._ensureCUDADeviceGuardSet()
    assert guards[1] != ctypes.addressof(without_devices)


def pretend_hopper() -> None:
    """Have torch and Triton answer as with one GPU; no operation reaches a device."""
    from triton.runtime.jit import JITFunction

    install_guard()
    torch._C._set_only_lift_cpu_tensors(True)
    JITFunction.run = launch
    FakeTensor.data_ptr = lambda self: 4096
    FakeTensor.numpy = lambda self: np.zeros(tuple(self.shape), np.float32)  # of a copy on the host
    fake_tensor.init_gpu_context = lambda device: None
    torch.nn.Module.bfloat16 = lambda self: self  # the parameters are; fake ones cannot be swapped
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, major=9, minor=0, name="fake")
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "current_stream": lambda device=None: Stream(),
        "synchronize": lambda device=None: Stream().synchronize(),
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda state, device="cuda": None,
        "FloatTensor": FloatTensor,
        "IntTensor": IntTensor,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)


def stand_alone() -> None:
    """One rank whose collectives do nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random

    parallel_state.initialize_model_parallel()
    random.initialize_rng_tracker()
    random.get_cuda_rng_tracker().fork = lambda *args, **kwargs: contextlib.nullcontext()
    random._set_cuda_rng_state = lambda *args, **kwargs: None
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.zeros(16, dtype=torch.uint8)
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier"):
        setattr(dist, name, lambda *args, **kwargs: None)
    dist.all_gather_object = lambda out, value, group=None: out.__setitem__(0, value)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, lambda *args, **kwargs: None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    arguments = parser.parse_args()
    pretend_hopper()
    stand_alone()
    print(json.dumps(run(arguments.model, arguments.recompute, arguments.sharded)))


def run(path: Path, recomputes: bool, is_sharded: bool) -> dict[str, Any]:
    """Run the update's forward pass and one for log-probs; return the waits of each and the Triton launches."""
    from megatron_p2o.config.tree import ObjectiveConfig, OptimizerConfig, ParallelConfig
    from megatron_p2o.policy.model.architecture import read_architecture
    from megatron_p2o.policy.model.head import HeadInput
    from megatron_p2o.policy.model.model import build_models, transformer_config
    from megatron_p2o.policy.training.forward import _run_model, response_logprobs
    from megatron_p2o.policy.training.optimizer import Optimization
    from megatron_p2o.rl.objective import loss_rule, token_stats
    from p2o_kernels import PolicyLoss

    architecture = read_architecture(path)
    options = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    settings = transformer_config(architecture, ParallelConfig(), "bfloat16", options if recomputes else {})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FromHost():
        num_masked, micro_batch = packed(mode)
        models = build_models(architecture, settings, 1.0, "local")
        optimization = Optimization(models, settings, OptimizerConfig(lr=1e-3), is_sharded=is_sharded)
        report: dict[str, Any] = {"waits": {}}
        with Device(num_masked):
            optimization.clear_gradients()
            head_input = HeadInput(batch=micro_batch.part, rule=loss_rule(ObjectiveConfig()), adds_to_main_grad=True)
            outcome = PolicyLoss(*_run_model(optimization.modules[0], micro_batch, head_input))
            stats = token_stats(micro_batch.part, outcome)
            report["waits"]["forward"] = taken()
            gradients = [parameter.main_grad for parameter in models[0].parameters()]
            assert all(gradient.device == CUDA and gradient.dtype == torch.float32 for gradient in gradients)
            assert {outcome.loss.device, outcome.logprobs_T.device} == {CUDA}
            assert {getattr(stats, field.name).device for field in fields(stats)} == {CUDA}
            assert outcome.loss.requires_grad and outcome.loss.dtype == outcome.logprobs_T.dtype == torch.float32
            report["launches"] = dict(LAUNCHES)
            LAUNCHES.clear()
            report["samples"] = sorted(response_logprobs(optimization.modules, [micro_batch]))
            report["waits"]["logprobs"] = taken()
            report["logprobs_launches"] = dict(LAUNCHES)
    return report


def packed(mode: FakeTensorMode) -> tuple[int, Any]:
    """Return the response tokens of a pack, and the pack on the device; packed before there is work."""
    from megatron_p2o.policy.model.attention import PackLayout, sample_positions
    from megatron_p2o.policy.training.forward import MicroBatch
    from megatron_p2o.rl.packing import pack
    from megatron_p2o.testing.policy_oracle import random_samples

    samples = random_samples((30, 170, 1, 200, 90), vocab_size=1000)
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        batch = pack(samples, None, torch.device("cpu"))
        positions, boundaries = sample_positions(batch.cu_seqlens), batch.cu_seqlens.int()
        longest, num_masked = int(boundaries.diff().max()), int(batch.loss_mask_T.sum())

    def there(value: Any) -> Any:
        return mode.from_tensor(value).to(CUDA) if isinstance(value, Tensor) else value

    here = replace(batch, **{field.name: there(getattr(batch, field.name)) for field in fields(batch)})
    layout = PackLayout(
        qkv_format="sbhd",
        cu_seqlens_q=there(boundaries),
        cu_seqlens_kv=there(boundaries),
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    micro_batch = MicroBatch(
        whole=here,
        part=here,
        samples=tuple(range(len(samples))),
        token_ids_T=here.token_ids_T,
        positions_T=there(positions),
        layout=layout,
    )
    return num_masked, micro_batch


def taken() -> dict[str, int]:
    """Return the waits since the last call."""
    waits = {f"{operation} in {place}": count for (operation, place), count in sorted(WAITS.items())}
    WAITS.clear()
    return waits


if __name__ == "__main__":
    main()
