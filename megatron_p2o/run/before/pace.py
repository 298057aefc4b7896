"""How fast a run has been by its own metrics, and how long the rest of it will take."""

from pathlib import Path
from statistics import median

from megatron_p2o.config.tree import ScheduleConfig
from megatron_p2o.machine.preflight import Pace
from megatron_p2o.metrics.read import read_metrics
from megatron_p2o.run_folder.checkpoints import pointed_name
from megatron_p2o.run_folder.state import STATE_FILE, CheckpointError, read_state

NUM_RECENT = 20
"""Steps that tell the pace: the newest."""

STEP_KEY, SAVE_KEY = (f"perf/{phase}_s" for phase in ("step", "save"))

HOUR_S = 3600.0


def pace_of(run_dir: Path) -> Pace | None:
    """Return the pace of the newest steps, also of those after the checkpoint that it goes on from; None before any."""
    lines = [line.metrics for line in read_metrics(run_dir / "metrics.jsonl") if line.metrics.get(STEP_KEY, 0.0) > 0]
    recent = lines[-NUM_RECENT:]
    if not recent:
        return None
    return Pace(
        num_steps=len(recent),
        step_s=median(metrics[STEP_KEY] for metrics in recent),
        save_s=max(metrics.get(SAVE_KEY, 0.0) for metrics in recent),
    )


def num_steps_done(run_dir: Path) -> int:
    """Return at which step the run's newest checkpoint stands; 0 where there is none that can be read."""
    checkpoints = run_dir / "checkpoints"
    try:
        name = pointed_name(checkpoints)
        return read_state(checkpoints / name / STATE_FILE).step if name else 0
    except CheckpointError:
        return 0


def measured_hours(pace: Pace, num_left: int) -> str:
    """Return how long `num_left` steps take at this pace, as a line."""
    return (
        f"hours: about {num_left * pace.step_s / HOUR_S:.2f} for the {num_left} steps that are left, of "
        f"{pace.step_s:.1f} s: the median of the run's last {pace.num_steps}. Evaluations, checkpoints and rounds that "
        "training waits for come on top"
    )


def unknown_hours(schedule: ScheduleConfig) -> str:
    """Return what is known of a run's hours where nothing has measured or simulated a step, as a line."""
    limit = f", at most schedule.max_hours={schedule.max_hours:g}" if schedule.max_hours is not None else ""
    return f"hours: unknown before the first steps{limit}"
