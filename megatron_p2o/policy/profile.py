"""Where the time of an update goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def traced(path: Path | None) -> Iterator[None]:
    """Write what runs inside as a Chrome trace to `path`, a .json.gz; without a path nothing is recorded.

    CPU operators, and CUDA kernels where there are any. Opens in Perfetto or chrome://tracing.
    """
    if path is None:
        yield
        return
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as recorded:
        yield
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(path))
