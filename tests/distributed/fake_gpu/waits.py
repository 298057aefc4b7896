"""Notes where the host waits for the device, or the device for the host, while tensors are fake."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOTS = ("/megatron_p2o/", "/p2o_kernels/", "/megatron/core/")
ATEN = torch.ops.aten

WAITS: Counter[tuple[str, str]] = Counter()
"""(what waits, "file:function" of the innermost line of ours or Megatron's) to how often."""


PINNED: Counter[str] = Counter()
"""Where tensors in pinned host memory were asked for, to how often."""


def caller() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        for root in ROOTS:
            if root in path and "/fake_gpu/" not in path:
                return f"{path.rpartition(root)[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def taken() -> dict[str, int]:
    """Return the waits since the last call."""
    waits = {f"{operation} in {place}": count for (operation, place), count in sorted(WAITS.items())}
    WAITS.clear()
    return waits


def note(operation: str) -> None:
    WAITS[operation, caller()] += 1


class Device(TorchDispatchMode):
    """Stands in for what a fake tensor cannot answer, and notes the waits."""

    num_masked = 0
    """True values of every mask: response tokens, all of them with an advantage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = ANSWERS.get(func)
        if answer is not None and isinstance(args[0], FakeTensor):
            result = answer(self, *args, **kwargs)
            if result is not None:
                return result
        result = func(*args, **kwargs)
        copied = copy_between(func, args, kwargs, result)
        if copied:
            note(copied)
        return result


def copy_between(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> str | None:
    """Return "to host" or "from host" for an operation that copies there and waits; copies in the stream's order
    (`non_blocking`) do not."""
    if kwargs.get("non_blocking") or (func is ATEN.copy_.default and len(args) > 2 and args[2]):
        return None
    sources = list(devices_of(args[1:] if func is ATEN.copy_.default else (args, kwargs)))
    targets = list(devices_of(result))
    if "cuda" in sources and "cpu" in targets:
        return "to host"
    if "cpu" in sources and "cuda" in targets and func in PLACES_FROM_HOST and not fills_mask(func, args):
        return "from host"
    return None


def fills_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether a number is put where a mask says: torch passes it to the kernel."""
    if func not in (ATEN.index_put_.default, ATEN.index_put.default):
        return False
    given = [index for index in args[1] if index is not None]
    return len(given) == 1 and given[0].dtype == torch.bool and args[2].dim() == 0


def devices_of(values: Any) -> Iterator[str]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf.device.type


PLACES_FROM_HOST = {
    ATEN._to_copy.default,
    ATEN.copy_.default,
    ATEN.index.Tensor,
    ATEN.index_put_.default,
    ATEN.index_put.default,
    ATEN.index_copy_.default,
    ATEN.index_fill_.int_Tensor,
}
"""Operations that copy a tensor of the host to the device. Others take a single number of the host as an argument."""


def _item(device: Device, tensor: Tensor) -> Any:
    if tensor.device.type == "cuda":
        note("item")
    return 1.0 if tensor.is_floating_point() else tensor.dtype == torch.bool or device.num_masked


def _nonzero(device: Device, tensor: Tensor) -> Tensor | None:
    if tensor.device.type != "cuda":
        return None
    note("nonzero")
    return torch.empty(device.num_masked, tensor.dim(), dtype=torch.int64, device=tensor.device)


def _index(device: Device, tensor: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    if tensor.device.type != "cuda" or not any(i is not None and i.dtype == torch.bool for i in indices):
        return None
    note("mask")
    return torch.empty(device.num_masked, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)


def _equal(device: Device, left: Tensor, right: Tensor) -> bool:
    note("equal")
    return True


def _product(device: Device, left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=out_dtype)


def _added_product(
    device: Device, total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor, **_: Any
) -> Tensor:
    assert out is total and out.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
    assert left.dtype == right.dtype == torch.bfloat16 and out.dtype == out_dtype == torch.float32
    return out


ANSWERS: dict[Any, Callable[..., Any]] = {
    ATEN._local_scalar_dense.default: _item,
    ATEN.nonzero.default: _nonzero,
    ATEN.index.Tensor: _index,
    ATEN.equal.default: _equal,
    ATEN.mm.dtype: _product,
    ATEN.addmm.dtype_out: _added_product,
}
"""None: the operation is not one that waits."""


class FromHost(TorchFunctionMode):
    """Makes tensors on the device without the driver: a number is not taken for one, values come by way of the host."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", None):  # there is no allocator for it
            PINNED[caller()] += 1
        if isinstance(kwargs.get("device"), int):
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        if func is torch.tensor:
            device = kwargs.pop("device", None)
            here = func(of_host(args[0]), *args[1:], **kwargs)
            if device is None or torch.device(device).type == "cpu":
                return here
            note("from host")
            return torch.empty(here.shape, dtype=here.dtype, device=device)
        return func(*args, **kwargs)


def of_host(values: Any) -> Any:
    """Return nested lists with numbers for tensors of the device: each is fetched."""
    if isinstance(values, (list, tuple)):
        return [of_host(value) for value in values]
    return values.item() if isinstance(values, FakeTensor) else values
