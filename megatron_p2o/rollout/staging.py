"""Memory shared with the engines of a machine, in which the trainer lays out one bucket of weights each."""

import mmap
import os
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_p2o.rollout.checksum import checksum
from megatron_p2o.rollout.pinning import finish_copies, pin, unpin
from megatron_p2o.rollout.weight_message import ALIGNMENT_BYTES, LoadMessage, TensorEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryAddress:
    """Where an engine finds a bucket on its own machine."""

    path: str
    """Of the memory file, as the engine can open it."""
    buffer_id: str
    """Unique; a memory file never changes its size."""
    num_bytes: int
    """A multiple of `ALIGNMENT_BYTES`."""


class MemoryFile:
    """Bytes that other processes of this machine can map by a path.

    Not in /dev/shm: it is gone with the last process that maps it, however that ends, and containers limit /dev/shm to
    64 MiB by default.
    """

    def __init__(self, num_bytes: int) -> None:
        size = round_up(num_bytes)
        self._descriptor = os.memfd_create("p2o-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, size)
        self.content = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)
        """[num_bytes, rounded up] uint8."""
        self.address = MemoryAddress(
            path=f"/proc/{os.getpid()}/fd/{self._descriptor}", buffer_id=secrets.token_hex(8), num_bytes=size
        )

    def close(self) -> None:
        """Give the path up; whoever has mapped the memory keeps it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class StagingBuffer:
    """One bucket of weights. It is filled anew by every refresh and keeps what it holds until then."""

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

    def fits(self, tensor: Tensor) -> bool:
        return self._used_bytes + tensor.nbytes <= self.address.num_bytes

    def clear(self, room_bytes: int) -> None:
        """Forget the bucket; grow to hold a tensor of `room_bytes` if need be."""
        self.num_fillings += 1
        self._entries.clear()
        self._checksums.clear()
        self._used_bytes = 0
        if room_bytes > self.address.num_bytes:
            self.close()
            self._memory = pinned_file(room_bytes)

    def put(self, name: str, tensor: Tensor, verify: bool) -> None:
        """Begin to append a copy of `tensor`; see `finish`.

        Its checksum is taken from the original, so that the copy is covered as well.
        """
        entry = TensorEntry(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            offset_bytes=self._used_bytes,
        )
        entry.view(self._memory.content).copy_(tensor.detach(), non_blocking=True)
        self._entries.append(entry)
        if verify:
            self._checksums.append(checksum(tensor))
        self._used_bytes = round_up(self._used_bytes + tensor.nbytes)

    def finish(self) -> None:
        """Return when everything that was `put` lies in the bucket."""
        finish_copies()

    def add_checksums(self) -> None:
        """Make up for a refresh that was not verified, from the copy."""
        if not self._checksums:
            self._checksums = [checksum(entry.view(self._memory.content)) for entry in self._entries]

    def message(self, index: int, address: MemoryAddress, verify: bool) -> LoadMessage:
        """Return the order to load this bucket, the refresh's `index`-th, from where it lies for the engine."""
        return LoadMessage(
            index=index,
            slot=self.slot,
            buffer_id=address.buffer_id,
            path=address.path,
            num_bytes=address.num_bytes,
            entries=tuple(self._entries),
            checksums=tuple(self._checksums) if verify else None,
        )

    def close(self) -> None:
        """Give the memory up; engines keep what they have mapped until they map the next buffer of this slot."""
        unpin(self._memory.content)
        self._memory.close()


def pinned_file(num_bytes: int) -> MemoryFile:
    """Return memory that GPUs read and write by themselves."""
    memory = MemoryFile(num_bytes)
    pin(memory.content)
    return memory


def round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
