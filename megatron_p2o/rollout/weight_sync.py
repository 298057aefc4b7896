"""Moves the trainer's weights into every engine and proves that they arrived.

    pause, begin  ->  bucket, bucket, ...  ->  finish, check reports  ->  end, set version, resume

Packing of one bucket overlaps loading of the other. Nothing is served and no version is set before every engine has
confirmed; after a failure the engines stay paused until a later refresh succeeds.
"""

import mmap
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.checksum import checksum
from megatron_p2o.rollout.client import EngineClient, EngineRefused
from megatron_p2o.rollout.weight_message import (
    ALIGNMENT_BYTES,
    LOAD_FORMAT,
    FinishMessage,
    LoadMessage,
    RefreshReport,
    TensorEntry,
    read_report,
    serialize,
)

BUCKET_BYTES = 512 << 20
MAX_NAMES_SHOWN = 5

T = TypeVar("T")


class RefreshFailed(RuntimeError):
    """The engines do not hold the weights they were sent; they serve nothing until a refresh succeeds."""


class Fleet(Protocol):
    """The engines as a refresh needs them; `rollout.broker` provides it."""

    def call_every_engine(self, call: Callable[[str, EngineClient], Awaitable[T]]) -> Future[dict[str, T]]:
        """Run `call(name, client)` for all engines at once; the result is by name.

        Engines that turn out to be gone are left out; when none is left the future holds `EnginesLost`.
        """
        ...


