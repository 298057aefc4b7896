"""Observers whose files only remember that they were written."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_p2o.algorithm import Parts, TrainState
from megatron_p2o.config.tree import Config
from megatron_p2o.metrics.clock import PhaseClock
from megatron_p2o.metrics.compute import ComputeMeter
from megatron_p2o.rl.hard_samples import HardSampleLedger
from megatron_p2o.run.beginning import Beginning
from megatron_p2o.run.observe.observer import RunObserver
from megatron_p2o.run.parts import RunParts
from megatron_p2o.run_folder.state import RunState
from megatron_p2o.testing.fakes import FakeEngines, FakeGrader, FakeLibrary, FakePolicy, FakeRenderer, FakeReply
from megatron_p2o.types import Problem

Written = list[tuple[str, Any]]
"""What was written: the name of a file, and what went into it."""

MakeObserver = Callable[..., RunObserver]


@pytest.fixture
def written() -> Written:
    return []


@pytest.fixture
def announced() -> list[str]:
    """What the person watching was told."""
    return []


@pytest.fixture
def make_observer(tmp_path: Path, written: Written, announced: list[str]) -> MakeObserver:
    """Return what makes an observer that notes in `written` which file was written, and with what."""

    def remember(name: str) -> Callable[..., None]:
        return lambda *arguments: written.append((name, arguments[-1] if arguments else None))

    def observer_of(
        config: Config,
        *,
        resumed: RunState | None = None,
        answer: str = "no",
        evaluation_sets: Mapping[str, Sequence[Problem]] | None = None,
    ) -> RunObserver:
        files: Any = SimpleNamespace(
            run_dir=tmp_path,
            checkpoints=SimpleNamespace(
                check=lambda: None, confirm=remember("confirm"), begin=remember("checkpoint"), finish=lambda: None
            ),
            metrics=SimpleNamespace(write=remember("metrics"), announce=announced.append, num_lines=0),
            ledger=SimpleNamespace(append=remember("ledger"), ledger=HardSampleLedger(), num_entries=0),
            rollouts=SimpleNamespace(write=remember("rollouts")),
        )
        started: Any = RunParts(
            parts=Parts(
                solved_at=1.0,
                engines=FakeEngines(reply=lambda prompt, index: FakeReply(text=answer)),
                grader=FakeGrader(),
                renderer=FakeRenderer(),
                policy=FakePolicy(),
                evolution=None,
            ),
            engines=SimpleNamespace(),  # pyright: ignore[reportArgumentType]
            clock=PhaseClock(),
            compute=ComputeMeter(),
            processes=SimpleNamespace(metrics=lambda peaks: {}),  # pyright: ignore[reportArgumentType]
            evolution=SimpleNamespace(  # pyright: ignore[reportArgumentType]
                observe=remember("scores"), take_statistics=dict, announce_to=lambda announce: None
            ),
        )
        beginning = Beginning(
            state=TrainState(library=FakeLibrary()),
            made_with=SimpleNamespace(),  # pyright: ignore[reportArgumentType]
            resumed=resumed,
        )
        stop: Any = SimpleNamespace(is_made=lambda: False)
        return RunObserver(config, started, files, evaluation_sets or {}, beginning, stop)

    return observer_of
