"""Moves the trainer's weights into every engine and proves that they arrived.

    first bucket  ->  pause, begin  ->  bucket, bucket, ...  ->  finish, check reports  ->  end, set version, resume

While the engines load a bucket the next one is gathered, converted and laid out. Nothing is served and no version is
set before every engine has confirmed; after a failure the engines stay paused until a later refresh succeeds. An engine
that is lost on the way drops out and the others go on.

Engines whose memory was lent to the trainer (`lend`) get it back on the way, as late as can be: the KV cache comes
last, and when weights go through host memory the trainer gathers and converts everything first.

    pause, release  ->  ... training ...  ->  all buckets  ->  weights' memory, begin  ->  bucket, bucket, ...
        ->  finish, check reports  ->  end, set version, KV cache's memory, resume

With an outlet (`refresh.outlet`) every bucket also lies on the engines' own devices, and they take it from there.

The buckets stay in host memory as they are until the next refresh: an engine that replaces a lost one is given the
weights that the others serve, without the trainer. That takes as much memory as the weights do, once per machine.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.buckets.device_memory import finish_copies
from megatron_p2o.rollout.buckets.staging import StagingBuffer, laid_out
from megatron_p2o.rollout.buckets.weight_message import (
    LOAD_FORMAT,
    FinishMessage,
    MemoryAddress,
    TensorEntry,
    serialize,
)
from megatron_p2o.rollout.refresh.outlet import WeightOutlet
from megatron_p2o.rollout.refresh.refresh_verdict import MemoryOutOfReach, RefreshFailed, judge, take_report
from megatron_p2o.rollout.servers.client import KV_CACHE, WEIGHTS, EngineClient, EngineRefused

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Fleet(Protocol):
    """The engines as a refresh needs them; `rollout.broker` provides it."""

    def call_every_engine(self, call: Callable[[str, EngineClient], Awaitable[T]]) -> Future[dict[str, T]]:
        """Run `call(name, client)` for all engines at once; the result is by name.

        Engines that turn out to be gone are left out; when none is left and none will come the future holds
        `EnginesLost`.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RefreshStats:
    """What a refresh cost."""

    num_bytes: int
    """Size of all weights, which each engine gets."""
    num_buckets: int
    total_s: float
    """Time from the start to the engines' resumption. They pause when the first bucket is full."""
    convert_s: float
    """Waiting for the trainer to gather and convert the next weight."""
    fill_s: float
    """Copying weights into buckets, with their checksums."""
    stall_s: float
    """Waiting for the engines to load a bucket while the next is ready, and at the end."""
    wake_s: float
    """Waiting for lent memory to come back to the engines."""

    def metrics(self) -> dict[str, float]:
        """Return the numbers by metric key."""
        return {
            "refresh/bytes": self.num_bytes,
            "refresh/buckets_count": self.num_buckets,
            "refresh/total_s": self.total_s,
            "refresh/convert_s": self.convert_s,
            "refresh/fill_s": self.fill_s,
            "refresh/stall_s": self.stall_s,
            "refresh/wake_s": self.wake_s,
            "refresh/gbytes_per_s": self.num_bytes / self.total_s / 1e9,
        }


