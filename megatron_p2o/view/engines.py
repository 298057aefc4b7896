"""What each engine of a run last wrote of itself: requests, KV cache and speed, from the end of its log."""

import re
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 1 << 16
"""Last part of a log, the part that is read. An engine at work writes a line of a hundred bytes every few seconds."""

LINE = re.compile(
    r"^\[(?P<time>[^\]]{19})[^\]]*\] (?P<kind>Decode|Prefill) batch, (?P<numbers>.*)$", re.ASCII | re.MULTILINE
)
"""How SGLang tells of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """The state of an engine at a time. None where it has not told."""

    name: str
    time: str | None = None
    """When it told, by the clock of its machine."""
    num_running: int | None = None
    num_waiting: int | None = None
    kv_share: float | None = None
    """Share of the KV cache in use."""
    tokens_per_s: float | None = None
    """Sampled, while it last decoded."""


def engine_states(directory: Path) -> list[EngineState]:
    """Return the engines whose logs lie in `engines/` of a run, by number; none where there are no logs to be read.

    Only numbers are taken from a log, whose beginning holds the engine's keys.
    """
    logs = {path.stem: path for path in directory.glob("engine-*.log")}
    names = sorted(logs, key=lambda name: (not _number(name).isdecimal(), _number(name).zfill(8)))
    return [_state(name, logs[name]) for name in names]


def _number(name: str) -> str:
    return name.removeprefix("engine-")


def _state(name: str, log: Path) -> EngineState:
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except OSError:
        return EngineState(name=name)
    told = list(LINE.finditer(tail))
    if not told:
        return EngineState(name=name)
    last = told[-1]
    decoded = [found["numbers"] for found in told if found["kind"] == "Decode"]
    running, waiting = _value(last["numbers"], "#running-req"), _value(last["numbers"], "#queue-req")
    return EngineState(
        name=name,
        time=last["time"],
        num_running=None if running is None else int(running),
        num_waiting=None if waiting is None else int(waiting),
        kv_share=_value(last["numbers"], "token usage"),
        tokens_per_s=_value(decoded[-1], r"gen throughput \(token/s\)") if decoded else None,
    )


def _value(numbers: str, pattern: str) -> float | None:
    found = re.search(rf"(?:^|, ){pattern}: ([0-9]+(?:\.[0-9]+)?)(?:,|$)", numbers)
    return float(found[1]) if found else None
