"""The training loop with fakes: epochs, evolution between them, resuming, and plain GRPO as a special case."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o.algorithm import Parts, StepResult, TrainState, train
from megatron_p2o.interfaces import PromptEvolution, RoundInterrupted, TemplateLibrary
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, ledger_entry
from megatron_p2o.testing.fakes import (
    CallLog,
    FakeEngines,
    FakeEvolution,
    FakeGrader,
    FakeLibrary,
    FakePolicy,
    FakeRenderer,
    FakeReply,
    UpdateCall,
    fake_config,
    fake_problem,
)
from megatron_p2o.types import PLAIN, Problem, Prompt, Template, TrainSample

HINT = Template(id=1, text="§ go on", parent=0)
TEMPLATES = [HINT, HINT, PLAIN, HINT]
HARD = frozenset(f"problem-{number:03d}" for number in (1, 4, 6, 7, 10))
"""Solved through a template only."""


def reply_of(prompt: Prompt, index: int) -> FakeReply:
    """Solve templated prompts three times in four, easy plain ones half the time, hard plain ones never."""
    draw = zlib.crc32(prompt.sampling_ids.tobytes() + bytes([index])) % 8
    chance = 6 if prompt.is_templated else 0 if prompt.problem.id in HARD else 4
    return FakeReply(text="yes") if draw < chance else FakeReply(text="no" + "!" * draw)


def batches_of(epoch: int) -> list[list[Problem]]:
    """Return three batches of four of twelve problems, in another order every epoch."""
    order = np.random.default_rng(epoch).permutation(12)
    return [[fake_problem(int(number)) for number in order[start : start + 4]] for start in (0, 4, 8)]


@dataclass(kw_only=True)
class Recorder:
    """A `TrainObserver` that keeps the ledger and all states, and can stop the run."""

    ledger: HardSampleLedger
    stop_at_step: int | None = None
    states: list[TrainState] = field(default_factory=list)
    hard: list[list[Problem]] = field(default_factory=list)
    """Hard problems of each step."""
    entries: list[LedgerEntry] = field(default_factory=list)
    epochs: list[tuple[TrainState, tuple[Problem, ...]]] = field(default_factory=list)

    def on_step(self, state: TrainState, result: StepResult) -> None:
        self.states.append(state)
        self.hard.append(result.hard)
        for group in result.groups:
            entry = ledger_entry(group, state.epoch, state.step)
            self.entries.append(entry)
            self.ledger.record(entry)

    def on_epoch(self, state: TrainState, hard: Sequence[Problem]) -> None:
        self.epochs.append((state, tuple(hard)))

    def should_stop(self, state: TrainState) -> bool:
        return self.stop_at_step is not None and state.step >= self.stop_at_step


@dataclass(kw_only=True)
class Run:
    """A training run and the fakes it ran on."""

    end: TrainState
    policy: FakePolicy
    engines: FakeEngines
    recorder: Recorder
    journal: CallLog


def run(
    settings: Mapping[str, Any] | None = None,
    evolution: Callable[[CallLog], PromptEvolution | None] = lambda journal: None,
    *,
    start: TrainState | None = None,
    entries: Sequence[LedgerEntry] = (),
    policy: FakePolicy | None = None,
    stop_at_step: int | None = None,
) -> Run:
    """Train from `start` to the end or to `stop_at_step`."""
    journal = CallLog()
    start = start or TrainState(library=FakeLibrary())
    policy = policy or FakePolicy()
    policy.journal = journal
    engines = FakeEngines(reply=reply_of, journal=journal, version=start.step, num_updates=policy.num_updates)
    recorder = Recorder(ledger=HardSampleLedger(entries), stop_at_step=stop_at_step)
    parts = Parts(
        solved_at=1.0,
        policy=policy,
        engines=engines,
        grader=FakeGrader(),
        renderer=FakeRenderer(),
        evolution=evolution(journal),
    )
    end = train(batches_of, start, recorder.ledger, parts, recorder, fake_config(settings))
    return Run(end=end, policy=policy, engines=engines, recorder=recorder, journal=journal)


def plain_values(value: object) -> object:
    """Return a record as nested tuples, arrays as (dtype, bytes), so that == means equal bit for bit."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tobytes())
    if isinstance(value, UpdateCall | TrainSample):
        return tuple(plain_values(getattr(value, item.name)) for item in fields(value))
    return tuple(plain_values(item) for item in value) if isinstance(value, tuple) else value


