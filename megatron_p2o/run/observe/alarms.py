"""Alarms on a step's metrics: a warning, or the end of the run after the step is recorded."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_never

from megatron_p2o.algorithm import StepResult
from megatron_p2o.config.tree import AlarmsConfig, ObjectiveConfig
from megatron_p2o.metrics.read import read_metrics
from megatron_p2o.metrics.trend import Rise, rise_of
from megatron_p2o.metrics.values import Mean, MetricValue, Sum, numbers_of
from megatron_p2o.types import Group, UpdateReport

logger = logging.getLogger(__name__)

MISMATCH = "mismatch/logprob_abs_mean"
"""Metric key of what engine and trainer differ by."""

MISMATCH_FLOOR = 1e-3
"""Nats a token below which a rising mismatch is rounding: float32 stays below 1e-4."""

MAX_SICK_STEPS = 3
"""Steps on end without one finite gradient after which a run ends."""

MIN_MASTERED = 10
"""Mastered problems in a step below which their failures are no alarm."""

FORGOTTEN = "hard/forgotten_share"
"""Metric key of the share of mastered problems that fail plainly."""


DROPPED = {
    "train/ratio_mask_dropped_advantage_share": "of the advantage of templated rollouts",
    "train/ratio_mask_dropped_shift_share": "of what templates add to the log-probs of successes",
}
"""Metric keys of what the context ratio takes away, and of what it takes."""


class MismatchAlarm(RuntimeError):
    """Engine and trainer differ too much; `alarms.mismatch_action` is stop."""


class StepGivenUp(RuntimeError):
    """Every rollout of a step was given up on."""


class NothingLearnt(RuntimeError):
    """No gradient of several steps on end was finite."""


class Alarms:
    """Looks at every step of a run."""

    def __init__(self, alarms: AlarmsConfig, objective: ObjectiveConfig, earlier_mismatches: Sequence[float]) -> None:
        """`earlier_mismatches`: see `MismatchWatch`."""
        self._alarms = alarms
        self._health = HealthWatch()
        self._mismatch = MismatchWatch(alarms, earlier_mismatches)
        self._mask = MaskWatch(alarms.ratio_mask_dropped, objective)

    def is_healthy(self, step: int, result: StepResult, metrics: Mapping[str, MetricValue]) -> bool:
        """Warn of the problems of a step. Return whether the policy before it could be sampled and trained.

        Raises:
            NothingLearnt: no update of several steps on end had a finite gradient.
        """
        warn_of_forgotten(step, metrics, self._alarms.forgotten)
        warn_of_skipped_updates(step, result.reports)
        warn_of_undecided(step, metrics, self._alarms.undecided)
        warn_of_untaught(step, metrics)
        self._mask.look(step, metrics)
        return self._health.is_healthy(step, result.groups, result.reports)

    def check(self, step: int, result: StepResult, metrics: Mapping[str, MetricValue]) -> None:
        """End the run where going on is no use.

        Raises:
            StepGivenUp: every rollout was given up on.
            MismatchAlarm: engine and trainer differ too much, and settings say stop.
        """
        stop_where_nothing_was_sampled(step, result.groups)
        self._mismatch.look(step, metrics)


class HealthWatch:
    """Tells a step whose numbers are none from one that is well, and ends a run that has only such steps."""

    def __init__(self) -> None:
        self._num_sick = 0

    def is_healthy(self, step: int, groups: Sequence[Group], reports: Sequence[UpdateReport]) -> bool:
        """Return whether the policy before this step could be sampled and learnt from.

        Raises:
            NothingLearnt: no update of `MAX_SICK_STEPS` steps on end had a finite gradient.
        """
        outcomes = [report.outcome for report in reports if report.outcome != "empty"]
        self._num_sick = self._num_sick + 1 if outcomes and set(outcomes) == {"non_finite"} else 0
        if self._num_sick == MAX_SICK_STEPS:
            raise NothingLearnt(f"step {step}: no gradient of the last {MAX_SICK_STEPS} steps was finite")
        is_sampled = any(not rollout.completion.is_aborted for group in groups for rollout in group.rollouts)
        return is_sampled and outcomes[:1] != ["non_finite"]


class MismatchWatch:
    """Compares what engine and trainer differ by with a limit and with the run's own first steps."""

    def __init__(self, alarms: AlarmsConfig, earlier: Sequence[float]) -> None:
        """`earlier`: the mean of each step before, oldest first; of a resumed run those of its checkpoint."""
        self._alarms = alarms
        self._means = list(earlier)
        self._is_risen = self._rise() is not None

    def look(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Take in a step's metrics (`step_metrics`); warn, or stop, where the difference is too large or has risen.

        A rise is warned of once, until it is over. What is no number is too large.

        Raises:
            MismatchAlarm: settings say stop.
        """
        numbers = numbers_of(metrics)
        mean = numbers.get(MISMATCH)
        if mean is None:
            return
        if not mean <= self._alarms.mismatch:
            self._ring(
                f"step {step}: engine and trainer differ by {mean:.3g} nats a token (worst token "
                f"{numbers['mismatch/logprob_abs_max']:.3g}, KL estimate {numbers['mismatch/kl_mean']:.3g}), more than "
                f"alarms.mismatch={self._alarms.mismatch:g}: set logprobs.recompute and "
                "logprobs.importance_cap, or look for a difference in precision or weights"
            )
        if math.isfinite(mean):
            self._means.append(mean)
        self._look_at_rise(step)

    def _look_at_rise(self, step: int) -> None:
        rise, was_risen = self._rise(), self._is_risen
        self._is_risen = rise is not None
        if rise is not None and (not was_risen or self._alarms.mismatch_action == "stop"):
            self._ring(
                f"step {step}: engine and trainer differ by {rise.last:.3g} nats a token, {rise.first:.3g} when the "
                f"run began, more than alarms.mismatch_rise={self._alarms.mismatch_rise:g} times as much"
                ": lower optimizer.lr, set logprobs.recompute and logprobs.importance_cap, or go back to an earlier "
                "checkpoint"
            )

    def _rise(self) -> Rise | None:
        return rise_of(self._means, times=self._alarms.mismatch_rise, floor=MISMATCH_FLOOR)

    def _ring(self, message: str) -> None:
        match self._alarms.mismatch_action:
            case "stop":
                raise MismatchAlarm(message)
            case "warn":
                logger.warning(message)
            case _:
                assert_never(self._alarms.mismatch_action)


class MaskWatch:
    """Warns where the context ratio drops most of what templates teach. Once, until it is over."""

    def __init__(self, alarm: float, objective: ObjectiveConfig) -> None:
        """`alarm`: `alarms.ratio_mask_dropped`."""
        self._alarm = alarm
        others = "" if objective.ratio_form == "one_sided" else "objective.ratio_form=one_sided or "
        self._remedy = f"set {others}objective.context=replace"
        self._is_ringing = False

    def look(self, step: int, metrics: Mapping[str, MetricValue]) -> None:
        """Take in a step's metrics; a step without templated rollouts changes nothing."""
        numbers = numbers_of(metrics)
        shares = {key: numbers[key] for key in DROPPED if key in numbers}
        if not shares:
            return
        was_ringing = self._is_ringing
        self._is_ringing = max(shares.values()) > self._alarm
        if self._is_ringing and not was_ringing:
            logger.warning(
                "step %d: the context ratio drops %s, more than alarms.ratio_mask_dropped=%g: training cannot "
                "internalise what the templates bring: %s",
                *(step, " and ".join(f"{share:.0%} {DROPPED[key]}" for key, share in shares.items()), self._alarm),
                self._remedy,
            )


def earlier_mismatches(run_dir: Path) -> list[float]:
    """Return what engine and trainer differed by in each step that metrics.jsonl holds."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line.metrics[MISMATCH] for line in lines if MISMATCH in line.metrics]


def warn_of_skipped_updates(step: int, reports: Sequence[UpdateReport]) -> None:
    """Warn of updates whose gradient was not finite; one without samples is no fault."""
    num_skipped = sum(report.outcome == "non_finite" for report in reports)
    if num_skipped:
        logger.warning(
            "step %d: the gradient of %d of %d updates was not finite, their rollouts were not trained on: lower "
            "optimizer.lr, or go back to an earlier checkpoint",
            *(step, num_skipped, len(reports)),
        )


def warn_of_forgotten(step: int, metrics: Mapping[str, MetricValue], alarm: float) -> None:
    """Warn where more than the share `alarm` of a step's mastered problems fails plainly.

    See `HardSampleLedger.forgotten`; fewer than `MIN_MASTERED` say nothing.
    """
    share = metrics[FORGOTTEN]
    assert isinstance(share, Mean), "forgotten of mastered problems"
    if share.count >= MIN_MASTERED and share.sum > alarm * share.count:
        logger.warning(
            "step %d: %d of %d mastered problems fail without a template, more than alarms.forgotten=%g: raise "
            "assignment.num_plain, lower optimizer.lr, or go back to an earlier checkpoint",
            *(step, share.sum, share.count, alarm),
        )


def warn_of_undecided(step: int, metrics: Mapping[str, MetricValue], alarm: float) -> None:
    """Warn where the grader could not decide more than the share `alarm` of responses: of a step or an evaluation."""
    for key, share in metrics.items():
        if key.endswith("/undecided_share") and isinstance(share, Mean) and share.sum > alarm * share.count:
            logger.warning(
                "step %d: %s: the grader could not decide %d of %d responses, more than alarms.undecided=%g; they "
                "count neither way: look at them under rollouts/, or raise grading.deadline_s or memory_limit_mib",
                *(step, key.removesuffix("/undecided_share"), share.sum, share.count, alarm),
            )


def warn_of_untaught(step: int, metrics: Mapping[str, MetricValue]) -> None:
    """Warn of rollouts that a template was to teach and that engines gave no log-probs for."""
    num_untaught = metrics.get("distill/untaught_rollouts_count", Sum(0)).value()
    if num_untaught:
        num_taught = metrics["distill/taught_rollouts_count"].value()
        logger.warning(
            "step %d: engines gave no log-probs under the template for %d of %d rollouts (objective.context=distill); "
            "these were not trained on: an earlier warning says why if a request was refused (a prompt with template "
            "and response must fit into the model), else it took longer than rollout.request_timeout_s",
            *(step, num_untaught, num_untaught + num_taught),
        )


def skipped_round(epoch: int, num_hard: int, min_problems: int) -> str:
    """Return that no prompts evolve after an epoch, numbered from 1."""
    return (
        f"epoch {epoch}: no prompts evolve, all problems are asked without templates: {num_hard} problems are hard, "
        f"fewer than hard.min_problems={min_problems}"
    )


def warn_of_a_skipped_round(epoch: int, num_hard: int, min_problems: int) -> None:
    """Warn of an epoch without a round where none has taken place yet, and say what would change that."""
    logger.warning(
        "%s. Unless the others are solved, lower hard.min_problems or raise hard.max_solved",
        skipped_round(epoch, num_hard, min_problems),
    )


def stop_where_nothing_was_sampled(step: int, groups: Sequence[Group]) -> None:
    """Raise `StepGivenUp` when all rollouts of a step were given up on: it has learnt nothing and the next will not.

    A step without rollouts passes.
    """
    reasons = [rollout.completion.finish_reason for group in groups for rollout in group.rollouts]
    if reasons and all(reason == "abort" for reason in reasons):
        raise StepGivenUp(
            f"step {step}: all {len(reasons)} rollouts were given up on. An earlier warning says why if the engines "
            "gave no usable answer; otherwise the rollouts took longer than rollout.request_timeout_s"
        )
