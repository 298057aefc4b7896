"""Measures a policy on problems, with and without a template."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_p2o.config.tree import Config, DataConfig
from megatron_p2o.evaluation.outcome import Evaluation, evaluation_of, graded_response
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.rl.sampling import SamplingParts, asked, graded_rollouts
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import PLAIN, Problem, Rollout, SamplingParams, Template

UNNUMBERED = -1
"""Id of a template outside any library; published templates are numbered from 0."""

SMALL_SET = 100
"""Problems below which the paper averages over `SMALL_SET_SAMPLES` responses."""

SMALL_SET_SAMPLES = 16
SAMPLING_TEMPERATURE = 0.6
"""The paper's, where a problem is asked more than once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How the problems of one set are asked."""

    num_samples: int
    """Responses to each problem."""
    temperature: float
    """0 is greedy."""


def protocol_of(name: str, num_problems: int, config: Config) -> Protocol:
    """Return how the set `name` is asked: as set for it, as set for all, else as in the paper, by its size."""
    by_size = SMALL_SET_SAMPLES if num_problems < SMALL_SET else 1
    own = config.data.evaluation.get(name)
    num_samples = (own and own.num_samples) or config.evaluation.num_samples or by_size
    temperature = config.evaluation.temperature if own is None or own.temperature is None else own.temperature
    if temperature is None:
        temperature = SAMPLING_TEMPERATURE if num_samples > 1 else 0.0
    return Protocol(num_samples=num_samples, temperature=temperature)


def evaluate(
    name: str,
    problems: Sequence[Problem],
    parts: SamplingParts,
    config: Config,
    template: Template = PLAIN,
    note: Callable[[int, int], None] = lambda num_done, total: None,
) -> Evaluation:
    """Sample responses to each problem of the set `name` under `template` and grade them as in training.

    A problem that is too long under `template` is asked plainly, and counted. `note` is told after each response how
    many are there, and how many there will be.
    """
    protocol = protocol_of(name, len(problems), config)
    sampling = evaluation_sampling(config, protocol)
    wanted = all_asked(problems, protocol)
    rollouts: list[tuple[int, Rollout]] = []
    for rollout in sampled_responses(wanted, sampling, parts, template):
        rollouts.append(rollout)
        note(len(rollouts), len(wanted))
    responses = [graded_response(rollout, sample) for sample, rollout in rollouts]
    prompts = [rollout.completion.prompt for _, rollout in rollouts]
    too_long = {prompt.problem.id for prompt in prompts if prompt.is_templated != bool(template.text)}
    return evaluation_of(responses, problems, protocol.num_samples, protocol.temperature, len(too_long))


def all_asked(problems: Sequence[Problem], protocol: Protocol) -> list[tuple[Problem, int]]:
    """Return (problem, index among its responses) for every response the protocol wants."""
    return [(problem, sample) for problem in problems for sample in range(protocol.num_samples)]


def sampled_responses(
    wanted: Sequence[tuple[Problem, int]], sampling: SamplingParams, parts: SamplingParts, template: Template = PLAIN
) -> Iterator[tuple[int, Rollout]]:
    """Yield (index among the problem's responses, rollout) for everything `wanted`, as it is sampled and graded.

    On deterministic engines a response depends on its problem and index, not on what else is asked.
    """
    prompts = [asked(problem, template, parts.renderer) for problem, _ in wanted]
    places = [sample for _, sample in wanted]
    for index, rollout in graded_rollouts(prompts, sampling, parts, places):
        yield places[index], rollout


def evaluation_sampling(config: Config, protocol: Protocol) -> SamplingParams:
    """Return how responses are sampled; not by `rollout.top_p`, which is for training."""
    return SamplingParams(
        temperature=protocol.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        # The same at every step: two evaluations differ by the policy, not by luck.
        seed=seed_of(config.run.seed, "evaluation"),
    )


def best_templates(library: TemplateLibrary) -> dict[str, Template]:
    """Return the template with the highest development score of each task that has any; of a single task by ""."""
    best: dict[str, Template] = {}
    for template in library.templates:
        if template.text and (template.task not in best or template.score > best[template.task].score):
            best[template.task] = template
    return best


def template_of_set(name: str, templates: Mapping[str, Template], data: DataConfig) -> Template:
    """Return the best template of the task that an evaluation set is of; PLAIN where there is none."""
    task = "" if len(data.train) == 1 else data.task_of_set(name)
    return PLAIN if task is None else templates.get(task, PLAIN)


def template_with_text(text: str, task: str = "") -> Template:
    """Return a template that is in no library, to ask problems of a task through; PLAIN for the text ""."""
    return Template(id=UNNUMBERED, text=text, parent=None, task=task) if text else PLAIN
