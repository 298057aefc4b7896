"""The weights of a refresh, bucket by bucket: in host memory, and with an outlet also on the trainer's devices.

Rank 0 draws them from the policy, in step with the other ranks (`LockStep`), which draw and fill the same buckets.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from megatron_p2o.interfaces import NamedWeights
from megatron_p2o.rollout.buckets.device_memory import finish_copies
from megatron_p2o.rollout.buckets.staging import StagingBuffer, laid_out
from megatron_p2o.rollout.buckets.weight_message import TensorEntry
from megatron_p2o.rollout.refresh.cost import Stopwatch, Stopwatches
from megatron_p2o.rollout.refresh.outlet import WeightOutlet

Placed = tuple[int, TensorEntry, Tensor]
"""Number of the bucket, place in it, weight."""


class LockStep:
    """Rank 0's place among the ranks that fill the same buckets. Without an outlet it is alone and never waits."""

    def __init__(self, outlet: WeightOutlet | None) -> None:
        self._outlet = outlet
        self._placed: Iterator[Placed] = iter(())
        self._num_due = self._num_met = 0
        """Number of barriers that the other ranks have reached or will reach, and number that rank 0 has reached."""

    def start(self, weights: NamedWeights, bucket_bytes: int) -> Iterator[Placed]:
        """Return the weights with their places, and note from them which buckets are full on the other ranks."""
        self._num_due = self._num_met = 0
        self._placed = self._place(weights, bucket_bytes)
        return self._placed

    def meet(self) -> None:
        """Wait until the drawn bucket is full on all devices. Then the one before may be overwritten."""
        while self._outlet is not None and self._num_met < self._num_due:
            self._num_met += 1
            self._outlet.meet()

    def finish(self) -> None:
        """Run the remaining barriers of a failed refresh, so that the other ranks do not hang. After a success: none.

        The policy's ranks gather and meet in lock step: leaving them in the middle would hang the others.
        """
        self.meet()
        for _ in self._placed:
            self.meet()
        self.meet()

    def _place(self, weights: NamedWeights, bucket_bytes: int) -> Iterator[Placed]:
        for index, entry, tensor in laid_out(weights, bucket_bytes):
            self._num_due = index
            yield index, entry, tensor
            del tensor
        self._num_due += 1


class StagedWeights:
    """The buckets, which keep what they hold until the next refresh: engines that join late are given it."""

    def __init__(self, bucket_bytes: int, outlet: WeightOutlet | None) -> None:
        self.buckets: list[StagingBuffer] = []
        """All there are; a refresh of fewer weights leaves the last ones out."""
        self.lock_step = LockStep(outlet)
        self._bucket_bytes = bucket_bytes
        self._outlet = outlet
        self._num_filled = 0

    @property
    def filled(self) -> Sequence[StagingBuffer]:
        """The buckets that hold the weights."""
        return self.buckets[: self._num_filled]

    def fill(self, weights: NamedWeights, watches: Stopwatches, *, verify: bool) -> Iterator[StagingBuffer]:
        """Yield buckets as they fill; each weight is copied before the next is asked for."""
        self._num_filled = 0
        placed = self.lock_step.start(timed(weights, watches.convert), self._bucket_bytes)
        return self._fill(placed, watches.fill, verify)

    def close(self) -> None:
        for bucket in self.buckets:
            bucket.close()

    def _fill(self, placed: Iterator[Placed], watch: Stopwatch, verify: bool) -> Iterator[StagingBuffer]:
        bucket: StagingBuffer | None = None
        current = -1
        for index, entry, tensor in placed:
            if bucket is not None and index != current:
                yield self._finished(bucket, watch)
            with watch.running():
                if bucket is None or index != current:
                    bucket, current = self._empty_bucket(index, tensor.nbytes), index
                bucket.put(entry, tensor, verify)
                if self._outlet is not None:
                    self._outlet.put(index, entry, tensor)
                del tensor
        assert bucket is not None
        yield self._finished(bucket, watch)

    def _finished(self, bucket: StagingBuffer, watch: Stopwatch) -> StagingBuffer:
        """Return the bucket when everything lies in it."""
        with watch.running():
            finish_copies()
        self._num_filled += 1
        return bucket

    def _empty_bucket(self, index: int, room_bytes: int) -> StagingBuffer:
        if index == len(self.buckets):
            self.buckets.append(StagingBuffer(index, max(self._bucket_bytes, room_bytes)))
        self.buckets[index].clear(room_bytes)
        return self.buckets[index]


def timed(weights: NamedWeights, watch: Stopwatch) -> NamedWeights:
    """Yield `weights` and measure how long each is waited for."""
    iterator = iter(weights)
    while True:
        with watch.running():
            item = next(iterator, None)
        if item is None:
            return
        yield item
        del item
