"""Sampling and grading: y ~ pi(. | x, z) for each prompt, and the verdict on each answer."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import Grader, PromptRenderer, PromptTooLongError, RolloutEngines, TemplateLibrary
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import PLAIN, Completion, Grade, Problem, Prompt, Rollout, SamplingParams, Template

GRADING_TIMEOUT_S = 3600.0
"""Longest wait for a verdict; beyond, the grader hangs and the run ends. A busy machine takes nothing like it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParts:
    """The implementations that answer problems and grade the answers."""

    engines: RolloutEngines
    grader: Grader
    renderer: PromptRenderer
    solved_at: float
    """Reward from which a rollout counts as solved (`hard.solved_at`)."""


def rollout_sampling(config: Config, step: int) -> SamplingParams:
    """Return how the training rollouts of the step after `step` are sampled."""
    return SamplingParams(
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_new_tokens=config.rollout.max_new_tokens,
        seed=seed_of(config.run.seed, "rollouts", step),
    )


def templates_of(problem: Problem, library: TemplateLibrary, group_size: int) -> Sequence[Template]:
    """Return the template of each rollout of `problem`: those assigned to it, or none at all.

    Raises:
        ValueError: the library was made for groups of another size (a run resumed with changed settings).
    """
    templates = library.assigned(problem) or (PLAIN,) * group_size
    if not fits_group(templates, group_size):
        raise ValueError(
            f"rollout.group_size={group_size} but library {library.version} gives {problem.id!r} {len(templates)} "
            "templates, one per rollout: resume with the group size the library was made for"
        )
    return templates


def fits_group(templates: Sequence[Template], group_size: int) -> bool:
    """Whether a problem can be asked with these templates: one per rollout, or more plain rollouts than a group has
    (`evolution.plain_rollouts`)."""
    is_plain = not any(template.text for template in templates)
    return len(templates) == group_size or (is_plain and len(templates) > group_size)


def asked(problem: Problem, template: Template, renderer: PromptRenderer) -> Prompt:
    """Return the prompt; a template too long for this problem, on which it was never tried, leaves it plain."""
    try:
        return renderer.render(problem, template)
    except PromptTooLongError:
        return renderer.render(problem, PLAIN)


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
            yield rollout_of(*waiting.popleft(), parts.solved_at)
    while waiting:
        yield rollout_of(*waiting.popleft(), parts.solved_at)


def submitted(completion: Completion, parts: SamplingParts) -> Future[Grade]:
    """Hand a completion to the grader; one that was given up has no answer to grade."""
    if not completion.is_aborted:
        text = parts.renderer.decode(completion)
        return parts.grader.submit(completion.prompt.problem, text, completion.finish_reason)
    ungraded: Future[Grade] = Future()
    ungraded.set_result(Grade.undecided("the engine gave it up"))
    return ungraded


def rollout_of(index: int, completion: Completion, grade: Future[Grade], solved_at: float) -> tuple[int, Rollout]:
    awaited = awaited_grade(grade, completion.prompt.problem)
    return index, Rollout(completion=completion, grade=awaited, solved_at=solved_at)


def awaited_grade(grade: Future[Grade], problem: Problem) -> Grade:
    """Wait for a grade. Raise `TimeoutError` when the grader has not answered long after its own deadline."""
    try:
        return grade.result(GRADING_TIMEOUT_S)
    except TimeoutError as error:
        raise TimeoutError(f"the grader did not answer on problem {problem.id} in {GRADING_TIMEOUT_S:g} s") from error
