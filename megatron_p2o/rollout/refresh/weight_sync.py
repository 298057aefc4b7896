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
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.refresh.cost import RefreshStats, Stopwatches
from megatron_p2o.rollout.refresh.engine_update import EngineUpdate, pause_and_begin, pause_and_release
from megatron_p2o.rollout.refresh.outlet import WeightOutlet
from megatron_p2o.rollout.refresh.refresh_verdict import MemoryOutOfReach, RefreshFailed
from megatron_p2o.rollout.refresh.staged_weights import StagedWeights
from megatron_p2o.rollout.servers.answers import EngineRefused
from megatron_p2o.rollout.servers.client import KV_CACHE, WEIGHTS, EngineClient

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
        self._engine_update = EngineUpdate(report_directory, tensor_parallel)
        self._answer_timeout_s = answer_timeout_s
        self._outlet = outlet
        self._sends_to_devices = outlet is not None
        self._staged = StagedWeights(bucket_bytes, outlet)
        self._watches = Stopwatches()
        self._version: int | None = None
        self._is_lent = False

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
        self._watches = Stopwatches()
        try:
            with self._watches.total.running():
                self._replace(weights, version, verify)
        except EngineRefused as error:
            raise RefreshFailed(f"refresh to version {version}: {error}") from error
        finally:
            self._staged.lock_step.finish()
        self._version = version
        self._is_lent = False
        filled = self._staged.filled
        return self._watches.stats(sum(bucket.used_bytes for bucket in filled), len(filled))

    def _replace(self, weights: NamedWeights, version: int, verify: bool) -> None:
        """Load, check and serve; where devices cannot be read, once more through host memory."""
        buckets = self.stage(weights, verify=verify)
        # What is on its way over the devices has no room for more than the next bucket.
        gathers_first = self._is_lent and self._outlet is None
        self.load(list(buckets) if gathers_first else buckets, verify=verify)
        try:
            self.check(version, verify=verify)
        except MemoryOutOfReach as error:
            self._leave_devices(error)
            self.load(self._staged.filled, verify=verify)
            self.check(version, verify=verify)
        self.commit(version)

    async def restore(self, name: str, client: EngineClient, *, verify: bool) -> None:
        """Give an engine that joins late the weights of the last refresh, under their version.

        Raises:
            RefreshFailed: the engine holds other weights than it was sent.
            EngineRefused, EngineUnreachable, TimeoutError
        """
        assert self._version is not None
        await pause_and_begin(name, client)
        for index, bucket in enumerate(self._staged.filled):
            if verify:
                bucket.add_checksums()
            await self._engine_update.load(client, bucket, index, verify)
        path = self._engine_update.report_path(name, f"restore-{self._version}")
        await self._engine_update.finish(client, path, verify)
        self._engine_update.judge(f"restoring version {self._version}: {name}", path, verify)
        await client.end_weight_update()
        await client.set_weight_version(self._version)
        await client.resume()

    def stage(self, weights: NamedWeights, *, verify: bool) -> Iterator[StagingBuffer]:
        """Yield buckets as they fill."""
        return self._staged.fill(weights, self._watches, verify=verify)

    def load(self, buckets: Iterable[StagingBuffer], *, verify: bool) -> None:
        """Open an update when the first bucket is full, and send all; while the engines load one the next is filled."""
        loading: Future[dict[str, None]] | None = None
        for index, bucket in enumerate(buckets):
            if loading is None:
                self._meet()
                self.begin()
            else:
                self._stall(loading)
                self._meet()
            loading = self._send(bucket, index, verify)
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
            paths[name] = self._engine_update.report_path(name, f"refresh-{version}")
            await self._engine_update.finish(client, paths[name], verify)

        for name in self._wait(self._fleet.call_every_engine(finish)):
            self._engine_update.judge(f"refresh to version {version}: {name}", paths[name], verify)

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
        self._staged.close()

    def begin(self) -> None:
        """Stop decoding and open an update, for which lent weights get their memory back.

        Closes an update that a failed refresh left open.
        """
        self._wake(WEIGHTS)
        self._wait(self._fleet.call_every_engine(pause_and_begin))

    def _send(self, bucket: StagingBuffer, index: int, verify: bool) -> Future[dict[str, None]]:
        async def update(name: str, client: EngineClient) -> None:
            outlet = self._outlet if self._sends_to_devices else None
            addresses = None if outlet is None else outlet.addresses(name, index)
            await self._engine_update.load(client, bucket, index, verify, addresses)

        return self._fleet.call_every_engine(update)

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
            with self._watches.wake.running():
                self._wait(self._fleet.call_every_engine(resume_memory))

    def _meet(self) -> None:
        with self._watches.convert.running():
            self._staged.lock_step.meet()

    def _stall(self, loading: Future[dict[str, None]]) -> None:
        with self._watches.stall.running():
            self._wait(loading)

    def _wait(self, future: Future[T]) -> T:
        """Every call has its own limit; the margin only guards against a stuck event loop."""
        limit_s = 4 * self._answer_timeout_s + 60
        if not wait([future], limit_s).done:
            raise TimeoutError(f"the engines' calls did not end within {limit_s:g} s, four of rollout.stall_timeout_s")
        return future.result()
