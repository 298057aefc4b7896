"""What happens when engine and trainer differ too much: a warning, or the end of the run with the step on record."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_p2o.algorithm import StepResult, TrainState
from megatron_p2o.config import Config
from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.observer import MismatchAlarm, RunObserver
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.testing.fakes import FakeLibrary, fake_config
from megatron_p2o.types import UpdateReport

SENTENCE = (
    r"step 0: engine and trainer differ by 0\.25 nats a token \(worst token 3, KL estimate 0\.0625\), more than "
    r"scoring\.mismatch_alarm="
)


def observer_of(config: Config, run_dir: Path, written: list[str]) -> RunObserver:
    """Return an observer whose files only remember, in `written`, that they were written."""

    def remember(name: str) -> Callable[..., None]:
        return lambda *_: written.append(name)

    nothing = SimpleNamespace(check=lambda: None, save=remember("checkpoint"))
    files: Any = SimpleNamespace(
        run_dir=run_dir,
        checkpoints=nothing,
        metrics=SimpleNamespace(write=remember("metrics")),
        ledger=SimpleNamespace(append=remember("ledger"), ledger=HardSampleLedger()),
        rollouts=SimpleNamespace(write=remember("rollouts")),
    )
    parts: Any = SimpleNamespace(renderer=SimpleNamespace(decode=None))
    return RunObserver(
        config=config,
        parts=parts,
        files=files,
        clock=PhaseClock(),
        stop=SimpleNamespace(),  # pyright: ignore[reportArgumentType]
        evaluation_sets={},
        observe_groups=remember("groups"),
        keep_library=remember("library"),
        take_round_statistics=dict,
        engine_metrics=dict,
        resumed=None,
    )


def observed_step(settings: dict[str, Any], run_dir: Path, sums: dict[str, float], written: list[str]) -> None:
    report = UpdateReport(loss=0.0, grad_norm=1.0, learning_rate=1.0, is_applied=True, sums=sums)
    result = StepResult(groups=[], hard=[], reports=[report], num_batches=1)
    config = fake_config({"schedule.save_every_steps": 0, "evaluation.every_steps": 0, **settings})
    observer_of(config, run_dir, written).on_step(TrainState(library=FakeLibrary()), result)


SUMS = {"mismatch_tokens": 8.0, "mismatch_abs_sum": 2.0, "mismatch_ratio_sum": 8.0, "mismatch_kl_sum": 0.5}
SUMS |= {"mismatch_abs_max": 3.0}


@pytest.mark.parametrize(("alarm", "warns"), [(0.2, True), (0.25, False)])
def test_a_mismatch_above_the_alarm_is_warned_of_with_its_numbers(
    alarm: float, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        observed_step({"scoring.mismatch_alarm": alarm}, tmp_path, SUMS, [])
    assert [record.name for record in caplog.records] == (["megatron_p2o.observer"] if warns else [])
    assert ("differ by 0.25 nats a token" in caplog.text) == warns


def test_a_run_that_is_to_stop_at_it_ends_after_the_step_is_on_record(tmp_path: Path) -> None:
    written: list[str] = []
    settings = {"scoring.mismatch_alarm": 0.2, "scoring.mismatch_alarm_action": "stop", "schedule.save_every_steps": 1}
    with pytest.raises(MismatchAlarm, match=SENTENCE + r"0\.2:"):
        observed_step(settings, tmp_path, SUMS, written)
    assert {"metrics", "ledger", "rollouts"} <= set(written) and "checkpoint" not in written


def test_a_step_that_compared_nothing_alarms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    observed_step({"scoring.mismatch_alarm_action": "stop"}, tmp_path, {}, [])
    assert not caplog.records
