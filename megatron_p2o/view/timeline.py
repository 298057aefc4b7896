"""When the steps and rounds of a run took place, from the times of its lines and how long they say things took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from megatron_p2o.metrics.read import MetricLine

PHASES_IN_ORDER = ("rollout", "grade", "score", "logprobs", "train", "refresh")
"""Phases within a step, in the order in which they begin. One that comes twice, such as `rollout` under dynamic
sampling, is known by its sum alone, and is drawn once."""

PHASES_BETWEEN = ("save", "evolution")
"""Phases between steps, in order. A line has those that came before its step began."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSpan:
    """A phase, in seconds since 1970."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpan:
    """A step, or what came after the last step of an epoch; times in seconds since 1970."""

    step: int
    begin_s: float
    end_s: float
    is_step: bool
    phases: tuple[PhaseSpan, ...]
    """Those that were measured; between them and after them is what was not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundSpan:
    """The rounds of prompt evolution after an epoch, together; times in seconds since 1970."""

    epoch: int
    begin_s: float
    end_s: float | None
    """None: it runs, or the run lost it."""
    is_beside: bool
    """Training went on meanwhile. A round that has not ended is taken for one."""

    def is_beside_step(self, step: StepSpan) -> bool:
        """Return whether it ran during the step."""
        is_before_its_end = self.end_s is None or step.begin_s < self.end_s
        return self.is_beside and step.is_step and step.end_s > self.begin_s and is_before_its_end


def step_spans(lines: Sequence[MetricLine]) -> list[StepSpan]:
    """Return when the steps and the ends of epochs were, in the order of `lines`, which are as they were written."""
    found: list[StepSpan] = []
    for line in lines:
        end_s = _seconds(line.time)
        seconds = {name: _phase_s(line, name) for name in (*PHASES_IN_ORDER, *PHASES_BETWEEN)}
        step_s = line.metrics.get("perf/step_s")
        if end_s is None or (step_s is None and all(seconds[name] <= 0 for name in PHASES_BETWEEN)):
            continue
        begin_s = end_s if step_s is None else end_s - step_s
        phases = (*_before(begin_s, seconds), *_after(begin_s, end_s, seconds))
        first_s = begin_s if step_s is not None else min(phase.begin_s for phase in phases)
        found.append(StepSpan(step=line.step, begin_s=first_s, end_s=end_s, is_step=step_s is not None, phases=phases))
    return found


def _phase_s(line: MetricLine, phase: str) -> float:
    return line.metrics.get(f"perf/{phase}_s", 0.0)


def _before(end_s: float, seconds: Mapping[str, float]) -> list[PhaseSpan]:
    """Return the phases between steps that ended at `end_s`, one after the other."""
    phases: list[PhaseSpan] = []
    for name in reversed(PHASES_BETWEEN):
        if seconds[name] > 0:
            phases.insert(0, PhaseSpan(name=name, begin_s=end_s - seconds[name], end_s=end_s))
            end_s -= seconds[name]
    return phases


def _after(begin_s: float, end_s: float, seconds: Mapping[str, float]) -> list[PhaseSpan]:
    """Return the phases of a step, one after the other and none beyond its end."""
    phases: list[PhaseSpan] = []
    for name in PHASES_IN_ORDER:
        phase_end_s = min(end_s, begin_s + seconds[name])
        if phase_end_s > begin_s:
            phases.append(PhaseSpan(name=name, begin_s=begin_s, end_s=phase_end_s))
            begin_s = phase_end_s
    return phases


def round_spans(lines: Sequence[MetricLine], epochs: frozenset[int]) -> list[RoundSpan]:
    """Return when rounds were, oldest first.

    Args:
        lines: as they were written.
        epochs: those after which a round has begun: its journal is there.
    """
    found: list[RoundSpan] = []
    running: RoundSpan | None = None
    for line in lines:
        now_s, round_s = _seconds(line.time), line.metrics.get("evolution/round_s")
        if now_s is None:
            continue
        if running is not None and round_s is not None:
            found.append(replace(running, end_s=running.begin_s + round_s))
            running = round_s = None
        if "hard/set_size" in line.metrics and line.epoch - 1 in epochs:
            found += [running] if running is not None else []
            waited_s = _phase_s(line, "evolution")
            begun = RoundSpan(epoch=line.epoch - 1, begin_s=now_s - waited_s, end_s=None, is_beside=True)
            if round_s is None:
                running = begun
            else:  # training waited for it
                found.append(replace(begun, end_s=now_s, is_beside=False))
                running = None
    return [*found, *([running] if running is not None else [])]


def library_times(lines: Sequence[MetricLine]) -> list[tuple[float, int]]:
    """Return when libraries took effect, in seconds since 1970, with their versions."""
    versions = [(_seconds(line.time), line.metrics.get("library/version")) for line in lines]
    return [(time_s, int(version)) for time_s, version in versions if time_s is not None and version is not None]


def _seconds(time: str) -> float | None:
    """Return a time that a run wrote in seconds since 1970; None for another text."""
    try:
        parsed = datetime.fromisoformat(time)
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