def trace(finished: Run) -> object:
    """Return everything policy and engine were asked for."""
    updates = tuple(plain_values(call) for call in finished.policy.updates)
    asked = tuple(prompt.sampling_ids.tobytes() for prompt in finished.engines.prompts)
    return finished.journal, updates, asked, finished.engines.refreshes


def evolving(journal: CallLog) -> PromptEvolution:
    return FakeEvolution(templates=TEMPLATES, journal=journal)


STEP = ["generate", "release", "logprobs", "update", "update", "weights", "refresh"]


def test_every_epoch_runs_all_batches_and_evolution_runs_between_epochs() -> None:
    finished = run({"schedule.epochs": 3}, evolving)
    assert finished.journal == [*STEP * 3, "evolve", *STEP * 3, "evolve", *STEP * 3]
    assert finished.engines.refreshes == list(range(1, 10))
    asked = [prompt.problem.id for prompt in finished.engines.prompts[::4]]
    assert asked == [problem.id for epoch in range(3) for batch in batches_of(epoch) for problem in batch]
    places = [(state.epoch, state.batch, state.step) for state in finished.recorder.states]
    assert places == [(epoch, batch, 3 * epoch + batch) for epoch in range(3) for batch in (1, 2, 3)]
    assert (finished.end.epoch, finished.end.batch, finished.end.step, finished.end.hard) == (3, 0, 9, ())


def test_templates_of_a_round_are_used_from_the_next_epoch_on_its_hard_problems_only() -> None:
    finished = run(evolution=evolving)
    first, second = finished.engines.prompts[:48], finished.engines.prompts[48:]
    assert not any(prompt.is_templated for prompt in first)
    hard = {problem.id for problem in finished.recorder.epochs[0][1]}
    assert hard >= HARD
    assert {prompt.problem.id for prompt in second if prompt.is_templated} == hard
    assert [p.template for p in second if p.problem.id == "problem-001"] == TEMPLATES


def test_evolution_is_given_the_hard_problems_of_the_whole_epoch_and_the_last_library() -> None:
    given: list[FakeEvolution] = []

    def recorded(journal: CallLog) -> PromptEvolution:
        given.append(FakeEvolution(templates=TEMPLATES, journal=journal))
        return given[0]

    finished = run({"schedule.epochs": 3}, recorded)
    calls = given[0].calls
    assert [call.epoch for call in calls] == [0, 1]
    assert [call.library.version for call in calls] == [0, 1]
    assert finished.end.library.version == 2
    for call, (state, hard) in zip(calls, finished.recorder.epochs, strict=False):
        by_step = finished.recorder.hard[3 * call.epoch : 3 * call.epoch + 3]
        assert any(by_step[:2])
        assert call.hard == hard == tuple(problem for problems in by_step for problem in problems)
        assert state.hard == () and state.library.version == call.library.version + 1


def test_too_few_hard_problems_clear_the_library_without_evolution() -> None:
    start = TrainState(library=FakeLibrary(version=4, assignments={"problem-001": TEMPLATES}))
    finished = run({"hard.min_problems": 13}, evolving, start=start)
    assert "evolve" not in finished.journal
    assert finished.end.library == FakeLibrary(version=5)
    assert any(prompt.is_templated for prompt in finished.engines.prompts[:48])
    assert not any(prompt.is_templated for prompt in finished.engines.prompts[48:])


def test_exactly_enough_hard_problems_start_a_round() -> None:
    (_, hard), _ = run(evolution=evolving).recorder.epochs
    assert "evolve" in run({"hard.min_problems": len(hard)}, evolving).journal
    assert "evolve" not in run({"hard.min_problems": len(hard) + 1}, evolving).journal


def test_no_round_follows_the_last_epoch() -> None:
    finished = run({"schedule.epochs": 1}, evolving)
    assert finished.journal == STEP * 3
    assert finished.end.library == FakeLibrary()
    assert len(finished.recorder.epochs) == 1


