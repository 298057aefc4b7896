"""Puts all weights on the device of every trainer rank, for the engine rank there.

Each rank lays all weights out in the same buckets and fills two spans of memory in turn, which engine ranks have opened
(`device_memory`; without CUDA, memory files). Rank 0 refreshes the engines, in step with the others:

    rank 0     fill 0         fill 1  engines have 0         fill 2  engines have 1
    others     fill 0         fill 1                         fill 2
                    barrier                        barrier                       barrier  ...

After a barrier the bucket is full on every device, and the one before it may be overwritten.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, assert_never

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.buckets.device_memory import BINDINGS, DeviceMemory, can_share_device_memory, finish_copies
from megatron_p2o.rollout.buckets.staging import MemoryFile, aligned_bytes, laid_out
from megatron_p2o.rollout.buckets.weight_message import MemoryAddress, TensorEntry
from megatron_p2o.rollout.servers.server_arguments import engine_places

logger = logging.getLogger(__name__)
T = TypeVar("T")

NUM_SPANS = 2
"""One is filled while the engines load the other."""


class DevicePlace(NamedTuple):
    """A device of the run."""

    node: int
    """0 is rank 0's own."""
    index: int
    """Index on the node."""

    def __str__(self) -> str:
        return f"node {self.node}'s device {self.index}"


class WeightOutlet:
    """One rank's end; made on all ranks by `open_outlet`."""

    def __init__(
        self,
        group: ProcessGroup,
        spans: Sequence[MemoryFile | DeviceMemory],
        addresses: Mapping[str, Sequence[Sequence[MemoryAddress]]],
        bucket_bytes: int,
        *,
        is_only_way: bool,
        meeting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Args:
        spans: this rank's memory, each as large as a bucket can be.
        addresses: of the spans of each engine's ranks, by the engine's name.
        bucket_bytes: as `laid_out` takes it.
        is_only_way: whether it is an error when an engine cannot open the spans.
        meeting: makes the context in which ranks meet; see `MegatronPolicy.meeting`.
        """
        self.is_only_way = is_only_way
        self._group = group
        self._spans = spans
        self._addresses = addresses
        self._bucket_bytes = bucket_bytes
        self._meeting = meeting

    def put(self, index: int, entry: TensorEntry, tensor: Tensor) -> None:
        """Begin to copy a weight into this rank's span for bucket `index`."""
        content = self._spans[index % NUM_SPANS].content
        entry.view(content).copy_(tensor.detach(), non_blocking=True)

    def meet(self) -> None:
        """Return when all ranks have filled the bucket they are at."""
        with self._meeting():
            finish_copies()
            dist.barrier(self._group)

    def take(self, weights: NamedWeights) -> None:
        """Do a rank's part of a refresh that rank 0 conducts; the next may begin when rank 0's has ended.

        For every rank but 0.
        """
        current = 0
        for index, entry, tensor in laid_out(weights, self._bucket_bytes):
            if index != current:
                self.meet()
                current = index
            self.put(index, entry, tensor)
            del tensor  # the policy gives its memory back to the GPU before it ends
        self.meet()

    def addresses(self, engine: str, index: int) -> list[MemoryAddress]:
        """Return where each rank of an engine finds bucket `index`."""
        return [spans[index % NUM_SPANS] for spans in self._addresses[engine]]


def open_outlet(
    config: Config, largest_weight_bytes: int, meeting: Callable[[], AbstractContextManager[None]] = nullcontext
) -> WeightOutlet | None:
    """Return this rank's end, or None where weights go through host memory; see `rollout.weight_transfer`.

    All ranks must call, after torch.distributed has started.

    Args:
        largest_weight_bytes: size of the largest tensor that will be sent.
        meeting: makes the context in which ranks meet; see `MegatronPolicy.meeting`.

    Raises:
        ValueError: `rollout.weight_transfer` is "device", and an engine rank has no trainer rank on its device.
        RuntimeError: the GPU's memory cannot be shared, or is used up.
    """
    if not uses_devices(config):
        return None
    # The others also wait while rank 0 waits for engines.
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.parallel.command_timeout_s))
    assert isinstance(group, ProcessGroup)
    ranks = {place: rank for rank, place in enumerate(gathered(own_place(), group))}
    engines = engine_devices(config)
    bare = sorted({place for places in engines.values() for place in places} - ranks.keys())
    if bare:
        reason = f"no trainer rank is on {', '.join(map(str, bare))}, where engines are"
        if config.rollout.weight_transfer == "device":
            raise ValueError(f"rollout.weight_transfer=device is impossible: {reason}; leave it out")
        if dist.get_rank() == 0:
            logger.warning("weights go to the engines through host memory: %s", reason)
        return None
    bucket_bytes = config.rollout.refresh_bucket_mib << 20
    make = DeviceMemory if torch.cuda.is_available() else MemoryFile
    spans = [make(bucket_capacity(config, largest_weight_bytes)) for _ in range(NUM_SPANS)]
    by_rank = gathered([memory.address for memory in spans], group)
    addresses = {name: [by_rank[ranks[place]] for place in places] for name, places in engines.items()}
    is_only_way = config.rollout.weight_transfer == "device"
    return WeightOutlet(group, spans, addresses, bucket_bytes, is_only_way=is_only_way, meeting=meeting)


def uses_devices(config: Config) -> bool:
    """Return whether `rollout.weight_transfer` asks for an outlet; on this machine, as far as one process can tell.

    Raises:
        ValueError: it is set to "device", and this machine's GPUs cannot share memory.
    """
    can = can_share_device_memory()
    match config.rollout.weight_transfer:
        case "host":
            return False
        case "auto":
            return can
        case "device" if can or not torch.cuda.is_available():
            return True
        case "device":
            raise ValueError(
                f"rollout.weight_transfer=device needs the package {BINDINGS}, which is not installed: "
                "pip install cuda-bindings, or leave the setting out"
            )
        case _:
            assert_never(config.rollout.weight_transfer)


def bucket_capacity(config: Config, largest_weight_bytes: int) -> int:
    """Return the size of a span that can hold every bucket."""
    return aligned_bytes(max(config.rollout.refresh_bucket_mib << 20, largest_weight_bytes))


def own_place() -> DevicePlace:
    """Return where this rank computes, as torchrun says."""
    return DevicePlace(int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")))


def engine_devices(config: Config) -> dict[str, list[DevicePlace]]:
    """Return the device of each engine's ranks, by the engine's name; nodes are alike.

    Without CUDA engines take the trainer's ranks of their node in turn, as they take GPUs.
    """
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    num_devices = torch.cuda.device_count() or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    num_ranks = config.rollout.tensor_parallel
    return {
        place.name: [
            DevicePlace(place.node, (place.slot * num_ranks + rank) % num_devices) for rank in range(num_ranks)
        ]
        for place in engine_places(config.rollout.num_engines, num_nodes)
    }


def gathered(value: T, group: ProcessGroup) -> list[T]:
    """Return every rank's value, on every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