class StagingBuffer:
    """Memory shared with the engines, filled with one bucket of weights at a time.

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


class WeightSync:
    """Refreshes the weights of all engines. Called from the algorithm thread, which owns the weights' iterator."""

    def __init__(
        self, fleet: Fleet, report_directory: Path, *, tensor_parallel: int, timeout_s: float, bucket_bytes: int
    ) -> None:
        """Args:
        tensor_parallel: ranks per engine; each reads the same bucket and writes its own report.
        timeout_s: longest wait for one engine's answer.
        bucket_bytes: size of each of the two staging buffers; a larger tensor gets a bucket of its own.
        """
        self._fleet = fleet
        self._reports = report_directory.resolve()
        self._num_ranks = tensor_parallel
        self._timeout_s = timeout_s
        self._buffers = [StagingBuffer(slot, bucket_bytes) for slot in range(2)]

    def refresh(self, weights: NamedWeights, version: int, *, verify: bool) -> None:
        """Load `weights` everywhere and serve them as `version`. They are consumed to the end whatever happens.

        Raises:
            RefreshFailed: an engine refused, ran out of time, or holds other weights than it was sent.
            EnginesLost: no engine is left.
        """
        remaining = iter(weights)
        try:
            self.begin()
            self.load(remaining, verify=verify)
            self.check(version, verify=verify)
            self.commit(version)
        except (EngineRefused, TimeoutError) as error:
            raise RefreshFailed(f"refresh to version {version}: {error}") from error
        finally:
            for _ in remaining:
                pass  # the policy's ranks gather in lock step: leaving them in the middle would hang the others

    def begin(self) -> None:
        """Stop decoding and open an update; closes one that a failed refresh left open."""

        async def pause_and_begin(name: str, client: EngineClient) -> None:
            await client.pause()
            try:
                await client.begin_weight_update(self._timeout_s)
            except EngineRefused:
                await client.end_weight_update(self._timeout_s)
                await client.begin_weight_update(self._timeout_s)

        self._wait(self._fleet.call_every_engine(pause_and_begin))

    def load(self, weights: NamedWeights, *, verify: bool) -> None:
        """Send all weights, bucket by bucket."""
        loading: list[Future[dict[str, None]]] = []
        for index, buffer in enumerate(self._filled_buffers(weights, loading, verify)):
            loading.append(self._send(serialize(buffer.message(index, verify)), flush_cache=False))
        for future in loading[-len(self._buffers) :]:
            self._wait(future)

    def check(self, version: int, *, verify: bool) -> None:
        """Have the engines compare what they hold with what was sent; raise `RefreshFailed` if it differs."""
        self._reports.mkdir(parents=True, exist_ok=True)
        paths: dict[str, Path] = {}

        async def finish(name: str, client: EngineClient) -> None:
            paths[name] = self._reports / f"{name.replace(' ', '-')}.refresh-{version}"
            payload = serialize(FinishMessage(report_path=str(paths[name]), verify=verify))
            await client.update_weights([payload] * self._num_ranks, LOAD_FORMAT, True, self._timeout_s)

        for name in self._wait(self._fleet.call_every_engine(finish)):
            reports = [take_report(Path(f"{paths[name]}.{rank}")) for rank in range(self._num_ranks)]
            if verify and (complaint := complaint_of(reports)):
                raise RefreshFailed(f"refresh to version {version}: {name} {complaint}")

    def commit(self, version: int) -> None:
        """Close the update, name the new weights and decode again."""

        async def end_and_name(name: str, client: EngineClient) -> None:
            await client.end_weight_update(self._timeout_s)
            await client.set_weight_version(version)

        async def resume(name: str, client: EngineClient) -> None:
            await client.resume()

        self._wait(self._fleet.call_every_engine(end_and_name))
        self._wait(self._fleet.call_every_engine(resume))

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()

    def _filled_buffers(
        self, weights: NamedWeights, loading: list[Future[dict[str, None]]], verify: bool
    ) -> Iterator[StagingBuffer]:
        """Yield buffers in turn, each filled; a buffer is not touched before the engines have loaded it."""
        turn = 0
        buffer = self._buffers[0]
        buffer.clear(0)
        is_empty = True
        for name, tensor in weights:
            if not is_empty and not buffer.fits(tensor):
                yield buffer
                turn += 1
                buffer = self._buffers[turn % len(self._buffers)]
                if turn >= len(self._buffers):
                    self._wait(loading[turn - len(self._buffers)])
                is_empty = True
            if is_empty:
                buffer.clear(tensor.nbytes)
            buffer.put(name, tensor, verify)
            is_empty = False
        if is_empty:
            raise ValueError("the policy yielded no weights")
        yield buffer

    def _send(self, payload: str, *, flush_cache: bool) -> Future[dict[str, None]]:
        async def update(name: str, client: EngineClient) -> None:
            await client.update_weights([payload] * self._num_ranks, LOAD_FORMAT, flush_cache, self._timeout_s)

        return self._fleet.call_every_engine(update)

    def _wait(self, future: Future[T]) -> T:
        """Every call has its own limit; the margin only guards against a stuck event loop."""
        return future.result(timeout=2 * self._timeout_s + 60)


def take_report(path: Path) -> RefreshReport:
    report = read_report(path)
    path.unlink()
    return report


def complaint_of(reports: Sequence[RefreshReport]) -> str:
    """Return what is wrong with an engine's weights, given the reports of its ranks, or ""."""
    for rank, report in enumerate(reports):
        if report.corrupted:
            return (
                f"(rank {rank}) holds {len(report.corrupted)} weights that differ from the trainer's: "
                f"{shorten(report.corrupted)}"
            )
        if report.unwritten:
            return (
                f"(rank {rank}) has {len(report.unwritten)} parameters that no traceable copy filled: "
                f"{shorten(report.unwritten)}; either the policy left weights out, or this model cannot be verified: "
                "set rollout.verify_weights to never"
            )
        if report.num_verified == 0:
            return f"(rank {rank}) compared nothing"
    ignored = set.intersection(*(set(report.ignored) for report in reports))
    if ignored:
        return f"has no use for {len(ignored)} weights it was sent: {shorten(tuple(sorted(ignored)))}"
    return ""


def shorten(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    return shown if len(names) <= MAX_NAMES_SHOWN else f"{shown}, ..."


def round_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
