"""What a refresh costs: bytes, and where its time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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


class Stopwatch:
    """Adds up how long something takes."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - start


@dataclass(frozen=True, slots=True)
class Stopwatches:
    """The parts of a refresh whose time is told; see `RefreshStats`."""

    total: Stopwatch = field(default_factory=Stopwatch)
    convert: Stopwatch = field(default_factory=Stopwatch)
    fill: Stopwatch = field(default_factory=Stopwatch)
    stall: Stopwatch = field(default_factory=Stopwatch)
    wake: Stopwatch = field(default_factory=Stopwatch)

    def stats(self, num_bytes: int, num_buckets: int) -> RefreshStats:
        return RefreshStats(
            num_bytes=num_bytes,
            num_buckets=num_buckets,
            total_s=self.total.seconds,
            convert_s=self.convert.seconds,
            fill_s=self.fill.seconds,
            stall_s=self.stall.seconds,
            wake_s=self.wake.seconds,
        )
