"""When steps and rounds took place, by lines as a run writes them."""

from collections.abc import Mapping

import pytest

from megatron_p2o.metrics.read import MetricLine
from megatron_p2o.view.timeline import PhaseSpan, StepSpan, library_times, round_spans, step_spans

NOON_S = 1767268800.0
"""2026-01-01 12:00 UTC in seconds since 1970."""


def line(second: float, step: int, epoch: int = 0, **metrics: float) -> MetricLine:
    time = f"2026-01-01T12:00:{second:06.3f}+00:00"
    named = {name.replace("__", "/"): number for name, number in metrics.items()}
    return MetricLine(step=step, epoch=epoch, time=time, metrics=named, num_not_finite=0)


def spans(step: StepSpan) -> Mapping[str, tuple[float, float]]:
    return {each.name: (round(each.begin_s - NOON_S, 3), round(each.end_s - NOON_S, 3)) for each in step.phases}


def test_phases_stand_one_after_the_other_within_their_step() -> None:
    told = {"perf__step_s": 8.0, "perf__rollout_s": 4.0, "perf__train_s": 2.0, "perf__grade_s": 1.0}
    (step,) = step_spans([line(20.0, 3, 0, **told, perf__refresh_s=0.5, perf__save_s=1.5)])
    assert (step.step, step.is_step, step.begin_s - NOON_S, step.end_s - NOON_S) == (3, True, 12.0, 20.0)
    assert spans(step) == {
        "save": (10.5, 12.0),  # a save is done between steps
        "rollout": (12.0, 16.0),
        "grade": (16.0, 17.0),
        "train": (17.0, 19.0),
        "refresh": (19.0, 19.5),
    }


def test_phases_that_overlapped_do_not_leave_their_step() -> None:
    (step,) = step_spans([line(20.0, 1, perf__step_s=5.0, perf__rollout_s=4.0, perf__train_s=3.0)])
    assert spans(step) == {"rollout": (15.0, 19.0), "train": (19.0, 20.0)}


def test_the_end_of_an_epoch_is_a_part_of_its_own_and_other_lines_are_none() -> None:
    lines = [
        line(10.0, 4, 1, perf__save_s=1.0, perf__evolution_s=3.0, hard__set_size=5.0),
        line(11.0, 4, 1, eval__easy__avg=0.5),
        MetricLine(step=5, epoch=1, time="</script>", metrics={"perf/step_s": 1.0}, num_not_finite=0),
    ]
    (end,) = step_spans(lines)
    assert not end.is_step and (end.begin_s - NOON_S, end.end_s - NOON_S) == (6.0, 10.0)
    assert end.phases[-1] == PhaseSpan(name="evolution", begin_s=NOON_S + 7.0, end_s=NOON_S + 10.0)


def test_a_round_beside_training_lasts_from_the_end_of_its_epoch_as_long_as_it_says() -> None:
    steps = [line(second, step, perf__step_s=4.0) for step, second in enumerate((10, 20, 30, 40), start=1)]
    lines = [
        steps[0],
        line(11.0, 1, 1, hard__set_size=5.0, perf__evolution_s=0.5),
        *steps[1:3],
        line(31.0, 3, 1, library__version=1.0, evolution__round_s=14.0),
        steps[3],
    ]
    (found,) = round_spans(lines, frozenset({0}))
    assert found.end_s is not None and found.is_beside
    assert (found.epoch, found.begin_s - NOON_S, found.end_s - NOON_S) == (0, 10.5, 24.5)
    assert [step.step for step in step_spans(lines) if found.is_beside_step(step)] == [2]
    assert library_times(lines) == [(NOON_S + 31.0, 1)]


def test_one_line_may_end_a_round_and_begin_the_next() -> None:
    lines = [
        line(10.0, 2, 1, hard__set_size=5.0),
        line(20.0, 4, 2, hard__set_size=5.0, library__version=1.0, evolution__round_s=8.0),
    ]
    first, second = round_spans(lines, frozenset({0, 1}))
    assert (first.epoch, first.end_s) == (0, NOON_S + 18.0)
    assert (second.epoch, second.begin_s, second.end_s, second.is_beside) == (1, NOON_S + 20.0, None, True)


def test_a_round_that_training_waited_for_ends_with_its_line() -> None:
    told = {"hard__set_size": 5.0, "library__version": 1.0, "evolution__round_s": 7.9, "perf__evolution_s": 8.0}
    (found,) = round_spans([line(20.0, 2, 1, **told)], frozenset({0}))
    assert (found.begin_s - NOON_S, found.end_s, found.is_beside) == (12.0, NOON_S + 20.0, False)


@pytest.mark.parametrize("epochs", [frozenset[int](), frozenset({5})])
def test_an_epoch_without_a_journal_began_no_round(epochs: frozenset[int]) -> None:
    assert round_spans([line(10.0, 2, 1, hard__set_size=1.0)], epochs) == []
