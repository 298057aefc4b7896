"""P2O (arXiv:2603.21877, Algorithm 1): policy steps on the bare prompts, alternating with evolution of templates.

A problem the policy fails is asked through evolved templates; what it then gets right is learnt without them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import (
    Grader,
    Policy,
    PromptEvolution,
    PromptRenderer,
    PromptTooLongError,
    RolloutEngines,
    RoundInterrupted,
    TemplateLibrary,
)
from megatron_p2o.rl.grouping import make_groups, train_samples
from megatron_p2o.rl.hard_samples import HardSampleLedger, hard_problems
from megatron_p2o.rl.objective import compares_with_sampling, with_caps, with_mismatch, with_trainer_logprobs
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import (
    PLAIN,
    Completion,
    Grade,
    Group,
    Logprobs,
    Problem,
    Prompt,
    Rollout,
    SamplingParams,
    Template,
    TrainSample,
    UpdateReport,
)

Item = TypeVar("Item")

NUM_PROBED = 4
"""Samples that stand for a step whose groups all agree: it has no training pass that would show a mismatch."""

GRADING_TIMEOUT_S = 3600.0
"""Longest wait for a verdict; beyond, the grader hangs and the run ends. A busy machine takes nothing like it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParts:
    """The implementations that answer problems and grade the answers."""

    engines: RolloutEngines
    grader: Grader
    renderer: PromptRenderer


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts(SamplingParts):
    """The implementations a run is made of."""

    policy: Policy
    evolution: PromptEvolution | None
    """None is plain GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did."""

    groups: list[Group]
    """All that were sampled, trained on or not."""
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
    hard = hard_problems(groups, config.hard.max_solved, config.hard.counted)

    # From here to the refresh a GPU that trainer and engine share is the trainer's.
    parts.engines.release_memory()

    # Distil: the gradient is taken on (x, y), whatever template y was sampled with.
    reports = update(most_informative(groups, len(problems)), parts.policy, config)

    parts.engines.refresh(parts.policy.weights(), version=state.step + 1)
    return StepResult(groups=groups, hard=hard, reports=reports, num_batches=num_batches)


