"""Loads weights inside the engine process: SGLang calls `load` for every message of a refresh.

The first refresh runs the model's own `load_weights` and records each copy from a bucket into a parameter (SGLang fuses
q, k, v and gate, up; each tensor-parallel rank takes its slices). Later ones replay the copies. At the end the
checksums of what lies in the parameters, read through the recorded destinations, are compared with the trainer's. The
outcome is written to a file: SGLang passes nothing back from a loader, and an exception would end the engine.

Runs in the engine, yet imports torch only (and `checksum`, `device_memory`, `pinning`, `weight_message` beside it).
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_p2o.rollout.buckets.device_memory import (
    checksum,
    close_device_memory,
    finish_copies,
    open_device_memory,
    pin,
    unpin,
)
from megatron_p2o.rollout.buckets.weight_message import (
    FinishMessage,
    LoadMessage,
    MemoryAddress,
    RefreshReport,
    TensorEntry,
    parse,
    write_refresh_report,
)


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Obey one message; the signature is SGLang's."""
    ((text, _),) = named_tensors
    message = parse(text)
    loader = _LOADERS.setdefault(model, WeightLoader(model))
    with torch.no_grad():
        if isinstance(message, LoadMessage):
            loader.load_bucket(message)
        else:
            loader.finish(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """One recorded copy from a bucket into a parameter."""

    name: str
    """Weight it belongs to."""
    destination: Tensor
    """View of the parameter."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset_bytes: int
    """Offset of the source in the bucket."""
    is_whole: bool
    """The source is the whole weight, bit for bit: the trainer's checksum holds for the destination."""

    def source(self, bucket: Tensor) -> Tensor:
        typed = bucket.view(self.dtype)
        return typed.as_strided(self.shape, self.stride, self.offset_bytes // self.dtype.itemsize)


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPlan:
    """The copies that bring the weights of one bucket into the model."""

    copies: tuple[Copy, ...]
    written: Mapping[str, int]
    """Elements written per parameter, padding that was filled with a constant included."""
    addresses: tuple[int, ...]
    """Addresses of the model's parameters when the plan was recorded. The plan is void if they move."""


@dataclass(slots=True)
class Refresh:
    """What happened since bucket 0."""

    plans: list[CopyPlan] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    checksums: dict[str, int] = field(default_factory=dict)
    """The trainer's, by weight."""
    expected: list[tuple[Copy, int]] = field(default_factory=list)
    """Checksum each destination must have at the end."""
    corrupted: list[str] = field(default_factory=list)
    """Weights that arrived with another checksum than they were sent."""
    addresses: set[MemoryAddress] = field(default_factory=set)
    """Addresses of the buckets."""
    unopened: str = ""
    """See `RefreshReport`."""


class WeightLoader:
    """Loads refreshes into one model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mapped: dict[MemoryAddress, Tensor] = {}
        self._plans: dict[tuple[TensorEntry, ...], CopyPlan] = {}
        self._refresh = Refresh()

    def load_bucket(self, message: LoadMessage) -> None:
        """Copy the weights of a bucket into the model."""
        if message.index == 0:
            self._refresh = Refresh()
        try:
            bucket = self._map(message.address)
        except (RuntimeError, OSError) as error:
            self._refresh.unopened = str(error)
            return
        addresses = tuple(parameter.data_ptr() for parameter in self._model.parameters())
        plan = self._plans.get(message.entries)
        if plan is None or plan.addresses != addresses:
            plan = record(self._model, message.entries, bucket, addresses)
            self._plans[message.entries] = plan
        elif plan.copies:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [copy.destination for copy in plan.copies],
                [copy.source(bucket) for copy in plan.copies],
                non_blocking=True,
            )
        self._refresh.plans.append(plan)
        self._refresh.names += [entry.name for entry in message.entries]
        if message.checksums is not None:
            self._expect(plan, message.entries, message.checksums, bucket)
        finish_copies()  # the answer says that the bucket has been read

    def finish(self, message: FinishMessage) -> None:
        """Check what the model holds now and write the report."""
        refresh, self._refresh = self._refresh, Refresh()
        corrupted = refresh.corrupted
        if message.verify:
            corrupted += [copy.name for copy, number in refresh.expected if checksum(copy.destination) != number]
        unwritten = self._unwritten(refresh)
        if unwritten or hasattr(self._model, "post_load_weights"):
            self._plans.clear()  # load_weights does more than the recorded copies: run it every time
        report = RefreshReport(
            num_tensors=len(refresh.names),
            num_verified=len(refresh.expected) if message.verify else 0,
            corrupted=tuple(dict.fromkeys(corrupted)),
            ignored=tuple(ignored_by_model(refresh)),
            unwritten=tuple(unwritten),
            unopened=refresh.unopened,
        )
        self._forget_all_but(refresh.addresses)
        write_refresh_report(report, Path(f"{message.report_path}.{tensor_parallel_rank()}"))

    def _map(self, address: MemoryAddress) -> Tensor:
        """Return the bytes at an address; the mapping is kept, because the trainer fills the same memory again."""
        self._refresh.addresses.add(address)
        if address not in self._mapped:
            self._mapped[address] = map_memory(address)
        return self._mapped[address]

    def _forget_all_but(self, addresses: Set[MemoryAddress]) -> None:
        """Give up what the trainer has left for other memory."""
        for address in self._mapped.keys() - addresses:
            unmap_memory(address, self._mapped.pop(address))

    def _expect(self, plan: CopyPlan, entries: Sequence[TensorEntry], checksums: Sequence[int], bucket: Tensor) -> None:
        """Note the checksum of every destination: the trainer's own, or for a slice that of the slice as received."""
        sent = dict(zip((entry.name for entry in entries), checksums, strict=True))
        self._refresh.checksums |= sent
        received = {entry.name: entry.view(bucket) for entry in entries}
        sliced = {copy.name: copy.destination.device for copy in plan.copies if not copy.is_whole}
        for name, device in sliced.items():
            if checksum(received[name].to(device)) != sent[name]:
                self._refresh.corrupted.append(name)
        for copy in plan.copies:
            if copy.is_whole:
                number = sent[copy.name]
            else:
                number = checksum(copy.source(bucket).to(copy.destination.device, copy.destination.dtype))
            self._refresh.expected.append((copy, number))

    def _unwritten(self, refresh: Refresh) -> list[str]:
        written: Counter[str] = Counter()
        for plan in refresh.plans:
            written.update(plan.written)
        return [name for name, value in self._model.named_parameters() if written[name] < value.numel()]


def map_memory(address: MemoryAddress) -> Tensor:
    """Return the bytes at an address."""
    if address.ipc_handle:
        return open_device_memory(address)
    memory = torch.from_file(address.path, shared=True, size=address.num_bytes, dtype=torch.uint8)
    pin(memory)
    return memory


def unmap_memory(address: MemoryAddress, memory: Tensor) -> None:
    """Give up what `map_memory` returned."""
    if address.ipc_handle:
        close_device_memory(memory)
    else:
        unpin(memory)


def ignored_by_model(refresh: Refresh) -> list[str]:
    """Return the weights that no copy came from, except those whose twin was used (tied embeddings)."""
    used = {copy.name for plan in refresh.plans for copy in plan.copies}
    used_checksums = {refresh.checksums[name] for name in used if name in refresh.checksums}
    return [name for name in refresh.names if name not in used and refresh.checksums.get(name) not in used_checksums]


class CopyRecorder(TorchDispatchMode):
    """Notes every write into a parameter, and for copies which bytes of the bucket they read."""

    def __init__(self, model: nn.Module, bucket: Tensor) -> None:
        super().__init__()
        parameters = sorted((value.data_ptr(), value.nbytes, name) for name, value in model.named_parameters())
        self._starts = [start for start, _, _ in parameters]
        self._parameters = parameters
        self._bucket_start = bucket.data_ptr()
        self._bucket_bytes = bucket.numel()
        self.written: Counter[str] = Counter()
        self.copies: list[tuple[Tensor, Tensor, int]] = []
        """Destination, source, offset of the source in the bucket."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self._note_copy(args[0], args[1])
        elif func in (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default):
            self._note_write(args[0])
        return result

    def _note_copy(self, destination: Tensor, source: Tensor) -> None:
        offset = source.data_ptr() - self._bucket_start
        if 0 <= offset < self._bucket_bytes and source.shape == destination.shape and source.numel():
            self.copies.append((destination, source, offset))
            self._note_write(destination)

    def _note_write(self, destination: Tensor) -> None:
        index = bisect_right(self._starts, destination.data_ptr()) - 1
        if index >= 0:
            start, num_bytes, name = self._parameters[index]
            if destination.data_ptr() < start + num_bytes:
                self.written[name] += destination.numel()


def record(model: Any, entries: tuple[TensorEntry, ...], bucket: Tensor, addresses: tuple[int, ...]) -> CopyPlan:
    """Load a bucket with the model's own `load_weights` and return what it did."""
    weights = [(entry.name, entry.view(bucket)) for entry in entries]
    with CopyRecorder(model, bucket) as recorder:
        model.load_weights(iter(weights))
    starts = [entry.offset_bytes for entry in entries]
    copies: list[Copy] = []
    for destination, source, offset in recorder.copies:
        entry = entries[bisect_right(starts, offset) - 1]
        whole = entry.view(bucket)
        copies.append(
            Copy(
                name=entry.name,
                destination=destination,
                dtype=source.dtype,
                shape=source.shape,
                stride=source.stride(),
                offset_bytes=offset,
                is_whole=(
                    source.numel() == whole.numel() and source.is_contiguous() and source.dtype == destination.dtype
                ),
            )
        )
    return CopyPlan(copies=tuple(copies), written=dict(recorder.written), addresses=addresses)


def tensor_parallel_rank() -> int:
    """Return this engine rank's number; SGLang has one process group over all ranks of a server."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


_LOADERS: WeakKeyDictionary[nn.Module, WeightLoader] = WeakKeyDictionary()
"""SGLang calls a function, not an object: the state between messages hangs on the model."""