class WeightSync:
    """Refreshes the weights of all engines. Called from the algorithm thread, which owns the weights' iterator."""

    def __init__(
        self,
        fleet: Fleet,
        report_directory: Path,
        *,
        tensor_parallel: int,
        answer_timeout_s: float,
        bucket_bytes: int,
        outlet: WeightOutlet | None = None,
    ) -> None:
        """Args:
        tensor_parallel: ranks per engine; each reads the same bucket and writes its own report.
        answer_timeout_s: how long an engine may take to answer before its client gives up.
        bucket_bytes: size of a staging buffer; a larger tensor gets a bucket of its own.
        outlet: rank 0's end of the way over devices; None goes through host memory.
        """
        self._fleet = fleet
        self._reports = report_directory.resolve()
        self._num_ranks = tensor_parallel
        self._answer_timeout_s = answer_timeout_s
        self._bucket_bytes = bucket_bytes
        self._outlet = outlet
        self._sends_to_devices = outlet is not None
        self._placed: Iterator[tuple[int, TensorEntry, Tensor]] = iter(())
        self._num_due = self._num_met = 0
        """Number of barriers that the other trainer ranks have reached or will reach, and number that rank 0 has
        reached."""
        self._buckets: list[StagingBuffer] = []
        self._num_filled = 0
        self._version: int | None = None
        self._is_lent = False
        self._convert_s = self._fill_s = self._stall_s = self._wake_s = 0.0

    @property
    def version(self) -> int | None:
        """Version of the weights that `restore` gives; None before the first refresh, after a failed one, and while
        the engines' memory is lent."""
        return self._version

    def lend(self) -> None:
        """Stop decoding and take the memory of weights and KV cache from the engines until the next refresh. On return
        it is free on every GPU. Running requests start again when the refresh has ended.

        Raises:
            RefreshFailed: an engine refused.
            EnginesLost: no engine is left and none will come.
        """
        self._version = None
        self._is_lent = True
        try:
            self._wait(self._fleet.call_every_engine(pause_and_release))
        except EngineRefused as error:
            raise RefreshFailed(f"lending the engines' memory: {error}") from error

    def refresh(self, weights: NamedWeights, version: int, *, verify: bool) -> RefreshStats:
        """Load `weights` into every engine and serve them as `version`. Always consumes them to the end.

        Raises:
            RefreshFailed: an engine refused or holds other weights than it was sent.
            EnginesLost: no engine is left and none will come.
        """
        self._version = None
        self._convert_s = self._fill_s = self._stall_s = self._wake_s = 0.0
        start = time.monotonic()
        buckets = self.stage(weights, verify=verify)
        try:
            # What is on its way over the devices has no room for more than the next bucket.
            gathers_first = self._is_lent and self._outlet is None
            self.load(list(buckets) if gathers_first else buckets, verify=verify)
            try:
                self.check(version, verify=verify)
            except MemoryOutOfReach as error:
                self._leave_devices(error)
                self.load(list(self._filled), verify=verify)
                self.check(version, verify=verify)
            self.commit(version)
        except EngineRefused as error:
            raise RefreshFailed(f"refresh to version {version}: {error}") from error
        finally:
            self._keep_step()
        self._version = version
        self._is_lent = False
        return RefreshStats(
            num_bytes=sum(bucket.used_bytes for bucket in self._filled),
            num_buckets=self._num_filled,
            total_s=time.monotonic() - start,
            convert_s=self._convert_s,
            fill_s=self._fill_s,
            stall_s=self._stall_s,
            wake_s=self._wake_s,
        )

    async def restore(self, name: str, client: EngineClient, *, verify: bool) -> None:
        """Give an engine that joins late the weights of the last refresh, under their version.

        Raises:
            RefreshFailed: the engine holds other weights than it was sent.
            EngineRefused, EngineUnreachable, TimeoutError
        """
        assert self._version is not None
        await pause_and_begin(name, client)
        for index, bucket in enumerate(self._filled):
            if verify:
                bucket.add_checksums()
            await self._update(client, bucket, index, verify)
        path = self._reports / f"{name.replace(' ', '-')}.restore-{self._version}"
        await self._finish(client, path, verify)
        self._judge(f"restoring version {self._version}: {name}", path, verify)
        await client.end_weight_update()
        await client.set_weight_version(self._version)
        await client.resume()

    def stage(self, weights: NamedWeights, *, verify: bool) -> Iterator[StagingBuffer]:
        """Yield buckets as they fill."""
        self._num_due = self._num_met = 0
        self._placed = self._place(weights)
        return self._fill(self._placed, verify)

    def _fill(self, placed: Iterator[tuple[int, TensorEntry, Tensor]], verify: bool) -> Iterator[StagingBuffer]:
        bucket: StagingBuffer | None = None
        current = -1
        for index, entry, tensor in placed:
            if bucket is not None and index != current:
                yield self._finished(bucket)
            start = time.monotonic()
            if bucket is None or index != current:
                bucket, current = self._empty_bucket(index, tensor.nbytes), index
            bucket.put(entry, tensor, verify)
            if self._outlet is not None:
                self._outlet.put(index, entry, tensor)
            del tensor
            self._fill_s += time.monotonic() - start
        assert bucket is not None
        yield self._finished(bucket)

    def load(self, buckets: Iterable[StagingBuffer], *, verify: bool) -> None:
        """Open an update when the first bucket is full, and send all; while the engines load one the next is filled."""
        self._num_filled = 0
        loading: Future[dict[str, None]] | None = None
        for index, bucket in enumerate(buckets):
            if loading is None:
                self._meet()
                self.begin()
            else:
                self._stall(loading)
                self._meet()
            loading = self._send(bucket, index, verify)
            self._num_filled += 1
        if loading is not None:
            self._stall(loading)

    def check(self, version: int, *, verify: bool) -> None:
        """Make the engines compare their weights with those sent.

        Raises:
            RefreshFailed: it differs.
            MemoryOutOfReach: they could not read it.
        """
        paths: dict[str, Path] = {}

        async def finish(name: str, client: EngineClient) -> None:
            paths[name] = self._reports / f"{name.replace(' ', '-')}.refresh-{version}"
            await self._finish(client, paths[name], verify)

        for name in self._wait(self._fleet.call_every_engine(finish)):
            self._judge(f"refresh to version {version}: {name}", paths[name], verify)

    def commit(self, version: int) -> None:
        """Close the update, name the new weights, bring the KV cache's memory back if it is lent, and decode again."""

        async def end_and_name(name: str, client: EngineClient) -> None:
            await client.end_weight_update()
            await client.set_weight_version(version)

        async def resume(name: str, client: EngineClient) -> None:
            await client.resume()

        self._wait(self._fleet.call_every_engine(end_and_name))
        self._wake(KV_CACHE)
        self._wait(self._fleet.call_every_engine(resume))

    def close(self) -> None:
        for bucket in self._buckets:
            bucket.close()

    def begin(self) -> None:
        """Stop decoding and open an update, for which lent weights get their memory back.

        Closes an update that a failed refresh left open.
        """
        self._wake(WEIGHTS)
        self._wait(self._fleet.call_every_engine(pause_and_begin))

    @property
    def _filled(self) -> Sequence[StagingBuffer]:
        return self._buckets[: self._num_filled]

    def _finished(self, bucket: StagingBuffer) -> StagingBuffer:
        """Return the bucket when everything lies in it."""
        start = time.monotonic()
        finish_copies()
        self._fill_s += time.monotonic() - start
        return bucket

    def _place(self, weights: NamedWeights) -> Iterator[tuple[int, TensorEntry, Tensor]]:
        """Yield weights with their places, and note which buckets are full on the other ranks."""
        for index, entry, tensor in laid_out(self._timed(weights), self._bucket_bytes):
            self._num_due = index
            yield index, entry, tensor
            del tensor
        self._num_due += 1

    def _meet(self) -> None:
        """Wait until the bucket is full on all devices. Then the one before may be overwritten."""
        start = time.monotonic()
        while self._outlet is not None and self._num_met < self._num_due:
            self._num_met += 1
            self._outlet.meet()
        self._convert_s += time.monotonic() - start

    def _keep_step(self) -> None:
        """Run the remaining barriers of a failed refresh, so that the other ranks do not hang.

        The policy's ranks gather and meet in lock step: leaving them in the middle would hang the others.
        """
        self._meet()
        for _ in self._placed:
            self._meet()
        self._meet()

    def _empty_bucket(self, index: int, room_bytes: int) -> StagingBuffer:
        if index == len(self._buckets):
            self._buckets.append(StagingBuffer(index, max(self._bucket_bytes, room_bytes)))
        self._buckets[index].clear(room_bytes)
        return self._buckets[index]

    def _timed(self, weights: NamedWeights) -> NamedWeights:
        """Yield `weights` and measure how long each is waited for."""
        iterator = iter(weights)
        while True:
            start = time.monotonic()
            item = next(iterator, None)
            self._convert_s += time.monotonic() - start
            if item is None:
                return
            yield item
            del item

    def _send(self, bucket: StagingBuffer, index: int, verify: bool) -> Future[dict[str, None]]:
        async def update(name: str, client: EngineClient) -> None:
            outlet = self._outlet if self._sends_to_devices else None
            addresses = None if outlet is None else outlet.addresses(name, index)
            await self._update(client, bucket, index, verify, addresses)

        return self._fleet.call_every_engine(update)

    async def _update(
        self,
        client: EngineClient,
        bucket: StagingBuffer,
        index: int,
        verify: bool,
        addresses: Sequence[MemoryAddress] | None = None,
    ) -> None:
        """Have every rank of an engine load a bucket, from its own address or else from the engine's host memory."""
        addresses = addresses or [await client.place(bucket)] * self._num_ranks
        payloads = [serialize(bucket.message(index, address, verify)) for address in addresses]
        await client.update_weights(payloads, LOAD_FORMAT, False)

    async def _finish(self, client: EngineClient, path: Path, verify: bool) -> None:
        """Make every rank of the engine write its report to `path`.rank and drop its cache of old weights."""
        self._reports.mkdir(parents=True, exist_ok=True)
        payload = serialize(FinishMessage(report_path=str(path), verify=verify))
        await client.update_weights([payload] * self._num_ranks, LOAD_FORMAT, True)

    def _judge(self, subject: str, path: Path, verify: bool) -> None:
        """Raise the error of an engine by the reports that its ranks wrote in `_finish`."""
        judge(subject, [take_report(Path(f"{path}.{rank}")) for rank in range(self._num_ranks)], verify=verify)

    def _leave_devices(self, error: MemoryOutOfReach) -> None:
        """Use host memory from now on, or raise `error` if the settings do not allow that."""
        if self._outlet is None or self._outlet.is_only_way or not self._sends_to_devices:
            raise error
        self._sends_to_devices = False
        logger.warning("%s; from now on weights go to the engines through host memory", error)

    def _wake(self, part: str) -> None:
        """Give lent memory back; engines that joined since have theirs."""

        async def resume_memory(name: str, client: EngineClient) -> None:
            await client.resume_memory(part)

        if self._is_lent:
            start = time.monotonic()
            self._wait(self._fleet.call_every_engine(resume_memory))
            self._wake_s += time.monotonic() - start

    def _stall(self, loading: Future[dict[str, None]]) -> None:
        start = time.monotonic()
        self._wait(loading)
        self._stall_s += time.monotonic() - start

    def _wait(self, future: Future[T]) -> T:
        """Every call has its own limit; the margin only guards against a stuck event loop."""
        limit_s = 4 * self._answer_timeout_s + 60
        if not wait([future], limit_s).done:
            raise TimeoutError(f"the engines' calls did not end within {limit_s:g} s, four of rollout.stall_timeout_s")
        return future.result()


async def pause_and_begin(name: str, client: EngineClient) -> None:
    """Stop an engine's decoding and open an update; closes one that was left open."""
    await client.pause()
    try:
        await client.begin_weight_update()
    except EngineRefused:
        await client.end_weight_update()
        await client.begin_weight_update()


async def pause_and_release(name: str, client: EngineClient) -> None:
    """Stop an engine's decoding and give its memory away, on all of its ranks when this returns."""
    await client.pause()
    await client.release_memory()
    # Only rank 0 answers a release; an update is opened by all ranks together, and touches no weight.
    await client.begin_weight_update()
