"""What happens when engine and trainer differ too much or ever more: a warning, or the end with the step on record."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o.algorithm import StepResult, TrainState
from megatron_p2o.config.tree import AlarmsConfig, ObjectiveConfig
from megatron_p2o.metrics.trend import Rise, rise_of
from megatron_p2o.metrics.values import Mean, numbers_of
from megatron_p2o.run.observe.alarms import (
    MISMATCH,
    HealthWatch,
    MaskWatch,
    MismatchAlarm,
    MismatchWatch,
    NothingLearnt,
    StepGivenUp,
)
from megatron_p2o.run.observe.observer import RunObserver
from megatron_p2o.run_folder.state import RunState
from megatron_p2o.testing.fakes import FakeLibrary, fake_config, fake_problem, fake_rollout
from megatron_p2o.types import PLAIN, FinishReason, Group, Teaching, UpdateOutcome, UpdateReport, no_tokens

SENTENCE = (
    r"step 0: engine and trainer differ by 0\.25 nats a token \(worst token 3, KL estimate 0\.0625\), more than "
    r"alarms\.mismatch="
)


@pytest.fixture
def observed_step(make_observer: Callable[..., RunObserver]) -> Callable[..., None]:
    """Return what has an observer look at one step."""

    def observe(
        settings: dict[str, Any],
        sums: dict[str, float],
        *,
        outcome: UpdateOutcome = "applied",
        groups: Sequence[Group] = (),
        resumed: RunState | None = None,
    ) -> None:
        report = UpdateReport(
            loss=0.0, grad_norm=1.0, learning_rate=1.0, outcome=outcome, tokens=replace(no_tokens(), **sums)
        )
        result = StepResult(groups=list(groups), hard=[], reports=[report], num_batches=1)
        config = fake_config({"schedule.save_every_steps": 0, "evaluation.every_steps": 0, **settings})
        make_observer(config, resumed=resumed).on_step(TrainState(library=FakeLibrary()), result)

    return observe


SUMS = {"mismatch_tokens": 8.0, "mismatch_abs_sum": 2.0, "mismatch_ratio_sum": 8.0, "mismatch_kl_sum": 0.5}
SUMS |= {"mismatch_abs_max": 3.0}


@pytest.mark.parametrize(("alarm", "warns"), [(0.2, True), (0.25, False)])
def test_a_mismatch_above_the_alarm_is_warned_of_with_its_numbers(
    alarm: float, warns: bool, observed_step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        observed_step({"alarms.mismatch": alarm}, SUMS)
    assert [record.name for record in caplog.records] == (["megatron_p2o.run.observe.alarms"] if warns else [])
    assert ("differ by 0.25 nats a token" in caplog.text) == warns


def test_a_run_that_is_to_stop_at_it_ends_after_the_step_is_on_record(
    observed_step: Callable[..., None], written: list[tuple[str, Any]]
) -> None:
    settings = {"alarms.mismatch": 0.2, "alarms.mismatch_action": "stop", "schedule.save_every_steps": 1}
    with pytest.raises(MismatchAlarm, match=SENTENCE + r"0\.2:"):
        observed_step(settings, SUMS)
    assert {"metrics", "ledger", "rollouts"} <= {name for name, _ in written} and "checkpoint" not in [
        name for name, _ in written
    ]


def test_a_step_that_compared_nothing_alarms_nobody(
    observed_step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    observed_step({"alarms.mismatch_action": "stop"}, {})
    assert not caplog.records


@pytest.mark.parametrize("name", ["mismatch_abs_sum", "mismatch_abs_max"])
def test_a_difference_that_is_no_number_is_too_large(
    name: str, observed_step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    sums = SUMS | {"mismatch_abs_sum": math.nan, name: math.nan}
    observed_step({"alarms.mismatch": 1e9}, sums)
    assert "engine and trainer differ by nan nats a token" in caplog.text
    with pytest.raises(MismatchAlarm, match="differ by nan nats a token"):
        observed_step({"alarms.mismatch": 1e9, "alarms.mismatch_action": "stop"}, sums)


HALF_DROPPED = {"templated_advantage_sum": 8.0, "dropped_advantage_sum": 1.0}
HALF_DROPPED |= {"templated_gain_sum": 2.0, "dropped_gain_sum": 1.5}


@pytest.mark.parametrize(("form", "remedy"), [("hard", "objective.ratio_form=one_sided or "), ("one_sided", "")])
@pytest.mark.parametrize(("alarm", "warns"), [(0.5, True), (0.75, False), (1.0, False)])
def test_a_mask_that_drops_what_templates_bring_is_warned_of(
    alarm: float,
    warns: bool,
    form: str,
    remedy: str,
    observed_step: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    observed_step({"alarms.ratio_mask_dropped": alarm, "objective.ratio_form": form}, HALF_DROPPED)
    sentence = (
        "step 0: the context ratio drops 12% of the advantage of templated rollouts and 75% of what templates add to "
        "the log-probs of successes, more than alarms.ratio_mask_dropped=0.5: training cannot internalise what the "
        f"templates bring: set {remedy}objective.context=replace"
    )
    assert [record.message for record in caplog.records] == [sentence] * warns


def test_the_mask_rings_once_until_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    watch = MaskWatch(0.5, ObjectiveConfig())
    for step, share in enumerate([0.4, 0.6, 0.9, None, 0.7, 0.2, 0.8], start=1):
        watch.look(step, {} if share is None else {"train/ratio_mask_dropped_shift_share": Mean(share, 1.0)})
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 2", "step 7"]


def test_rollouts_that_no_engine_scored_are_warned_of(
    observed_step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    known = Teaching(template=PLAIN, gains=np.zeros(4, np.float32))
    rollout = fake_rollout(fake_problem(0), reward=0.0)
    rollouts = [replace(rollout, teaching=each) for each in (known, replace(known, gains=None), known)]
    group = Group(problem=fake_problem(0), rollouts=(*rollouts, rollout), advantages=(0.0,) * 4)
    observed_step({}, {}, groups=[group])
    (record,) = caplog.records
    assert "step 0: engines gave no log-probs under the template for 1 of 3 rollouts" in record.message


DRIFT = [0.011 + 0.025 * step / 29 for step in range(30)]
"""From 0.011 to 0.036 nats in thirty steps, as others saw it before their policies collapsed."""


def test_a_drift_rings_and_steady_noise_does_not() -> None:
    assert rise_of(DRIFT, times=2.0, floor=1e-3) == Rise(first=pytest.approx(0.011 + 0.025 * 4.5 / 29), last=DRIFT[27])
    exponential = [0.011 * (36 / 11) ** (step / 29) for step in range(30)]
    assert rise_of(exponential, times=2.0, floor=1e-3) is not None
    for seed in range(20):
        generator = np.random.default_rng(seed)
        noise = 0.011 * generator.lognormal(sigma=0.2, size=500)
        assert not any(rise_of(noise[:end].tolist(), times=2.0, floor=1e-3) for end in range(501))


def test_a_rise_needs_both_windows_and_a_level_above_the_arithmetic_s_noise() -> None:
    jump = [0.01] * 10 + [1.0] * 4
    assert rise_of(jump, times=2.0, floor=1e-3) is None
    assert rise_of([*jump, 1.0], times=2.0, floor=1e-3) == Rise(first=0.01, last=1.0)
    assert rise_of([1e-6] * 10 + [1e-3] * 5, times=2.0, floor=1e-3) is None
    assert rise_of([0.01] * 10 + [0.02] * 5, times=2.0, floor=1e-3) is None, "exactly as much is not more"
    assert rise_of([0.01] * 10 + [9.0] * 2 + [0.01] * 3, times=2.0, floor=1e-3) is None, "two outliers are no level"


def looked_at(means: Sequence[float], alarms: AlarmsConfig, earlier: Sequence[float] = ()) -> None:
    watch = MismatchWatch(alarms, earlier)
    for step, mean in enumerate(means, start=1 + len(earlier)):
        one = {MISMATCH: Mean(mean, 1.0), "mismatch/logprob_abs_max": Mean(1, 1), "mismatch/kl_mean": Mean(0, 1)}
        watch.look(step, one)


def test_a_drift_below_the_limit_is_warned_of_once_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    # The middle of the last five at step n is the drift's index n - 3, first more than twice 0.0149 at 22.
    looked_at([*DRIFT, *[0.04] * 10, *[0.011] * 10, *[0.04] * 10], AlarmsConfig())
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 25", "step 53"]
    assert "alarms.mismatch_rise=2 times as much" in caplog.text


def test_a_drift_stops_a_run_that_is_to_stop_and_the_setting_says_from_where_on() -> None:
    stop = AlarmsConfig(mismatch_action="stop")
    with pytest.raises(MismatchAlarm, match=r"step 25: engine and trainer differ by 0\.03"):
        looked_at(DRIFT, stop)
    looked_at(DRIFT, AlarmsConfig(mismatch_action="stop", mismatch_rise=2.5))


def test_a_fresh_run_says_nothing_of_its_first_steps(caplog: pytest.LogCaptureFixture) -> None:
    looked_at([0.001 * 1.5**step for step in range(11)], AlarmsConfig())
    assert not caplog.records


def test_a_resumed_run_compares_with_the_first_steps_of_the_whole_run(
    tmp_path: Path, observed_step: Callable[..., None]
) -> None:
    lines = [
        {"step": step + 1, "epoch": 0, "time": "", "metrics": {MISMATCH: mean, "train/loss": 0.0}}
        for step, mean in enumerate(DRIFT[:27])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = RunState(
        step=27, epoch=0, batch=27, hard_problem_ids=(), library_version=0, num_ledger_entries=0, num_metrics_lines=27
    )
    sums = SUMS | {"mismatch_abs_sum": 8 * DRIFT[27]}
    settings = {"alarms.mismatch_action": "stop"}
    with pytest.raises(MismatchAlarm, match=r"0\.0149 when the run began"):
        observed_step(settings, sums, resumed=state)
    observed_step(settings, sums)


def test_an_update_that_was_skipped_is_warned_of_and_one_without_samples_is_not(
    observed_step: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    observed_step({}, {}, outcome="empty")
    assert not caplog.records
    observed_step({}, {}, outcome="non_finite")
    assert "the gradient of 1 of 1 updates was not finite" in caplog.text


def test_a_step_of_which_nothing_came_back_ends_the_run_with_the_step_on_record(
    observed_step: Callable[..., None], written: list[tuple[str, Any]]
) -> None:
    def group(*reasons: FinishReason) -> Group:
        rollouts = tuple(fake_rollout(fake_problem(1), reward=0, finish_reason=reason) for reason in reasons)
        return Group(problem=fake_problem(1), rollouts=rollouts, advantages=(0.0,) * len(rollouts))

    with pytest.raises(StepGivenUp, match=r"step 0: all 3 rollouts were given up on"):
        observed_step({}, {}, groups=[group("abort", "abort"), group("abort")])
    assert {"metrics", "ledger", "rollouts"} <= {name for name, _ in written}
    observed_step({}, {}, groups=[group("abort", "abort"), group("stop")])


@pytest.mark.parametrize(
    ("num_hard", "settings", "epoch", "expected"),
    [
        (9, {}, 1, 1),
        (10, {}, 1, 0),
        (9, {}, 2, None),
        (9, {"evolution.enabled": False}, 1, None),
    ],
    ids=["too few", "enough", "last epoch", "plain GRPO"],
)
def test_a_round_that_is_skipped_for_want_of_hard_problems_is_warned_of_and_counted_each_time(
    num_hard: int,
    settings: dict[str, Any],
    epoch: int,
    expected: int | None,
    make_observer: Callable[..., RunObserver],
    written: list[tuple[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = fake_config({"hard.min_problems": 10, "schedule.epochs": 2, **settings})
    observer = make_observer(config)
    hard = [fake_problem(number) for number in range(num_hard)]
    observer.on_epoch(TrainState(library=FakeLibrary(), epoch=epoch), hard)
    (numbers,) = [numbers_of(metrics) for _, metrics in written]
    assert numbers["hard/set_size"] == num_hard
    assert numbers.get("evolution/skipped_rounds_count") == expected
    said = (
        "epoch 1: no prompts evolve, all problems are asked without templates: 9 problems are hard, fewer than "
        "hard.min_problems="
    )
    assert (said in caplog.text) == (expected == 1)


def test_a_skipped_round_is_no_alarm_where_prompts_have_evolved_or_nothing_is_hard(
    make_observer: Callable[..., RunObserver], announced: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = fake_config({"hard.min_problems": 10, "schedule.epochs": 3})
    evolved = RunState(step=3, epoch=1, batch=0, hard_problem_ids=(), library_version=1, num_ledger_entries=0)
    for resumed, num_hard in ((replace(evolved, first_round={"num_rollouts": 4.0}), 2), (None, 0)):
        observer = make_observer(config, resumed=resumed)
        state = TrainState(library=FakeLibrary(version=1 if resumed else 0), epoch=2)
        observer.on_epoch(state, [fake_problem(number) for number in range(num_hard)])
        assert announced[-1] == (
            f"epoch 2: no prompts evolve, all problems are asked without templates: {num_hard} problems are hard, "
            "fewer than hard.min_problems=10"
        )
    assert not caplog.records


def test_a_run_without_one_finite_gradient_for_steps_on_end_is_ended_and_vouches_for_no_weights() -> None:
    def reports(*outcomes: UpdateOutcome) -> list[UpdateReport]:
        return [UpdateReport(loss=0.0, grad_norm=0.0, learning_rate=1.0, outcome=outcome) for outcome in outcomes]

    def group(*reasons: FinishReason) -> Group:
        rollouts = tuple(fake_rollout(fake_problem(1), reward=0, finish_reason=reason) for reason in reasons)
        return Group(problem=fake_problem(1), rollouts=rollouts, advantages=(0.0,) * len(rollouts))

    watch, sampled = HealthWatch(), [group("stop", "abort")]
    assert watch.is_healthy(1, sampled, reports("empty", "applied"))
    assert watch.is_healthy(2, sampled, reports("empty", "empty")), "all groups agreed: nothing to learn, and no fault"
    assert not watch.is_healthy(3, [group("abort", "abort")], reports("empty"))
    assert watch.is_healthy(4, sampled, reports("applied", "non_finite")), "the first update speaks for the weights"
    for step in (5, 6):
        assert not watch.is_healthy(step, sampled, reports("non_finite", "non_finite", "empty"))
    assert not watch.is_healthy(7, sampled, reports("non_finite", "applied"))
    for step in (8, 9):
        assert not watch.is_healthy(step, sampled, reports("non_finite"))
    with pytest.raises(NothingLearnt, match="step 10: no gradient of the last 3 steps was finite"):
        watch.is_healthy(10, sampled, reports("non_finite"))
