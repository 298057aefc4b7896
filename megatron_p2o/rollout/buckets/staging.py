"""Lays weights out in buckets, and gives memory for a bucket that the engines of a machine share."""

import math
import mmap
import os
import secrets
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.buckets.device_memory import checksum, pin, unpin
from megatron_p2o.rollout.buckets.weight_message import ALIGNMENT_BYTES, LoadMessage, MemoryAddress, TensorEntry


def laid_out(weights: NamedWeights, bucket_bytes: int) -> Iterator[tuple[int, TensorEntry, Tensor]]:
    """Yield (number of the bucket, place in it, weight). The same weights always give the same layout.

    A weight larger than `bucket_bytes` gets a bucket of its own. None is kept when the next is asked for.

    Raises:
        ValueError: there are no weights.
    """
    index = used_bytes = 0
    for name, tensor in weights:
        if used_bytes and used_bytes + tensor.nbytes > bucket_bytes:
            index, used_bytes = index + 1, 0
        entry = TensorEntry(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            offset_bytes=used_bytes,
        )
        yield index, entry, tensor
        used_bytes = aligned_bytes(used_bytes + tensor.nbytes)
        del tensor
    if not used_bytes:
        raise ValueError("the policy yielded no weights")


class MemoryFile:
    """Bytes that other processes of this machine can map by a path.

    Not in /dev/shm: it is gone with the last process that maps it, however that ends, and containers limit /dev/shm to
    64 MiB by default.
    """

    def __init__(self, num_bytes: int) -> None:
        size = aligned_bytes(num_bytes)
        self._descriptor = os.memfd_create("p2o-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, size)
        self.content = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)
        """[num_bytes, rounded up] uint8."""
        self.address = MemoryAddress(
            path=f"/proc/{os.getpid()}/fd/{self._descriptor}", buffer_id=secrets.token_hex(8), num_bytes=size
        )

    def close(self) -> None:
        """Remove the path. Processes that have mapped the memory keep it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class StagingBuffer:
    """One bucket of weights. Every refresh fills it again; it keeps its content until then."""

    def __init__(self, slot: int, capacity_bytes: int) -> None:
        self.slot = slot
        """Number of the buffer."""
        self.num_fillings = 0
        """Tells what it holds from what it held before."""
        self._memory = pinned_file(capacity_bytes)
        self._entries: list[TensorEntry] = []
        self._checksums: list[int] = []
        self._used_bytes = 0

    @property
    def address(self) -> MemoryAddress:
        return self._memory.address

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def content(self) -> Tensor:
        """[used bytes] uint8, a view."""
        return self._memory.content[: self._used_bytes]

    def clear(self, room_bytes: int) -> None:
        """Forget the bucket; grow to hold a tensor of `room_bytes` if need be."""
        self.num_fillings += 1
        self._entries.clear()
        self._checksums.clear()
        self._used_bytes = 0
        if room_bytes > self.address.num_bytes:
            self.close()
            self._memory = pinned_file(room_bytes)

    def put(self, entry: TensorEntry, tensor: Tensor, verify: bool) -> None:
        """Begin to copy `tensor` to its place; see `finish_copies`.

        Its checksum is taken from the original, so that the copy is covered as well.
        """
        entry.view(self._memory.content).copy_(tensor.detach(), non_blocking=True)
        self._entries.append(entry)
        if verify:
            self._checksums.append(checksum(tensor))
        self._used_bytes = aligned_bytes(entry.offset_bytes + tensor.nbytes)

    def add_checksums(self) -> None:
        """Make up for a refresh that was not verified, from the copy."""
        if not self._checksums:
            self._checksums = [checksum(entry.view(self._memory.content)) for entry in self._entries]

    def message(self, index: int, address: MemoryAddress, verify: bool) -> LoadMessage:
        """Return the order to load this bucket, the refresh's `index`-th, from where it lies for the engine."""
        return LoadMessage(
            index=index,
            address=address,
            entries=tuple(self._entries),
            checksums=tuple(self._checksums) if verify else None,
        )

    def close(self) -> None:
        """Release the memory. Engines keep their mapping until the end of their next refresh."""
        unpin(self._memory.content)
        self._memory.close()


def pinned_file(num_bytes: int) -> MemoryFile:
    """Return memory that GPUs read and write by themselves."""
    memory = MemoryFile(num_bytes)
    pin(memory.content)
    return memory


def aligned_bytes(num_bytes: int) -> int:
    return math.ceil(num_bytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
