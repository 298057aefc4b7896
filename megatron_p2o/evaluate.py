"""Measuring a policy on problems: what it answers plainly, and what a template adds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_p2o.algorithm import Parts, sample_and_grade
from megatron_p2o.config import Config
from megatron_p2o.interfaces import TemplateLibrary
from megatron_p2o.seeds import seed_of
from megatron_p2o.types import PLAIN, Problem, Rollout, SamplingParams, Template

UNNUMBERED = -1
"""Id of a template outside any library; published templates are numbered from 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Outcome on one problem set."""

    num_correct: int
    num_samples: int
    by_source: Mapping[str, float]
    """Accuracy by `Problem.source`; empty when the problems name none."""

    @property
    def accuracy(self) -> float:
        """Correct samples over samples: avg@k when each problem was sampled k times."""
        return self.num_correct / self.num_samples


def evaluate(problems: Sequence[Problem], parts: Parts, config: Config, template: Template = PLAIN) -> Evaluation:
    """Sample `evaluation.num_samples` answers to each problem under `template` and grade them as in training."""
    prompts = [
        parts.renderer.render(problem, template) for problem in problems for _ in range(config.evaluation.num_samples)
    ]
    sampling = SamplingParams(
        temperature=config.evaluation.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        # The same at every step: two evaluations differ by the policy, not by luck.
        seed=seed_of(config.run.seed, "evaluation"),
    )
    rollouts = sample_and_grade(prompts, sampling, parts)
    sources = sorted({problem.source for problem in problems} - {""})
    return Evaluation(
        num_correct=sum(rollout.reward > 0 for rollout in rollouts),
        num_samples=len(rollouts),
        by_source={source: _accuracy_of(source, rollouts) for source in sources},
    )


def evaluation_record(outcome: Evaluation) -> dict[str, Any]:
    """Return the outcome as it is written to files."""
    return {"accuracy": outcome.accuracy, **asdict(outcome)}


def best_template(library: TemplateLibrary) -> Template:
    """Return the template with the highest development score, PLAIN when the library has none."""
    templated = [template for template in library.templates if template.text]
    return max(templated, key=lambda template: template.score, default=PLAIN)


def template_of(text: str) -> Template:
    """Return a template that is in no library, to ask problems through; PLAIN for ""."""
    return Template(id=UNNUMBERED, text=text, parent=None) if text else PLAIN


def _accuracy_of(source: str, rollouts: Sequence[Rollout]) -> float:
    of_source = [rollout for rollout in rollouts if rollout.completion.prompt.problem.source == source]
    return sum(rollout.reward > 0 for rollout in of_source) / len(of_source)
