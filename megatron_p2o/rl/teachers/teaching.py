"""On-policy context distillation (arXiv:2602.12275, 2601.20802): the policy under a template teaches the plain one.

A problem with templates is sampled plainly, y ~ pi(. | x). The engines then say how likely y is under the template:
each token's gain, log pi(y | x, z) - log pi(y | x), is added to its advantage by `objective.distill_beta`. The mean
gain over tokens of pi(. | x) is minus the reverse KL(pi(. | x) || pi(. | x, z)), so that this is its policy gradient,
each token with its own term alone.

SGLang gives log-probs of a given text at temperature 1. Divided by the temperature T of sampling, a gain at 1 differs
from that at T by a number that depends on what came before the token and not on the token: a baseline, which changes no
expected gradient and is 0 where both contexts predict the same.
"""

from collections.abc import Sequence
from dataclasses import replace

from megatron_p2o.interfaces import PromptTooLongError
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.types import Group, Logprobs, Prompt, Rollout, Teaching, Template


def with_teaching(
    rollouts: Sequence[Rollout], templates: Sequence[Template], parts: SamplingParts, temperature: float
) -> list[Rollout]:
    """Return the rollouts, which asked plainly, with the gains of their tokens under `templates`, one a rollout.

    A rollout without a template or a verdict is returned unchanged. One whose template makes the prompt too long is
    unchanged, too. Raises what the engines raise.
    """
    teachers = [
        _teacher(rollout, template, parts) if template.text and rollout.can_be_trained_on else None
        for rollout, template in zip(rollouts, templates, strict=True)
    ]
    places = [place for place, teacher in enumerate(teachers) if teacher is not None]
    if not places:
        return list(rollouts)
    taught = [rollouts[place].completion for place in places]
    prompts = [teacher for teacher in teachers if teacher is not None]
    responses = [completion.token_ids for completion in taught]
    under_template = parts.engines.score(prompts, responses)
    if temperature == 1:
        plain: list[Logprobs | None] = [completion.logprobs for completion in taught]
    else:
        plain = parts.engines.score([completion.prompt for completion in taught], responses)
    result = list(rollouts)
    for place, prompt, z_R, x_R in zip(places, prompts, under_template, plain, strict=True):
        gains_R = None if z_R is None or x_R is None else (z_R - x_R) / temperature
        result[place] = replace(rollouts[place], teaching=Teaching(template=prompt.template, gains=gains_R))
    return result


def _teacher(rollout: Rollout, template: Template, parts: SamplingParts) -> Prompt | None:
    try:
        return parts.renderer.render(rollout.completion.prompt.problem, template)
    except PromptTooLongError:
        return None


def teachings_of(groups: Sequence[Group]) -> list[Teaching]:
    """Return what was asked of the engines for the rollouts of a step."""
    return [rollout.teaching for group in groups for rollout in group.rollouts if rollout.teaching is not None]
