"""P2O (arXiv:2603.21877, Algorithm 1): policy steps on the bare prompts, alternating with evolution of templates.

The policy samples a problem that it fails with evolved templates. It is then trained on the successes without them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import Policy, PromptEvolution, RoundInterrupted, TemplateLibrary
from megatron_p2o.rl.grouping import divided, make_groups, most_informative, num_informative
from megatron_p2o.rl.hard_samples import HardSampleLedger, hard_problems
from megatron_p2o.rl.objective import samples_plainly
from megatron_p2o.rl.sampling import SamplingParts, asked, given_templates, rollout_sampling, sample_and_grade
from megatron_p2o.rl.teachers.teaching import with_teaching
from megatron_p2o.rl.update import update
from megatron_p2o.types import PLAIN, Group, Problem, UpdateReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts(SamplingParts):
    """The implementations a run is made of."""

    policy: Policy
    evolution: PromptEvolution | None
    """Prompt evolution; None for plain GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did."""

    groups: list[Group]
    """All that were sampled, trained on or not, with the credit of their grades: without what `rl.shaping` takes."""
    hard: list[Problem]
    reports: list[UpdateReport]
    """One per optimizer step."""
    num_batches: int
    """Batches of problems that were asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where training stands; with the weights, all that a resumed run needs."""

    library: TemplateLibrary
    step: int = 0
    """Steps done; the weight version the engines serve."""
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that were asked; one per step, more with dynamic sampling."""
    num_batches: int = 0
    """Batches of the epoch whose steps were last begun; 0 before the first."""
    hard: tuple[Problem, ...] = ()
    """Hard problems of this epoch so far."""


class TrainObserver(Protocol):
    """Logging, checkpoints and evaluation: called between the steps, never inside them."""

    def on_step(self, state: TrainState, result: StepResult) -> None: ...

    def on_epoch(self, state: TrainState, hard: Sequence[Problem]) -> None: ...

    def should_stop(self, state: TrainState) -> bool:
        """Whether to end the run here, between two steps."""
        ...


def p2o_step(
    problems: Sequence[Problem],
    state: TrainState,
    ledger: HardSampleLedger,
    parts: Parts,
    config: Config,
    following: Iterator[Sequence[Problem]],
) -> StepResult:
    """Sample, grade, credit, distil, and hand the new weights to the engines.

    `problems` is the batch x_1..x_P; dynamic sampling takes more of them from the `following` batches. Raises what the
    parts raise; a step that raised has not been recorded anywhere.
    """
    groups = sampled_groups(problems, state, ledger, parts, config)
    num_batches = 1
    while num_batches < config.schedule.max_batches_per_step and num_informative(groups) < len(problems):
        more = next(following, None)
        if more is None:
            break
        groups += sampled_groups(more, state, ledger, parts, config)
        num_batches += 1

    # What a group nearly always fails is work for the next evolution.
    hard = hard_problems(groups, config.hard, config.rollout.group_size)

    # From here to the refresh a GPU that trainer and engine share is the trainer's.
    parts.engines.release_memory()

    # Distil: the gradient is taken on (x, y), whatever template y was sampled with.
    learnt = most_informative(groups, len(problems))
    rates = [ledger.plain_reward(group.problem.id) for group in learnt]
    reports = update(learnt, rates, parts.policy, config)

    parts.engines.refresh(parts.policy.weights(), version=state.step + 1)
    return StepResult(groups=groups, hard=hard, reports=reports, num_batches=num_batches)


def sampled_groups(
    problems: Sequence[Problem], state: TrainState, ledger: HardSampleLedger, parts: Parts, config: Config
) -> list[Group]:
    """Return the graded and credited rollouts of each problem."""
    # Sample y ~ pi(. | x, z): a hard problem is asked through its templates or hints, every other one plainly.
    asked_plainly = samples_plainly(config.objective.context)
    templates = [given_templates(problem, state.library, ledger, config) for problem in problems]
    prompts = [
        asked(problem, PLAIN if asked_plainly else template, parts.renderer)
        for problem, given in zip(problems, templates, strict=True)
        for template in given
    ]
    rollouts = sample_and_grade(prompts, rollout_sampling(config, state.step), parts)
    if asked_plainly:
        teachers = [template for given in templates for template in given]
        rollouts = with_teaching(rollouts, teachers, parts, config.rollout.temperature)

    # Credit each rollout against its siblings.
    return make_groups(
        divided(rollouts, map(len, templates)),
        config.advantage,
        [ledger.plain_reward(problem.id) for problem in problems],
    )


def train(
    batches_of: Callable[[int], Sequence[Sequence[Problem]]],
    state: TrainState,
    ledger: HardSampleLedger,
    parts: Parts,
    observer: TrainObserver,
    config: Config,
) -> TrainState:
    """Alternate one epoch of policy steps with one round of prompt evolution, from `state` on.

    `batches_of(epoch)` must give the same batches whenever it is asked. Returns the state at the end or where
    `observer.should_stop` ended the run.
    """
    while state.epoch < config.schedule.epochs:
        whole_epoch = batches_of(state.epoch)
        state = replace(state, num_batches=len(whole_epoch))
        batches = iter(whole_epoch[state.batch :])
        for problems in batches:
            if observer.should_stop(state):
                return state
            state = replace(state, library=newest_library(state, parts.evolution))
            result = p2o_step(problems, state, ledger, parts, config, batches)
            batch, hard = state.batch + result.num_batches, (*state.hard, *result.hard)
            state = replace(state, step=state.step + 1, batch=batch, hard=hard)
            observer.on_step(state, result)
        if observer.should_stop(state):
            return state
        hard = state.hard
        try:
            library = evolved_library(state, parts.evolution, config)
        except RoundInterrupted:
            return state
        state = replace(state, library=library, epoch=state.epoch + 1, batch=0, hard=())
        observer.on_epoch(state, hard)
    return state


def evolved_library(state: TrainState, evolution: PromptEvolution | None, config: Config) -> TemplateLibrary:
    """Return the templates of the next epoch; a round is run when an epoch follows and enough is hard."""
    if evolution is None or state.epoch + 1 == config.schedule.epochs:
        return state.library
    if len(state.hard) < config.hard.min_problems:
        return state.library.cleared()
    return evolution.evolve(state.hard, state.library, state.epoch)


def newest_library(state: TrainState, evolution: PromptEvolution | None) -> TemplateLibrary:
    """Return the library that a round beside training has published, else the current one. Never waits."""
    return state.library if evolution is None else evolution.newest(state.library)
