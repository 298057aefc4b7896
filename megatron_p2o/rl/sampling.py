"""Sampling and grading: the template of each rollout, y ~ pi(. | x, z) for each prompt, the verdict on each answer.

Hints from the data: a problem that failed plainly is asked through the weakest of its hints that may be enough.

    plain group           hint after it
    hard                  the first; the next one where templated rollouts of the same group were hard as well
    hard, hint helped     the same
    not hard              none: the problem is asked plainly again

Hard is what `rl.hard_samples.is_hard` says. The level of a hint follows from the ledger's history of its problem alone,
so that a resumed run goes on with it. A hint is a template of its problem, with its level as id: sampling, the contexts
of the objective, the plain rollouts of its group and the ledger treat it as any template.

With hints that the initial policy or people have written this is the light form of SAGE (arXiv:2602.03143: hints only
where a group fails, of several strengths; `objective.context: sampling` trains on the hinted prompt as they do),
Scaf-GRPO (arXiv:2510.19807: tiers from abstract to concrete) and NuRL (arXiv:2509.25666: hints for problems above the
policy's reach). SAGE and Scaf-GRPO raise the level within a step, by sampling a failed group again; here the next group
of the problem has it, which costs no further rollouts. Nothing writes hints during a run.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from megatron_p2o.config.tree import Config, DataConfig, HardConfig
from megatron_p2o.interfaces import Grader, PromptRenderer, PromptTooLongError, RolloutEngines, TemplateLibrary
from megatron_p2o.rl.hard_samples import HardSampleLedger, LedgerEntry, is_hard
from megatron_p2o.rl.teachers.demonstrations import demonstrated, demonstrations_of
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import (
    PLAIN,
    Completion,
    Demonstration,
    Grade,
    Problem,
    Prompt,
    Rollout,
    SamplingParams,
    Template,
)

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


def given_templates(
    problem: Problem, library: TemplateLibrary, ledger: HardSampleLedger, config: Config
) -> Sequence[Template]:
    """Return the template of each rollout of `problem`: its demonstrations, or its hint of the level it needs, else
    what `templates_of` says.

    Raises as `templates_of`.
    """
    if shown := demonstrations_of(problem, ledger, config):
        return shown
    level = min(hint_level(problem, ledger, config), len(problem.hints))
    group_size, num_plain = config.rollout.group_size, config.assignment.num_plain
    if level == 0:
        return templates_of(problem, library, group_size)
    hint = Template(id=level, text=problem.hints[level - 1], parent=None)
    return (*(hint,) * (group_size - num_plain), *(PLAIN,) * num_plain)


def hint_level(problem: Problem, ledger: HardSampleLedger, config: Config) -> int:
    """Return the level of the hint that a problem needs, 1 the weakest, whether it has one or not; 0: it needs none."""
    level = 0
    if config.data.of_task(problem.task or None).hints_field is None:
        return level
    for entry in ledger.history(problem.id):
        if entry.plain_tries + entry.templated_tries == 0:
            continue  # nothing was decided
        if not is_hard(entry, config.hard, config.rollout.group_size):
            level = 0
        elif level == 0 or not _is_helped(entry, config.hard, config.rollout.group_size):
            level = min(level, len(problem.hints)) + 1
    return level


def _is_helped(entry: LedgerEntry, hard: HardConfig, group_size: int) -> bool:
    """Whether the hint of a group solved its problem more often than a hard one is solved."""
    return entry.templated_solved * group_size > hard.max_solved * entry.templated_tries


def uses_hints(data: DataConfig) -> bool:
    """Whether problems of any task have hints that are used."""
    return any(data.of_task(name).hints_field is not None for name in data.train)


def fits_group(templates: Sequence[Template], group_size: int) -> bool:
    """Whether a problem can be asked with these templates: one per rollout, or more plain rollouts than a group has
    (`evolution.plain_rollouts`)."""
    is_plain = not any(template.text for template in templates)
    return len(templates) == group_size or (is_plain and len(templates) > group_size)


def asked(problem: Problem, template: Template, renderer: PromptRenderer) -> Prompt:
    """Return the prompt. A template too long for this problem, on which it was never tried, leaves it plain; so does a
    demonstration, which answers the bare prompt."""
    if isinstance(template, Demonstration):
        return replace(renderer.render(problem, PLAIN), template=template)
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
    for index, completion in completions(prompts, sampling, parts, places):
        waiting.append((index, completion, submitted(completion, parts)))
        while waiting and waiting[0][2].done():
            yield rollout_of(*waiting.popleft(), parts.solved_at)
    while waiting:
        yield rollout_of(*waiting.popleft(), parts.solved_at)


def completions(
    prompts: Sequence[Prompt], sampling: SamplingParams, parts: SamplingParts, places: Sequence[int] | None = None
) -> Iterator[tuple[int, Completion]]:
    """Yield (index into `prompts`, completion): first what a teacher has written, then what the engines sample."""
    shown = [index for index, prompt in enumerate(prompts) if isinstance(prompt.template, Demonstration)]
    if not shown:
        yield from parts.engines.generate(prompts, sampling, places)
        return
    given = demonstrated([prompts[index] for index in shown], parts.engines, parts.renderer)
    yield from zip(shown, given, strict=True)
    if others := sorted({*range(len(prompts))} - {*shown}):
        for place, completion in parts.engines.generate([prompts[index] for index in others], sampling):
            yield others[place], completion


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
