"""What a refresh asks of one engine: to open an update, load buckets, report what it holds, and give memory away."""

from collections.abc import Sequence
from pathlib import Path

from megatron_p2o.rollout.buckets.staging import StagingBuffer
from megatron_p2o.rollout.buckets.weight_message import LOAD_FORMAT, FinishMessage, MemoryAddress, serialize
from megatron_p2o.rollout.refresh.refresh_verdict import judge, take_report
from megatron_p2o.rollout.servers.answers import EngineRefused
from megatron_p2o.rollout.servers.client import EngineClient


class EngineUpdate:
    """Updates engines of `num_ranks` each, whose ranks write their reports into `report_directory`."""

    def __init__(self, report_directory: Path, num_ranks: int) -> None:
        self._reports = report_directory.resolve()
        self._num_ranks = num_ranks

    def report_path(self, name: str, occasion: str) -> Path:
        """Return where the ranks of an engine report on an `occasion`, which no other update of the run shares."""
        return self._reports / f"{name.replace(' ', '-')}.{occasion}"

    async def load(
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

    async def finish(self, client: EngineClient, path: Path, verify: bool) -> None:
        """Make every rank of the engine write its report to `path`.rank and drop its cache of old weights."""
        self._reports.mkdir(parents=True, exist_ok=True)
        payload = serialize(FinishMessage(report_path=str(path), verify=verify))
        await client.update_weights([payload] * self._num_ranks, LOAD_FORMAT, True)

    def judge(self, subject: str, path: Path, verify: bool) -> None:
        """Raise the error of an engine by the reports that its ranks wrote in `finish`."""
        judge(subject, [take_report(Path(f"{path}.{rank}")) for rank in range(self._num_ranks)], verify=verify)


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
