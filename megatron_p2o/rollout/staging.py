"""Memory shared with the engines of this machine, in which the trainer lays out one bucket of weights each."""

import mmap
import os
import secrets

import torch
from torch import Tensor

from megatron_p2o.rollout.checksum import checksum
from megatron_p2o.rollout.weight_message import ALIGNMENT_BYTES, LoadMessage, TensorEntry


class StagingBuffer:
    """One bucket of weights. It is filled anew by every refresh and keeps what it holds until then.

    A memory file instead of one in /dev/shm: it is gone with the last process that maps it, however that ends, and
    containers limit /dev/shm to 64 MiB by default.
    """

    def __init__(self, slot: int, capacity_bytes: int) -> None:
        self._slot = slot
        self.capacity_bytes = 0
        self._descriptor = -1
        self._allocate(capacity_bytes)
        self._entries: list[TensorEntry] = []
        self._checksums: list[int] = []
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def content(self) -> Tensor:
        """[used bytes] uint8, a view."""
        return self._bytes[: self._used_bytes]

    def fits(self, tensor: Tensor) -> bool:
        return self._used_bytes + tensor.nbytes <= self.capacity_bytes

    def clear(self, room_bytes: int) -> None:
        """Forget the bucket; grow to hold a tensor of `room_bytes` if need be."""
        self._entries.clear()
        self._checksums.clear()
        self._used_bytes = 0
        if room_bytes > self.capacity_bytes:
            self.close()
            self._allocate(room_bytes)

    def put(self, name: str, tensor: Tensor, verify: bool) -> None:
        """Append a copy of `tensor`. Its checksum is taken from the original, so that the copy is covered as well."""
        entry = TensorEntry(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            offset_bytes=self._used_bytes,
        )
        entry.view(self._bytes).copy_(tensor.detach())
        self._entries.append(entry)
        if verify:
            self._checksums.append(checksum(tensor))
        self._used_bytes = round_up(self._used_bytes + tensor.nbytes)

    def add_checksums(self) -> None:
        """Make up for a refresh that was not verified, from the copy."""
        if not self._checksums:
            self._checksums = [checksum(entry.view(self._bytes)) for entry in self._entries]

    def message(self, index: int, verify: bool) -> LoadMessage:
        return LoadMessage(
            index=index,
            slot=self._slot,
            buffer_id=self._buffer_id,
            path=f"/proc/{os.getpid()}/fd/{self._descriptor}",
            num_bytes=self.capacity_bytes,
            entries=tuple(self._entries),
            checksums=tuple(self._checksums) if verify else None,
        )

    def close(self) -> None:
        """Give the memory up; engines keep what they have mapped until they map the next buffer of this slot."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _allocate(self, num_bytes: int) -> None:
        self.capacity_bytes = round_up(num_bytes)
        self._buffer_id = secrets.token_hex(8)
        self._descriptor = os.memfd_create("p2o-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, self.capacity_bytes)
        self._bytes = torch.frombuffer(mmap.mmap(self._descriptor, self.capacity_bytes), dtype=torch.uint8)


def round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