def sampled_groups(
    problems: Sequence[Problem], state: TrainState, ledger: HardSampleLedger, parts: Parts, config: Config
) -> list[Group]:
    """Return the graded and credited rollouts of each problem."""
    # Sample y ~ pi(. | x, z): a hard problem is asked through its templates, every other one plainly.
    prompts = [
        asked(problem, template, parts.renderer)
        for problem in problems
        for template in templates_of(problem, state.library, config.rollout.group_size)
    ]
    rollouts = sample_and_grade(prompts, rollout_sampling(config, state.step), parts)

    # Credit each rollout against its siblings.
    return make_groups(
        chunks(rollouts, config.rollout.group_size),
        config.advantage,
        [ledger.plain_success_rate(problem.id) for problem in problems],
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
        batches = iter(batches_of(state.epoch)[state.batch :])
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
    """Return what a round beside training has published meanwhile, else what there is: training never waits for it."""
    return state.library if evolution is None else evolution.newest(state.library)


def num_informative(groups: Sequence[Group]) -> int:
    """Return how many groups carry a gradient: their rollouts do not all agree."""
    return sum(any(group.advantages) for group in groups)


def most_informative(groups: Sequence[Group], size: int) -> list[Group]:
    """Return `size` groups in the order they were asked: those that carry a gradient first, then any."""
    by_use = sorted(range(len(groups)), key=lambda index: not any(groups[index].advantages))
    return [groups[index] for index in sorted(by_use[:size])]


def update(groups: Sequence[Group], policy: Policy, config: Config) -> list[UpdateReport]:
    """Take one optimizer step per mini-batch of groups, all against the policy that sampled them."""
    parts = chunks(groups, config.schedule.problems_per_update)
    minibatches = [train_samples(part, config.objective) for part in parts]
    live = [
        scored(carrying_gradient(samples, config), part, policy, config)
        for samples, part in zip(minibatches, parts, strict=True)
    ]
    # The first update's own forward pass gives its old log-probs; later ones need theirs before the policy moves.
    old_logprobs = [None, *(old_logprobs_of(samples, policy, config) for samples in live[1:])]
    reports = [
        updated(policy, samples, old, minibatch, config)
        for samples, old, minibatch in zip(live, old_logprobs, minibatches, strict=True)
    ]
    return reports if any(live) else [with_probe(reports[0], minibatches[0], policy), *reports[1:]]


def updated(
    policy: Policy,
    samples: Sequence[TrainSample],
    old_logprobs: Sequence[Logprobs] | None,
    minibatch: Sequence[TrainSample],
    config: Config,
) -> UpdateReport:
    """Take the optimizer step on `samples`, the part of `minibatch` that carries gradient."""
    report = policy.update(samples, old_logprobs, sum(len(sample.response_ids) for sample in minibatch))
    return replace(report, tokens=with_caps(report.tokens, samples, config.scoring.importance_cap))


def with_probe(report: UpdateReport, samples: Sequence[TrainSample], policy: Policy) -> UpdateReport:
    """Return `report`, of a step that trained on nothing, with engine and trainer compared on a few plain samples."""
    probe = [sample for sample in samples if not sample.is_templated][:NUM_PROBED]
    engine = [sample.sampling_logprobs for sample in probe]
    return replace(report, tokens=with_mismatch(report.tokens, policy.score(probe) if probe else [], engine))


def carrying_gradient(samples: Sequence[TrainSample], config: Config) -> list[TrainSample]:
    """Return the samples the forward pass needs: a zero advantage has no gradient, only a place in the denominator."""
    return [sample for sample in samples if sample.advantage != 0 or not config.objective.drop_zero_advantage]


def old_logprobs_of(samples: Sequence[TrainSample], policy: Policy, config: Config) -> Sequence[Logprobs] | None:
    """Return log pi_old on the gradient's prompt; the importance context uses the sampling log-probs instead."""
    return None if compares_with_sampling(config.objective.context) else policy.score(samples)


def scored(samples: list[TrainSample], groups: Sequence[Group], policy: Policy, config: Config) -> list[TrainSample]:
    """Return the samples of `groups` with the trainer's own log-probs of their sampling prompts, if settings ask so."""
    if not config.scoring.recompute:
        return samples
    sampling = replace(config.objective, context="sampling")
    on_sampling_context = carrying_gradient(train_samples(groups, sampling), config)
    logprobs = policy.score(on_sampling_context)
    cap = config.scoring.importance_cap
    return [with_trainer_logprobs(sample, row, cap) for sample, row in zip(samples, logprobs, strict=True)]


def sample_and_grade(prompts: Sequence[Prompt], sampling: SamplingParams, parts: SamplingParts) -> list[Rollout]:
    """Return one graded rollout per prompt, in order; each is graded while the others are still being sampled."""
    rollouts = dict(graded_rollouts(prompts, sampling, parts))
    return [rollouts[index] for index in range(len(prompts))]


def graded_rollouts(
    prompts: Sequence[Prompt], sampling: SamplingParams, parts: SamplingParts, places: Sequence[int] | None = None
) -> Iterator[tuple[int, Rollout]]:
    """Yield (index into `prompts`, rollout) in the order the rollouts were sampled, once their verdicts are there."""
    waiting: deque[tuple[int, Completion, Future[Grade]]] = deque()
    for index, completion in parts.engines.generate(prompts, sampling, places):
        waiting.append((index, completion, submitted(completion, parts)))
        while waiting and waiting[0][2].done():
            yield judged(*waiting.popleft())
    while waiting:
        yield judged(*waiting.popleft())


def submitted(completion: Completion, parts: SamplingParts) -> Future[Grade]:
    """Hand a completion to the grader; one that was given up has no answer to grade."""
    if not completion.is_aborted:
        return parts.grader.submit(completion.prompt.problem, parts.renderer.decode(completion))
    ungraded: Future[Grade] = Future()
    ungraded.set_result("error")
    return ungraded


def judged(index: int, completion: Completion, grade: Future[Grade]) -> tuple[int, Rollout]:
    return index, rollout_of(completion, verdict(grade, completion.prompt.problem))


def verdict(grade: Future[Grade], problem: Problem) -> Grade:
    """Wait for a grade. Raise `TimeoutError` when the grader has not answered long after its own deadline."""
    try:
        return grade.result(GRADING_TIMEOUT_S)
    except TimeoutError as error:
        raise TimeoutError(f"the grader did not answer on problem {problem.id} in {GRADING_TIMEOUT_S:g} s") from error


def rollout_of(completion: Completion, grade: Grade) -> Rollout:
    return Rollout(completion=completion, grade=grade, reward=reward_of(grade))


def reward_of(grade: Grade) -> float:
    """Return the reward of a verdict; what could not be decided has none, and nothing may read it."""
    return 1.0 if grade == "correct" else 0.0


def templates_of(problem: Problem, library: TemplateLibrary, group_size: int) -> Sequence[Template]:
    """Return the template of each rollout of `problem`: those evolved for it, or none at all.

    Raises:
        ValueError: the library was made for groups of another size (a run resumed with changed settings).
    """
    templates = library.assigned(problem) or (PLAIN,) * group_size
    if len(templates) != group_size:
        raise ValueError(
            f"rollout.group_size={group_size} but library {library.version} gives {problem.id!r} {len(templates)} "
            "templates, one per rollout: resume with the group size the library was made for"
        )
    return templates


def asked(problem: Problem, template: Template, renderer: PromptRenderer) -> Prompt:
    """Return the prompt; a template too long for this problem, on which it was never tried, leaves it plain."""
    try:
        return renderer.render(problem, template)
    except PromptTooLongError:
        return renderer.render(problem, PLAIN)


def rollout_sampling(config: Config, step: int) -> SamplingParams:
    """Return how the training rollouts of the step after `step` are sampled."""
    return SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=seed_of(config.run.seed, "rollouts", step),
    )


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Return `items` in consecutive chunks of `size`; the caller's sizes divide evenly."""
    assert len(items) % size == 0, f"{len(items)} items do not split into chunks of {size}"
    return [items[start : start + size] for start in range(0, len(items), size)]