@pytest.mark.parametrize("step", range(6))
def test_a_stop_ends_the_run_between_two_steps(step: int) -> None:
    finished = run(evolution=evolving, stop_at_step=step)
    assert finished.end.step == step == len(finished.engines.refreshes)
    # At the end of an epoch the round has not been run yet: it belongs to the run that goes on from here.
    assert finished.journal.count("evolve") == (1 if step > 3 else 0)


@pytest.mark.parametrize("step", range(1, 9))
@pytest.mark.parametrize("baseline", ["group", "plain_anchored"])
def test_a_resumed_run_takes_exactly_the_remaining_steps(step: int, baseline: str, tmp_path: Path) -> None:
    settings = {"schedule.epochs": 3, "advantage.baseline": baseline}
    whole = run(settings, evolving)
    part = run(settings, evolving, stop_at_step=step)
    part.policy.save(tmp_path)
    policy = FakePolicy()
    policy.load(tmp_path)
    state = part.recorder.states[-1]
    rest = run(settings, evolving, start=state, entries=part.recorder.entries, policy=policy)
    assert part.journal + rest.journal == whole.journal
    assert part.engines.refreshes + rest.engines.refreshes == whole.engines.refreshes
    together = [*part.policy.updates, *rest.policy.updates]
    assert [plain_values(call) for call in together] == [plain_values(call) for call in whole.policy.updates]
    assert part.recorder.entries + rest.recorder.entries == whole.recorder.entries
    assert rest.end == whole.end


def test_a_resumed_run_asks_no_batch_again_that_dynamic_sampling_took(tmp_path: Path) -> None:
    settings = {"schedule.max_batches_per_step": 2, "hard.max_solved": 0}
    whole = run(settings)
    asked = [prompt.problem for prompt in whole.engines.prompts]
    assert asked[::4] == [problem for epoch in (0, 1) for batch in batches_of(epoch) for problem in batch]
    assert whole.end.step < 6  # batches were joined
    part = run(settings, stop_at_step=1)
    assert part.recorder.states[-1].batch == 2
    part.policy.save(tmp_path)
    policy = FakePolicy()
    policy.load(tmp_path)
    rest = run(settings, start=part.recorder.states[-1], entries=part.recorder.entries, policy=policy)
    assert [prompt.problem for prompt in part.engines.prompts + rest.engines.prompts] == asked
    assert rest.end == whole.end


def test_a_stop_in_the_middle_of_a_round_leaves_the_epoch_open(tmp_path: Path) -> None:
    @dataclass(kw_only=True, slots=True)
    class Interrupted(FakeEvolution):
        def evolve(self, hard: Sequence[Problem], library: TemplateLibrary, epoch: int) -> TemplateLibrary:
            raise RoundInterrupted

    part = run(evolution=lambda journal: Interrupted(templates=TEMPLATES, journal=journal))
    assert (part.end.step, part.end.epoch, part.end.batch) == (3, 0, 3)
    rest = run(evolution=evolving, start=part.end, entries=part.recorder.entries, policy=part.policy)
    assert rest.journal[0] == "evolve"
    assert rest.end == run(evolution=evolving).end


def test_a_finished_run_has_nothing_left_to_do() -> None:
    finished = run(evolution=evolving)
    again = run(evolution=evolving, start=finished.end)
    assert again.journal == [] and again.end == finished.end


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"assignment.num_plain": 0},
        {"hard.counted": "all"},
        {"hard.max_solved": 3},
        {"advantage.baseline": "plain_anchored"},
        {"objective.drop_failed_templated": True},
        {"objective.context": "sampling"},
        {"objective.context": "replace"},
        {"objective.ratio_low": 1.0, "objective.ratio_high": 1.0},
        {"evolution.rules": "reference", "evolution.warm_start": False},
    ],
)
def test_an_empty_library_is_plain_grpo_bit_for_bit(settings: dict[str, Any]) -> None:
    grpo = run({"evolution.enabled": False})
    assert trace(run({**settings, "hard.min_problems": 13}, evolving)) == trace(grpo)
    fruitless = run(settings, lambda journal: FakeEvolution(templates=[], journal=[]))
    assert fruitless.end.library.version == 1
    assert trace(fruitless) == trace(grpo)


def test_the_comparison_with_grpo_can_fail() -> None:
    assert trace(run(evolution=lambda journal: FakeEvolution(templates=TEMPLATES))) != trace(run())
    assert trace(run({"advantage.estimator": "rloo"})) != trace(run())
