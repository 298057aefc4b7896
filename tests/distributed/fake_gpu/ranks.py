"""One of several ranks, without the others: collectives are checked, noted and left out."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from fake_gpu.hopper import CUDA
from fake_gpu.waits import caller, note
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

COLLECTIVES: Counter[tuple[str, str]] = Counter()
"""(collective over the devices, where) to how often."""

NAMES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier"),
    *("_all_gather_base", "_reduce_scatter_base", "all_to_all_single", "send", "recv", "isend", "irecv"),
    "batch_isend_irecv",
)

_host_groups: set[int] = set()
"""Groups over gloo, by identity; all others are NCCL's, which takes tensors of a GPU alone."""


class Done:
    """A collective that is over."""

    def wait(self, timeout: object = None) -> None: ...


def stand_alone() -> None:
    """Put the stand-ins in the places of torch.distributed's collectives. Before megatron-core is imported."""
    for name in NAMES:
        _replace(name, _collective(name))
    _replace("all_gather_object", _gather_objects)
    _replace(
        "gather_object", lambda obj, object_gather_list=None, *where, **_: _gather_objects(object_gather_list, obj)
    )
    _replace("scatter_object_list", _scatter_objects)
    _replace("broadcast_object_list", lambda values, src=None, group=None, device=None: None)
    new_group = dist.new_group

    def fake_group(ranks: Any = None, timeout: Any = None, backend: str | None = None, **options: Any) -> Any:
        group = new_group(ranks, backend="fake", **{name: options[name] for name in options if name != "pg_options"})
        if backend == "gloo":
            _host_groups.add(id(group))
        return group

    _replace("new_group", fake_group)


def join(rank: int, world_size: int) -> None:
    """Be a rank of a world."""
    _host_groups.clear()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def _replace(name: str, function: Callable[..., Any]) -> None:
    for module in (dist, distributed_c10d):
        setattr(module, name, function)


def _gather_objects(object_list: list[Any] | None, obj: Any, group: Any = None) -> None:
    """Every rank would have said the same."""
    if object_list is not None:
        object_list[:] = [obj] * len(object_list)


def _scatter_objects(
    scatter_object_output_list: list[Any], scatter_object_input_list: list[Any] | None = None, *where: Any, **_: Any
) -> None:
    assert scatter_object_input_list is not None, "only the first rank knows what it would have been sent"
    scatter_object_output_list[0] = scatter_object_input_list[0]


def _collective(name: str) -> Callable[..., Any]:
    def call(*args: Any, group: Any = None, async_op: bool = False, **kwargs: Any) -> Any:
        group = group or next((value for value in args if isinstance(value, dist.ProcessGroup)), None)
        if id(group) not in _host_groups:
            COLLECTIVES[name, caller()] += 1
            tensors = [op.tensor for op in args[0]] if name == "batch_isend_irecv" else tree_leaves((args, kwargs))
            devices = {value.device for value in tensors if isinstance(value, Tensor)}
            assert devices <= {CUDA}, f"{name} over NCCL of tensors on {devices}"
            if name == "barrier":
                note("barrier")
        if name == "batch_isend_irecv":
            return [Done()]
        return Done() if async_op or name in ("isend", "irecv") else None

    return call
