"""What engines are busy for: the time in which they have requests, summed over engines."""

from types import SimpleNamespace
from typing import Any

from megatron_p2o.rollout.requests import BusyTime, EngineHandle


def test_engines_are_busy_while_they_have_requests_and_their_times_add_up() -> None:
    now = SimpleNamespace(s=10.0)
    client: Any = None
    first, second = (EngineHandle(name, client, str, 0) for name in ("engine-0", "engine-1"))
    busy = BusyTime(lambda: now.s)
    request, other, task = object(), object(), object()
    running: list[Any] = [first.running, second.running]
    running[0][request] = task
    busy.note(first)
    now.s = 12.0
    running[0][other] = task
    busy.note(first)
    running[1][request] = task
    busy.note(second)
    now.s = 13.0
    assert busy.total_s() == 3.0 + 1.0, "two requests of one engine are one busy engine"
    del running[0][request]
    busy.note(first)
    del running[1][request]
    busy.note(second)
    now.s = 20.0
    assert busy.total_s() == 10.0 + 1.0
    running[0].clear()
    busy.note(first)
    now.s = 100.0
    assert busy.total_s() == 11.0
